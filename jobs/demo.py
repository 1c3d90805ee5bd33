"""raylab demo: the main job from raw data to comparison. `make demo` runs it.

Prepare both tasks; train an ARDS model undisturbed, and again on 1 to 2 workers with one of them killed on the way: the
weights must be the same to the last bit; search; pretrain a small COVID-Net on chest X-ray domain A and transfer
it to domain B, beside the same network from scratch; evaluate all; compare.
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

from jobs import cli, compare, evaluate, prepare, train, transfer, tune
from jobs.common import home
from jobs.common.progress import duration, say
from jobs.common.session import ray_session
from raylab.errors import DataError, RunError
from raylab.training.ledger import read_ledger, starts, steps
from tracking import server

EXAMPLE = "raylab demo --data ../shared/data"
NO_DATA = "no data given: SYNTHETIC patients and X-rays; their scores say that the software works, nothing else"
SMALL = ["data.size=64", "loop.epochs=6"]
ARDS = ["loop.epochs=12", "loop.checkpoint_steps=20"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="holds icu/physionet-2012 and cxr; synthetic otherwise"
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
    say(f"{serving.uri}, for this user")
    os.environ.pop("MLFLOW_TRACKING_URI", None)  # runs find the server of their home
    os.environ["MLFLOW_EXPERIMENT_NAME"] = f"demo-{stamp}"
    try:
        say(f"data: {args.data}" if args.data is not None else NO_DATA)
        result = story(args.data, root, stamp, part)
    finally:
        serving.stop()
    part("done")
    say(f"the table again: raylab compare --experiment demo-{stamp}")
    say("open the MLflow UI with: make ui")
    return result


def story(data: Path | None, root: Path, stamp: str, part: Any) -> dict[str, Any]:
    part("prepare: ARDS onset, chest X-ray domains A and B")
    ards, domain_a, domain_b = prepared(data, root)
    with ray_session(3, root / "ray.log"):
        part("train ARDS undisturbed, in this process")
        calm = do(
            train, "ards", "--data", ards, "--workers", "0", "--name", f"ards-undisturbed-{stamp}", "--set", *ARDS
        )
        part("train ARDS on 1 to 2 workers, and kill one on the way")
        name = f"ards-elastic-{stamp}"
        killer = Killer(home.home() / "runs" / name / "ledger.jsonl", at_step=calm["steps"] // 2)
        with killer:
            hit = do(train, "ards", "--data", ards, "--workers", "1:2", "--name", name, "--set", *ARDS)
        if killer.killed is None or hit["attempts"] < 2:
            raise RunError("no worker was killed: the run ended too early to show anything")
        if hit["weights_sha256"] != calm["weights_sha256"]:
            raise RunError("the weights of the disturbed run differ from the undisturbed one's")
        say(f"worker {killer.killed} was killed at step {killer.at_step}; {hit['steps_repeated']} steps were repeated;")
        say(f"both runs end with the same weights: SHA-256 {calm['weights_sha256']}")
        part("tune ARDS: 8 trials, ASHA + Optuna TPE")
        found = do(tune, "ards", "--data", ards, "--trials", "8", "--name", f"ards-search-{stamp}", "--set", *ARDS)
    part("pretrain a small COVID-Net on domain A")
    small = ("--smoke", "--workers", "0", "--set", *SMALL)
    a = do(train, "covidnet", "--data", domain_a, "--name", f"cxr-a-{stamp}", *small)
    part("transfer it to domain B")
    b = do(transfer, "covidnet", "--from", a["name"], "--data", domain_b, "--name", f"cxr-a-to-b-{stamp}")
    part("the same network on domain B from scratch")
    c = do(train, "covidnet", "--data", domain_b, "--name", f"cxr-b-scratch-{stamp}", *small)
    part("evaluate")
    split_b = "val" if data is not None else "test"  # the real domain B comes without its test list
    scores = {}
    for run, where, split in (
        (calm, ards, "test"),
        (hit, ards, "test"),
        (found, ards, "test"),
        (a, domain_a, "test"),
        (b, domain_b, split_b),
        (c, domain_b, split_b),
    ):
        say(f"{run['name']}, {split}:")
        scores[run["name"]] = do(evaluate, run["task"], "--run", run["name"], "--data", where, "--split", split)
    part("compare")
    compared = do(compare)
    return {
        "undisturbed": calm,
        "killed": hit,
        "search": found,
        "scores": scores,
        "report": compared["report"],
        "same_weights": hit["weights_sha256"] == calm["weights_sha256"],
    }


def prepared(data: Path | None, root: Path) -> tuple[str, str, str]:
    """Prepared directories of ARDS, and of chest X-ray domains A and B."""
    ards, a, b = (str(root / name) for name in ("ards", "cxr-a", "cxr-b"))
    domains = ((a, "A"), (b, "B"))
    if data is None:
        do(prepare, "ards", "--source", "synthetic", "--patients", 2000, "--out", ards)
        for out, domain in domains:
            drawn = ("--source", "synthetic", "--domain", domain, "--patients", 400, "--size", 64)
            do(prepare, "covidnet", *drawn, "--out", out)
        return ards, a, b
    do(prepare, "ards", "--source", "physionet2012", "--path", data / "icu" / "physionet-2012", "--out", ards)
    for out, domain in domains:
        lists: list[Any] = []
        for split in ("train", "val", "test"):
            if (file := data / "cxr" / "labels" / f"{split}_{domain}.txt").is_file():
                lists += [f"--{split}", file]
        do(prepare, "covidnet", "--images", data / "cxr" / "images", *lists, "--size", 96, "--out", out)
    return ards, a, b


def check_data(data: Path) -> None:
    for needed in ("icu/physionet-2012", "cxr/images", "cxr/labels/train_A.txt", "cxr/labels/train_B.txt"):
        if not (data / needed).exists():
            raise DataError(
                f"{data / needed} is missing",
                "the demo runs on PhysioNet 2012 and on two chest X-ray domains with label lists",
                "give DATA a folder that has it, or none: the demo then draws synthetic data",
            )


def do(verb: Any, *words: object) -> dict[str, Any]:
    """A verb's main with these words, as its command line would call it."""
    parser = argparse.ArgumentParser()
    verb.arguments(parser)
    parser.set_defaults(quiet=False)
    done: dict[str, Any] = verb.main(parser.parse_args([str(word) for word in words]))
    return done


class Killer:
    """Sends SIGKILL to the last worker of a run when its ledger reaches a step."""

    def __init__(self, ledger: Path, at_step: int) -> None:
        self.ledger, self.at_step = ledger, at_step
        self.killed: int | None = None
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
            if max(steps(entries), default=0) >= self.at_step:
                pid = starts(entries)[0].pids[-1]
                if os.getpid() in {p.pid for p in psutil.Process(pid).parents()}:  # of the Ray that we started
                    os.kill(pid, signal.SIGKILL)
                    self.killed = pid
                return


if __name__ == "__main__":
    sys.exit(cli.main(["demo", *sys.argv[1:]]))
