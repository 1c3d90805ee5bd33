"""The published COVID-Net experiment as one command, with the controls needed to interpret its scores.

    OUT/a, OUT/b              the prepared data: COVIDx and E*HealthLine, or domains A and B of one folder
        steps/NAME.json       the result of each training, search and evaluation; a rerun continues from them
        table.md, table.json  all results
        *.png                 best score over time by scheduler, throughput by number of workers

Parts: networks (a), transfer (b), schedulers (c), scaling (d). Every test score comes from `evaluate`.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

from jobs import prepare
from jobs.common import home, predictions
from jobs.common.console import say
from jobs.common.results import Run
from jobs.evaluate import Split, evaluate
from jobs.resume import resume
from jobs.train import train
from jobs.transfer import transfer
from jobs.tune import tune
from raylab.config.assignments import parse_assignments
from raylab.data.images import published
from raylab.data.images.manifest import discover
from raylab.data.images.meta import ImageMeta
from raylab.data.prepared import read_meta
from raylab.documents import read_json
from raylab.errors import UsageError, unknown
from raylab.evaluation.metrics import macro_recall_gain
from raylab.files import atomic_write, read_lines, write_json, write_text
from raylab.score import Score
from raylab.training.run_result import read_end

EXPERIMENT = "raylab-benchmark-covidnet"
PARTS = ("networks", "transfer", "schedulers", "scaling")
SCHEDULERS = ("fifo", "hyperband", "asha", "pbt")
# The published search space: learning rate, weights of classes 2 and 3, fraction of COVID-19 in a batch
# (Diagnostics 13(3):391)
SPACE = {
    "optim.lr": "loguniform(1e-5,1e-3)",
    "optim.class_weight.1": "uniform(1,10)",
    "optim.class_weight.2": "uniform(1,10)",
    "data.class_fraction": "uniform(0.05,0.5)",
}
# Published for COVIDx, percent: accuracy; sensitivity; PPV of normal/pneumonia/Covid-19 (arXiv 2003.09871, and models
# CXR3-B and CXR4-A of its repository; ResNet-50 and VGG-19 were not verified). They used a different test set, so
# these figures are shown for reference only.
PUBLISHED = {
    "covidnet": "93.3; 95/94/91; 90.5/91.3/98.9",
    "covidnet-large": "94.3; -/-/95; 91.3/93.1/99.0",
    "resnet50": "90.6; 97/92/83; 88.2/86.8/98.8",
    "vgg19": "83.0",
}
# Published for the schedulers on a 441-image E*HealthLine test set; 354 of its lines are also in a training list
PUBLISHED_SEARCH = {
    "fifo": ".934; .989/.154/.921",
    "hyperband": ".746; .806/.538/.289",
    "asha": ".930; .966/.615/.789",
    "pbt": ".832; .844/.692/.816",
}
# COVID-Net as it is, blind to the lungs, blind to all but the lungs, and with rectangles of its training images erased
VARIANTS: dict[str, dict[str, Any]] = {
    "covidnet": {},
    "covidnet-masked": {"data.mask": "centre"},
    "covidnet-lungs": {"data.mask": "border"},
    "covidnet-erased": {"data.erase": 0.5},
}
# How COVID-Net learns B; and with what of each variant on A
WAYS: dict[str, dict[str, Any]] = {
    "scratch": {},
    "lp-ft": {},
    "full": {"transfer.mode": "full", "transfer.first_lr_scale": 1.0},
    "probe": {"transfer.mode": "probe"},
    "lp-ft, batch norm of A": {"transfer.reestimate": False},
}
LEARNT = {"covidnet": tuple(WAYS), **dict.fromkeys(("covidnet-lungs", "covidnet-erased"), ("scratch", "lp-ft", "full"))}
SETTINGS = {
    "loop.global_batch_size": 32,
    "loop.shards": 4,
    "schedule.kind": "cosine",
    "schedule.warmup_steps": 20,
    "optim.lr": 1e-3,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", type=Path, metavar="DIR",
                        help="the folder of E*HealthLine (default: domain B of --path)")  # fmt: skip
    parser.add_argument("--size", type=int, default=224, help="image size in pixels per side (default: 224)")
    parser.add_argument("--epochs", type=int, default=22, help="epochs of every training, so that all have the same "
                        "budget (default: 22)")  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, help="seeds for transfer and training from scratch (default: 3)"
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), metavar="PART",
                        help=f"parts to run (default: {' '.join(PARTS)})")  # fmt: skip
    parser.add_argument("--networks", nargs="+", default=["covidnet", "resnet50", "vgg19"], metavar="NAME",
                        help="networks to compare (default: covidnet resnet50 vgg19)")  # fmt: skip
    parser.add_argument("--most-workers", type=int, default=2, help="the scaling part measures 1, 2, 4, ... workers up "
                        "to this number (default: 2)")  # fmt: skip


def main(args: argparse.Namespace) -> dict[str, Any]:
    for part in args.parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if args.path is None:
        raise UsageError("benchmark covidnet needs --path DIR", do="give the folder of COVIDx or of domains A and B")
    os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    out = args.out.absolute()
    (out / "steps").mkdir(parents=True, exist_ok=True)
    bench = Benchmark(args, out)
    result: dict[str, Any] = {"size": args.size, "epochs": args.epochs, "trials": args.trials, "data": bench.data()}
    if "networks" in args.parts:
        result["networks"] = bench.networks()
    if "transfer" in args.parts:
        result["transfer"] = bench.transfers()
        result["gains"] = bench.gains(result["transfer"])
    if "schedulers" in args.parts:
        result["schedulers"] = bench.schedulers()
    if "scaling" in args.parts:
        result["scaling"] = bench.scaling()
    write_json(out / "table.json", result)
    write_text(out / "table.md", markdown(result))
    plots(result, out)
    if not args.quiet:
        say(markdown(result))
    return {"out": str(out), "experiment": os.environ["MLFLOW_EXPERIMENT_NAME"], **result}


class Benchmark:
    """The steps of one benchmark directory. The result of a finished step is read from its file."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        self.args, self.out = args, out
        own = {"data.size": args.size, "loop.epochs": args.epochs}
        self.settings: dict[str, Any] = SETTINGS | own | parse_assignments(args.set)

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `work`, or the stored result if the step is already finished."""
        file = self.out / "steps" / f"{name}.json"
        if not file.is_file():
            if not self.args.quiet:
                say(f"\n{name}")
            write_json(file, work())
        result: dict[str, Any] = read_json(file, dict[str, Any], "remove it; then the same command makes it again")
        return result

    def data(self) -> dict[str, Any]:
        """Prepare both data sets and compare their lists with the published tables."""
        datasets = {}
        folders = {"a": (self.args.path, "COVIDx"), "b": (self.args.target or self.args.path, "E*HealthLine")}
        for name, (folder, table) in folders.items():
            domain = name.upper() if self.args.target is None else None
            here = discover(folder, domain)
            target = self.out / name
            if not (target / "meta.json").is_file():
                options = {"source": "covidx", "size": self.args.size, "manifest": here.manifest, "domain": domain}
                options |= {"images": here.images, **here.lists}
                # images of A would already be known to the model
                options["apart_from"] = [self.out / "a"] if name == "b" else []
                prepare.write_prepared("covidnet", target, False, self.args.quiet, options)
            meta = read_meta(target, "covidnet", ImageMeta)
            if meta.size != self.args.size:
                raise UsageError(f"{target} contains images of {meta.size} px", do="choose another --out")
            datasets[name] = {
                "folder": folder.name if domain is None else f"{folder.name}, domain {domain}",
                "counts": meta.counts,
                "attrition": meta.attrition,
                "duplicates": None if meta.duplicates is None else meta.duplicates.model_dump(),
                "differs": published.differences(table, meta.listed),
            }
        return datasets

    def run(self, name: str, begin: Callable[[str], Run]) -> dict[str, Any]:
        """The result of a run: resumed if it exists, otherwise started by `begin(run name)`."""
        return self.step(name, partial(self.train_or_resume, f"{self.out.name}-{name}", begin))

    def train_or_resume(self, run: str, begin: Callable[[str], Run]) -> dict[str, Any]:
        directory = home.home() / "runs" / run
        if (directory / "run.json").is_file():
            return resume(directory, quiet=self.args.quiet).details
        if directory.exists():  # it ended before its record was written: start afresh
            shutil.rmtree(directory)
        return begin(run).details

    def train(self, data: Path, settings: dict[str, Any], run: str) -> Run:
        """Train the task's recipe with the benchmark's settings and `settings`."""
        return train("covidnet", data, name=run, settings=self.settings | settings, quiet=self.args.quiet)

    def evaluate_run(self, name: str, run: str, data: Path) -> dict[str, Any]:
        """The scores of a run by `evaluate` on the last split of the data: val if there is no test list."""
        split = cast(Split, list(read_meta(data, "covidnet").counts)[-1])
        return self.step(f"{name}-{split}", lambda: evaluate(run, data, split=split, quiet=self.args.quiet).details)

    def networks(self) -> list[dict[str, Any]]:
        """(a) Train and score every network on A, and the other variants of COVID-Net."""
        rows = []
        for name in [*self.args.networks, *(name for name in VARIANTS if name != "covidnet")]:
            run = self.learn_a(name)
            rows.append({**self.evaluate_run(f"a-{name}", run, self.out / "a"), "name": name, "run": run})
        return rows

    def learn_a(self, name: str) -> str:
        """The run of a network, or of a variant of COVID-Net, on A."""
        settings = {"model.name": "covidnet", **VARIANTS[name]} if name in VARIANTS else {"model.name": name}
        return str(self.run(f"a-{name}", partial(self.train, self.out / "a", settings))["name"])

    def transfers(self) -> list[dict[str, Any]]:
        """(b) Score COVID-Net of (a) before and after transfer to B, and the same network trained on B from scratch;
        each also for the variants that see the lung field alone, or learn with erased rectangles."""
        b, rows = self.out / "b", []
        for variant, ways in LEARNT.items():
            parent, suffix = self.learn_a(variant), variant.removeprefix("covidnet")
            before = self.evaluate_run(f"b{suffix}-before", parent, b)
            rows.append({**before, "name": f"before transfer{suffix}"})
            for way, seed in product(ways, range(self.args.seeds)):
                learn = self.train if way == "scratch" else partial(self.transfer, parent)
                settings = {"seed": seed, **VARIANTS[variant], **WAYS[way]}
                name = f"b{suffix}-{way.replace(', ', '-').replace(' ', '-')}-{seed}"
                run = self.run(name, partial(learn, b, settings))["name"]
                row = {"name": f"{way}{suffix}", "seed": seed, "run": run, "against": f"scratch{suffix}"}
                rows.append({**self.evaluate_run(name, run, b), **row})
        return rows

    def gains(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """How much each way of learning B gains over training from scratch: macro recall, mean over the seeds."""
        meta = read_meta(self.out / "b", "covidnet")
        kept = {
            (row["name"], row["seed"]): predictions.read(
                home.home() / "runs" / row["run"], row["split"], meta.data_hash, "remove OUT/steps, and run it again"
            )
            for row in rows
            if "run" in row
        }
        found = []
        for name, against in {row["name"]: row["against"] for row in rows if "run" in row}.items():
            own, others = ([one for (way, _), one in kept.items() if way == which] for which in (name, against))
            recalls = [row["macro_recall"]["value"] for row in rows if row["name"] == name]
            gain = macro_recall_gain(
                own[0].y, [one.p for one in own], [one.p for one in others], own[0].group, own[0].classes
            )
            found.append({"name": name, "macro_recall": recalls, "against": against, "gain": gain.model_dump()})
        return found

    def transfer(self, parent: str, data: Path, settings: dict[str, Any], run: str) -> Run:
        return transfer(parent, data, name=run, settings=self.settings | settings, quiet=self.args.quiet)

    def search(self, scheduler: str, data: Path, run: str) -> Run:
        """Search the published space."""
        return tune(
            "covidnet",
            data,
            trials=self.args.trials,
            scheduler=scheduler,
            search="random" if scheduler == "pbt" else "tpe",
            space=SPACE,
            name=run,
            settings=self.settings,
            quiet=self.args.quiet,
        )

    def schedulers(self) -> list[dict[str, Any]]:
        """(c) Run four schedulers on B with the published space and the same number of trials and epochs."""
        rows = []
        b = self.out / "b"
        for scheduler in SCHEDULERS:
            name = f"search-{scheduler}"
            run = self.run(name, partial(self.search, scheduler, b))
            rows.append(
                {
                    "name": scheduler,
                    "run": run["name"],
                    "best_val": run["best_objective"],
                    "best_params": run["best_params"],
                    **self.step(f"{name}-time", partial(measure_search, home.home() / "runs" / run["name"])),
                    "score": self.evaluate_run(name, run["name"], b),
                }
            )
        return rows

    def scaling(self) -> list[dict[str, Any]]:
        """(d) Measure the training throughput of the same run, without start-up, on 1, 2, 4, ... workers."""
        rows, workers = [], 1
        a = self.out / "a"
        while workers <= self.args.most_workers:
            run = self.run(f"scaling-{workers}", partial(self.train, a, {"scaling.workers": workers, "loop.epochs": 2}))
            outbox = read_lines(home.home() / "runs" / run["name"] / "outbox" / "outbox.jsonl")
            paces = [r["values"]["train/samples_per_s"] for r in outbox if "train/samples_per_s" in r.get("values", {})]
            rows.append({
                "workers": workers,
                "run": run["name"],
                "samples_per_s": paces[-1],
                "weights_sha256": run["weights_sha256"],
                "attempts": run["attempts"],
            })  # fmt: skip
            workers *= 2
        return rows


def measure_search(directory: Path) -> dict[str, Any]:
    """{"hours", "seconds_to_best", "curve"} of a search, from the modification times of its trials' files: total worker
    hours, and a curve of (seconds since the first trial started, best objective so far)."""
    trials = []
    for end in (directory / "trials").glob("*/end.json"):
        objective = read_end(end.parent)["objective"]
        stop = end.stat().st_mtime
        start = min((end.parent / "params.json").stat().st_mtime, stop)  # a clock may have been set back
        trials.append((start, stop, objective))
    first, best, curve = min(t[0] for t in trials), float("-inf"), []
    for _, stop, objective in sorted(trials, key=lambda t: t[1]):
        if objective is not None and objective > best:
            best = objective
            curve.append((stop - first, best))
    return {
        "hours": sum(stop - start for start, stop, _ in trials) / 3600,
        "seconds_to_best": curve[-1][0],
        "curve": curve,
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of a benchmark in Markdown."""
    lines = [f"{result['size']} px, {result['epochs']} epochs at most, {result['trials']} trials a search", ""]
    for name, data in result["data"].items():
        counts = "; ".join(f"{s}: " + ", ".join(f"{c} {n}" for c, n in by.items()) for s, by in data["counts"].items())
        lines.append(f"- {name.upper()} ({data['folder']}): {counts}")
        lines += [f"  - {row['step']}: {row['images']} images" for row in data["attrition"][1:]]
        lines += [f"  - differs from the published counts: {text}" for text in data["differs"]]
    for part, title in (("networks", "Networks on A"), ("transfer", "Transfer to B")):
        if part in result:
            lines += ["", f"## {title}", "", *_table(result[part])]
    if "gains" in result:
        lines += ["", "Macro recall on B, mean over the seeds, and what it gains over training from scratch:", ""]
        lines += header("", "mean", "of each seed", "minus scratch")
        for row in result["gains"]:
            recalls = row["macro_recall"]
            gain = "" if row["name"] == row["against"] else Score.model_validate(row["gain"]).text(3, "+")
            each = ", ".join(f"{recall:.3f}" for recall in recalls)
            lines.append(f"| {row['name']} | {sum(recalls) / len(recalls):.3f} | {each} | {gain} |")
    if "schedulers" in result:
        lines += ["", "## Schedulers on B", ""]
        lines += header("", "best val", "worker hours", "s to the best", "macro recall", "published")
        for row in result["schedulers"]:
            score = f"{text(row['score']['macro_recall'])} ({row['score']['split']})"
            cells = (
                row["name"],
                f"{row['best_val']:.3f}",
                f"{row['hours']:.2f}",
                f"{row['seconds_to_best']:.0f}",
                score,
            )
            lines.append(f"| {' | '.join(cells)} | {PUBLISHED_SEARCH[row['name']]} |")
    if "scaling" in result:
        lines += ["", "## Workers", "", *header("workers", "images/s", "against one")]
        one = result["scaling"][0]["samples_per_s"]
        lines += [
            f"| {r['workers']} | {r['samples_per_s']:.1f} | {r['samples_per_s'] / one:.2f} |" for r in result["scaling"]
        ]
    return "\n".join(lines) + "\n"


