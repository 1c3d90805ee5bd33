"""Measure whether pretraining by spatial proximity helps to predict the depth of brain sections.

    .venv/bin/python -m benchmarks.sections --path FOLDER [--depth COLUMN] [--patch 64] [--size 32] [--epochs 30]

FOLDER and its table are those of `raylab prepare sections --source files`; without --path the sections are SYNTHETIC.
Each of the five folds leaves intervals of consecutive sections out (raylab/data/images/sections/split.py). For each,
the script trains a frozen probe on a pretrained network, one on the same network with its random initial weights, and
the whole network from scratch and from the pretrained weights, scores the test split, and pools the folds: every
section is scored by models that have seen neither it nor the sections beside it. It prints errors in sections with
their 95% CIs (1,000 bootstrap samples over sections), and differences over shared samples. Runs stay in RAYLAB_HOME
and are reused.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import raylab
from jobs.common import home, predictions
from raylab.data.images.sections.meta import SectionMeta
from raylab.data.images.sections.split import FOLDS
from raylab.data.prepared import read_meta
from raylab.evaluation.section_depth import depth_differences, depth_scores

UNTRAINED = {"loop.epochs": 1, "optim.lr": 1e-12}  # of pretraining: the weights stay those of the seed
WAYS: dict[str, tuple[str | None, str]] = {
    "frozen probe, pretrained": ("pretrained", "probe"),
    "frozen probe, random weights": ("random", "probe"),
    "all layers, pretrained": ("pretrained", "full"),
    "all layers, from scratch": (None, "scratch"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", type=Path)
    parser.add_argument("--depth", default="depth")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels a side of the inputs")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=30, help="of pretraining, and of every training after it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = "synthetic" if options.path is None else options.path.absolute().parent.name
    settings = {"data.size": options.size, "model.width": options.width, "loop.epochs": options.epochs}
    settings["seed"] = options.seed
    found = [score_fold(fold, name, options, settings) for fold in range(FOLDS)]
    y, section = (np.concatenate([fold[part] for fold in found]) for part in ("y", "section"))
    pooled = {way: np.concatenate([fold[way] for fold in found]) for way in WAYS}
    print(f"{len(y)} patches of {len(np.unique(section))} sections")
    for way, p in pooled.items():
        scores = depth_scores(y, p, section)
        print(f"{way:<30}" + "".join(f"  {key} {score}" for key, score in scores.items()), flush=True)
    middle = np.concatenate([fold["mean"] for fold in found])
    print(f"{'mean depth of train':<30}" + "".join(f"  {k} {s}" for k, s in depth_scores(y, middle, section).items()))
    for way, reference in (("frozen probe, pretrained", "frozen probe, random weights"),
                           ("all layers, pretrained", "all layers, from scratch"),
                           ("frozen probe, pretrained", "all layers, from scratch")):  # fmt: skip
        gain = depth_differences(y, pooled[way], pooled[reference], section)["section_error"]
        print(f"{way} minus {reference}: section_error {gain.text(sign='+')}")


def score_fold(fold: int, name: str, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the test patches of a fold: y [N] and the predictions of each way [N], in sections; section [N]; and the
    mean depth of train."""
    key = f"{name}-{options.patch}-{options.size}-{options.width}-{options.epochs}-{options.seed}-{fold}"
    data = home.home() / "prepared" / f"sections-{name}-{options.patch}-{fold}"
    if not (data / "meta.json").is_file():
        source = {"source": "synthetic"} if options.path is None else {"source": "files", "path": options.path}
        raylab.prepare("sections", data, quiet=True, fold=fold, patch=options.patch, depth=options.depth, **source)
    parents = {
        "pretrained": train("sections-pretraining", data, f"pretrained-{key}", settings),
        "random": train("sections-pretraining", data, f"random-{key}", settings | UNTRAINED),
    }
    meta = read_meta(data, "sections", SectionMeta)
    out: dict[str, Any] = {}
    for way, (parent, mode) in WAYS.items():
        run = train("sections", data, f"{way.replace(', ', '-').replace(' ', '-')}-{key}",
                    settings | {"transfer.mode": mode}, None if parent is None else parents[parent])  # fmt: skip
        directory = home.home() / "runs" / run
        if not predictions.path(directory, "test", meta.data_hash).is_file():
            raylab.evaluate(run, data, quiet=True)
        kept = predictions.read(directory, "test", meta.data_hash, "run this again in another RAYLAB_HOME")
        rows = pl.read_parquet(data / "index.parquet").filter(pl.col("split") == "test")
        out |= {"y": kept.y, "section": rows["section"].to_numpy(), way: kept.p}
    out["mean"] = np.full(len(out["y"]), meta.depth_mean / meta.depth_per_section)
    return out


def train(task: str, data: Path, name: str, settings: dict[str, Any], parent: str | None = None) -> str:
    """Train run `name` with the small recipe unless it exists; returns the name."""
    if not (home.home() / "runs" / name / "result.json").is_file():
        raylab.train(task, data, name=name, parent=parent, settings=settings, smoke=True, workers=0, quiet=True)
    return name


if __name__ == "__main__":
    main()
