"""Measure whether pretraining on simulated patients helps the ARDS network, on the same test patients.

    .venv/bin/python -m benchmarks.pretraining SIMULATED REAL [REAL ...]

SIMULATED comes from `raylab prepare ards --source synthetic`: its patients are drawn from the distributions in
raylab/data/icu/sources/synthetic.py, so none is a copy of a real patient. REAL are folds of one data set
(`raylab prepare ards --from D --split-by patient:K/5`), whose test splits are pooled. For each cohort, the script
prints both AUROCs and their difference with its 95% CI over the same bootstrap samples of patients. Runs stay in
RAYLAB_HOME and are reused.
"""

import sys
from pathlib import Path
from typing import Any

import polars as pl

import raylab
from jobs.common import home
from raylab.evaluation.metrics import binary_scores, paired_difference

MEMBERS = {"model.members": 3}
COHORTS = ("all", "ventilated_pf")
WAYS: dict[str, dict[str, Any]] = {"without": {}, "with": {"transfer.mode": "full", "transfer.first_lr_scale": 1}}


def run(name: str, data: Path, settings: dict[str, Any], parent: str | None = None) -> str:
    """Train run `name` unless it exists; returns the name."""
    if not (home.home() / "runs" / name / "run.json").is_file():
        raylab.train("ards", data, name=name, parent=parent, settings=settings, quiet=True)
    return name


def predict_test_rows(name: str, data: Path) -> pl.DataFrame:
    """The columns stay_id, label and p of the test rows."""
    out = home.home() / "benchmarks" / f"{name}.parquet"
    if not out.is_file():
        raylab.predict(name, data, out, split="test", quiet=True)
    return pl.read_parquet(out).select("label", stay_id="id", p=pl.selectors.starts_with("p_"))


def main() -> None:
    simulated, *folds = (Path(word).absolute() for word in sys.argv[1:])
    settings = {"loop.shards": 1, **MEMBERS}
    parent = run("pretrained-simulated", simulated, settings)
    both = {}
    for way, more in WAYS.items():
        origin = parent if way == "with" else None
        parts = [
            predict_test_rows(run(f"pretrained-{way}-{k}", fold, settings | more, origin), fold)
            for k, fold in enumerate(folds)
        ]
        both[way] = pl.concat(parts)
    rows = pl.read_parquet(folds[0] / "samples.parquet").select("stay_id", "subject_id", *COHORTS[1:])
    table = both["without"].join(both["with"].select("stay_id", other="p"), "stay_id").join(rows, "stay_id")
    for cohort in COHORTS:
        part = table if cohort == "all" else table.filter(pl.col(cohort))
        y, group = part["label"].to_numpy(), part["subject_id"].rank("dense").to_numpy()
        scores = {way: part[column].to_numpy() for way, column in (("without", "p"), ("with", "other"))}
        shown = {way: binary_scores(y, p, group)["auroc"] for way, p in scores.items()}
        told = ", ".join(f"{way} {score}" for way, score in shown.items())
        gain = paired_difference(y, scores["with"], scores["without"], group)
        print(f"{cohort:14} n {len(y)}, {y.sum()} onsets: AUROC {told}, "
              f"difference {gain.text(sign='+')}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