def text(score: dict[str, Any], digits: int = 3) -> str:
    """A score of a verb's JSON result as text with its interval."""
    return Score.model_validate(score).text(digits)


def header(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A table of scores, each with its border probe and its contrasts within one source, because accuracy pooled over
    sources is misleading."""
    lines = header(
        "", "split", "n", "macro recall", "minus border probe", "sensitivity N/P/C", "ECE, calibrated",
        "within a source", "published",
    )  # fmt: skip
    for row in rows:
        seed = f", seed {row['seed']}" if "seed" in row else ""
        recalls = [row.get(f"sensitivity/{c}", {}).get("value") for c in ("normal", "pneumonia", "COVID-19")]
        shown = "/".join("-" if r is None else f"{r:.2f}" for r in recalls)
        inside = "; ".join(
            f"{w['source']} {w['classes'][0]} from {w['classes'][1]} {text(w['auroc'], 2)}"
            for w in row.get("within_source", [])
        )
        minus = text(row["minus_border"]) if "minus_border" in row else row.get("border", {}).get("why", "")
        ece = f"{row['ece']['value']:.3f}, {row.get('ece_calibrated', {}).get('value') or float('nan'):.3f}"
        cells = (
            f"{row['name']}{seed}",
            row["split"],
            str(row["n"]),
            text(row["macro_recall"]),
            minus,
            shown,
            ece,
            inside,
        )
        lines.append(f"| {' | '.join(cells)} | {PUBLISHED.get(row['name'], '')} |")
    return lines


def plots(result: dict[str, Any], out: Path) -> None:
    from jobs.common import provenance
    from tracking.plots import lines
    from tracking.provenance import save_png

    figures = {}
    if "schedulers" in result:
        curves = {
            row["name"]: ([t for t, _ in row["curve"]], [v for _, v in row["curve"]]) for row in result["schedulers"]
        }
        figure = lines(curves, "seconds since the first trial", "best val macro recall", "Schedulers")
        figures["schedulers"] = figure, result["schedulers"]
    if "scaling" in result:
        rows = result["scaling"]
        curve = ([r["workers"] for r in rows], [r["samples_per_s"] for r in rows])
        figures["workers"] = lines({"measured": curve}, "workers", "images/s", "Workers"), rows
    for name, (figure, rows) in figures.items():
        origin = [provenance.describe(home.home() / "runs" / row["run"]) for row in rows]
        with atomic_write(out / f"{name}.png") as beside:
            save_png(figure, beside, origin)
