"""raylab demo: the whole workflow from raw data to comparison. `make demo` runs it.

It prepares both tasks; trains an ARDS model undisturbed, and again on 1 to 2 workers while one of them is killed, and
checks that the weights are bit-identical; searches hyperparameters; pretrains a small COVID-Net on chest X-ray domain
A, transfers it to domain B, and trains the same network on B from scratch; evaluates all runs; and compares them.
"""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from jobs import cli
from jobs.common import home
from jobs.common.console import say
from jobs.common.duration import duration
from jobs.common.results import Run
from jobs.common.session import ray_session
from jobs.compare import compare
from jobs.evaluate import Split, evaluate
from jobs.prepare import prepare
from jobs.train import train
from jobs.transfer import transfer
from jobs.tune import tune
from raylab.errors import DataError, RunError
from raylab.training.ledger import groups, read_ledger, steps
from tracking import server

EXAMPLE = "raylab demo --data ../shared/data"
NO_DATA = "no data given: using SYNTHETIC patients and X-rays; their scores only show that the software works"
SMALL = {"data.size": 64, "loop.epochs": 6}
ARDS = {"loop.epochs": 12, "loop.checkpoint_steps": 20}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with icu/physionet-2012 and cxr (default: synthetic data)"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    root = home.home() / "demo" / stamp
    if args.data is not None:
        check_data(args.data)

    def part(title: str) -> None:
        say(f"\n[{duration(time.monotonic() - began)}] {title}")

    part("MLflow: an embedded server over SQLite")
    serving = server.serve(home.home())
    say(f"{serving.uri}, accessible only to you")
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # runs then use the server of their home
    os.environ["MLFLOW_EXPERIMENT_NAME"] = f"demo-{stamp}"
    try:
        say(f"data: {args.data}" if args.data is not None else NO_DATA)
        result = story(args.data, root, stamp, part)
    finally:
        serving.stop()
    part("done")
    say(f"to print the table again: raylab compare --experiment demo-{stamp}")
    say("to open the MLflow UI: make ui")
    return result


def story(data: Path | None, root: Path, stamp: str, part: Any) -> dict[str, Any]:
    part("prepare: ARDS onset, chest X-ray domains A and B")
    ards, domain_a, domain_b = prepare_all(data, root)
    with ray_session(3, root / "ray.log"):
        part("train ARDS undisturbed, in this process")
        calm = train("ards", ards, workers=0, name=f"ards-undisturbed-{stamp}", settings=ARDS)
        part("train ARDS on 1 to 2 workers, and kill one of them")
        name = f"ards-elastic-{stamp}"
        killer = Killer(home.home() / "runs" / name / "ledger.jsonl", at_step=calm.details["steps"] // 2)
        with killer:
            hit = train("ards", ards, workers=(1, 2), name=name, settings=ARDS)
        if killer.killed is None or hit.details["attempts"] + hit.details["regroups"] < 2:
            raise RunError("no worker was killed: the run ended too early")
        weights = calm.details["weights_sha256"]
        if hit.details["weights_sha256"] != weights:
            raise RunError("the weights of the disturbed run differ from those of the undisturbed run")
        repeated = hit.details["steps_repeated"]
        say(f"worker {killer.killed} was killed at step {killer.killed_at}; training went on after "
            f"{killer.seconds:.1f} s; {repeated} steps were repeated")  # fmt: skip
        say(f"both runs have identical weights: SHA-256 {weights}")
        part("tune ARDS: 8 trials, ASHA + Optuna TPE")
        search = tune("ards", ards, trials=8, name=f"ards-search-{stamp}", settings=ARDS)
    part("pretrain a small COVID-Net on domain A")
    a = train("covidnet", domain_a, workers=0, name=f"cxr-a-{stamp}", settings=SMALL, smoke=True)
    part("transfer it to domain B")
    b = transfer(a, domain_b, name=f"cxr-a-to-b-{stamp}")
    part("the same network on domain B from scratch")
    c = train("covidnet", domain_b, workers=0, name=f"cxr-b-scratch-{stamp}", settings=SMALL, smoke=True)
    part("evaluate")
    split_b: Split = "val" if data is not None else "test"  # the real domain B has no test list
    splits: list[tuple[Run, Path, Split]] = [
        (calm, ards, "test"),
        (hit, ards, "test"),
        (search, ards, "test"),
        (a, domain_a, "test"),
        (b, domain_b, split_b),
        (c, domain_b, split_b),
    ]
    scores = {}
    for run, where, split in splits:
        say(f"{run.name}, {split}:")
        scores[run.name] = evaluate(run, where, split=split).details
    part("compare")
    compared = compare()
    return {
        "undisturbed": calm.details,
        "killed": hit.details,
        "search": search.details,
        "scores": scores,
        "report": str(compared.report),
        "same_weights": hit.details["weights_sha256"] == weights,
    }


def prepare_all(data: Path | None, root: Path) -> tuple[Path, Path, Path]:
    """Prepare ARDS and chest X-ray domains A and B; returns the three directories."""
    ards, a, b = (root / name for name in ("ards", "cxr-a", "cxr-b"))
    domains = ((a, "A"), (b, "B"))
    if data is None:
        prepare("ards", ards, source="synthetic", patients=2000)
        for out, domain in domains:
            prepare("covidnet", out, source="synthetic", domain=domain, patients=400, size=64)
        return ards, a, b
    prepare("ards", ards, source="physionet2012", path=data / "icu" / "physionet-2012")
    for out, domain in domains:
        names = {split: data / "cxr" / "labels" / f"{split}_{domain}.txt" for split in ("train", "val", "test")}
        options: dict[str, Any] = {split: file for split, file in names.items() if file.is_file()}
        prepare("covidnet", out, images=data / "cxr" / "images", size=96, **options)
    return ards, a, b


def check_data(data: Path) -> None:
    for needed in ("icu/physionet-2012", "cxr/images", "cxr/labels/train_A.txt", "cxr/labels/train_B.txt"):
        if not (data / needed).exists():
            raise DataError(
                f"{data / needed} is missing",
                "the demo uses PhysioNet 2012 and two chest X-ray domains with label lists",
                "set DATA to a folder that contains it, or leave it out to use synthetic data",
            )


class Killer:
    """Sends SIGKILL to the last worker of a run when its ledger reaches a step, and waits for the next new step."""

    def __init__(self, ledger: Path, at_step: int) -> None:
        self.ledger, self.at_step = ledger, at_step
        self.killed: int | None = None
        self.killed_at = 0  # the run's last step at that time
        self.seconds = 0.0  # until the next one
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.over.wait(0.1):
            entries = read_ledger(self.ledger)
            self.killed_at = max(steps(entries), default=0)
            if self.killed_at >= self.at_step:
                pid = groups(entries)[-1].pids[-1]
                if os.getpid() not in {p.pid for p in psutil.Process(pid).parents()}:
                    return  # not in the Ray that we started
                os.kill(pid, signal.SIGKILL)
                began, self.killed = time.monotonic(), pid
                while max(steps(read_ledger(self.ledger))) <= self.killed_at and not self.over.wait(0.02):
                    pass
                self.seconds = time.monotonic() - began
                return


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
