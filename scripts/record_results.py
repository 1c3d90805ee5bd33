"""Record the results of seeded runs of every kind, to show that a change to the code does not change any result.

    python scripts/record_results.py before.json           # at the revision before the change
    python scripts/record_results.py after.json            # after it
    python scripts/record_results.py --compare before.json after.json

Weights are compared by their SHA-256, scores and losses by every digit. `--quick` skips the runs on Ray.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ARDS_MODELS = ("gru", "lstm", "grud", "boosting", "logistic", "last_pf", "last_sf")
IMAGE_MODELS = ("covidnet", "resnet18", "vgg11_bn")
SMALL_IMAGES = ("--set", "loop.epochs=1", "loop.global_batch_size=16")
RECORDED = ("weights_sha256", "data_hash", "split_hash", "val_loss", "steps", "best_objective", "best_trial")
"""Entries of a verb's JSON result that are recorded in addition to its scores."""


class Runner:
    """Runs raylab's command line with its own RAYLAB_HOME in the directory `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.environment = {**os.environ, "RAYLAB_HOME": str(place / "home"), "MLFLOW_TRACKING_URI": ""}

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "jobs.cli", *map(str, words)]

    def run(self, *words: object) -> dict[str, Any]:
        """Run a verb and return its --json result; SystemExit with its output if it fails."""
        file = self.place / "result.json"
        command = self.command(*words, "--json", file, "--quiet")
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        result: dict[str, Any] = json.loads(file.read_text())
        return result

    def kill_at_step(self, step: int, name: str, *words: object) -> None:
        """Start a run and kill it with SIGKILL once its ledger contains `step`."""
        process = subprocess.Popen(self.command(*words, "--name", name, "--quiet"), cwd=ROOT, env=self.environment)
        ledger = self.place / "home" / "runs" / name / "ledger.jsonl"
        while process.poll() is None and not (ledger.is_file() and f'"step": {step},' in ledger.read_text()):
            time.sleep(0.05)
        if process.poll() is not None:
            raise SystemExit(f"{name} ended before it could be killed at step {step}")
        process.send_signal(signal.SIGKILL)
        process.wait()


def scores_in(result: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of every score {"value", "low", "high"} in a result and of every entry of RECORDED."""
    if not isinstance(result, dict):
        return
    for name, value in result.items():
        if isinstance(value, dict) and "value" in value:
            yield prefix + name, [value.get(part) for part in ("value", "low", "high")]
        elif isinstance(value, dict):
            yield from scores_in(value, f"{prefix}{name}/")
        elif name in RECORDED:
            yield prefix + name, value


def sha256_of_tables(directory: Path) -> dict[str, Any]:
    """{"data_hash": SHA-256 over all parquet files below `directory`}."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.parquet")):
        digest.update(path.name.encode() + path.read_bytes())
    return {"data_hash": digest.hexdigest()}


def runs(runner: Runner, quick: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The actions to record, by name; each may use the results of earlier ones."""
    place, run = runner.place, runner.run
    ards, image_a, image_b, sweep, fit = (place / name for name in ("ards", "a", "b", "sweep", "fit"))
    images = ("--source", "synthetic", "--patients", 60, "--size", 64)
    disturbed = ("--set", "loop.epochs=20", "loop.ema_decay=0.9", "model.dropout=0.2", "loop.checkpoint_steps=10")

    def train_ards(name: str, *words: object) -> Callable[[], dict[str, Any]]:
        return lambda: run("train", "ards", "--data", ards, "--smoke", "--name", name, *words)

    def train_images(name: str) -> Callable[[], dict[str, Any]]:
        words = (*SMALL_IMAGES, f"model.name={name}")
        return lambda: run("train", "covidnet", "--data", image_a, "--smoke", "--name", f"image-{name}", *words)

    def resume() -> dict[str, Any]:
        runner.kill_at_step(15, "killed", "train", "ards", "--data", ards, "--smoke", *disturbed)
        return run("resume", "killed")

    def simulate() -> dict[str, Any]:
        ranges = ("shunt=uniform(.05,.3)", "fio2=uniform(.3,1)")
        run("simulate", "patient", "--size", 512, "--out", sweep, "--set", *ranges)
        return sha256_of_tables(sweep)

    def fit_lungs() -> dict[str, Any]:
        run("fit", "--source", "synthetic", "--patients", 30, "--out", fit)
        return sha256_of_tables(fit)

    recorded: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare ards": lambda: run("prepare", "ards", "--source", "synthetic", "--patients", 300, "--out", ards),
        "prepare covidnet A": lambda: run("prepare", "covidnet", *images, "--domain", "A", "--out", image_a),
        "prepare covidnet B": lambda: run("prepare", "covidnet", *images, "--domain", "B", "--out", image_b),
        **{f"train {name}": train_ards(name, "--set", f"model.name={name}") for name in ARDS_MODELS},
        "train an ensemble": train_ards("ensemble", "--set", "model.members=2"),
        "train with the float sum": train_ards("float", "--set", "loop.gradient_reduction=float"),
        "train undisturbed": train_ards("undisturbed", *disturbed),
        "train killed and resumed": resume,
        **{f"train {name}": train_images(name) for name in IMAGE_MODELS},
        "transfer": lambda: run("transfer", "covidnet", "--from", "image-covidnet", "--data", image_b, "--name", "b"),
        "simulate": simulate,
        "train surrogate": lambda: run("train", "surrogate", "--data", sweep, "--smoke", "--name", "surrogate"),
        "fit": fit_lungs,
        "evaluate ards": lambda: run("evaluate", "ards", "--run", "gru", "--data", ards),
        "evaluate covidnet": lambda: run("evaluate", "covidnet", "--run", "b", "--data", image_b),
    }
    if not quick:
        for workers in (1, 2, 3):
            name = f"workers-{workers}"
            recorded[f"train on {workers} workers"] = train_ards(name, "--workers", workers, *disturbed)
        points = ("--space", "optim.lr=choice(1e-3,1e-3)", "--scheduler", "fifo", "--search", "random")
        recorded["tune"] = lambda: run(
            "tune", "ards", "--data", ards, "--smoke", "--trials", 2, *points, "--name", "search"
        )
    return recorded


def compare(before: Path, after: Path) -> int:
    """Print every difference between two records; returns 0 if there is none, otherwise 1."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    differences = 0
    for name in sorted(old.keys() | new.keys()):
        facts, other = old.get(name, {}), new.get(name, {})
        wrong = sorted(key for key in facts.keys() | other.keys() if facts.get(key) != other.get(key))
        print(f"{'differs' if wrong else 'same':8}{name:30}{facts.get('weights_sha256', '')[:12]:14}{len(facts)} facts")
        for key in wrong:
            print(f"          {key}: {facts.get(key)} -> {other.get(key)}")
        differences += len(wrong)
    return int(differences > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--compare", action="store_true", help="compare two records")
    parser.add_argument("--quick", action="store_true", help="skip the runs on Ray")
    args = parser.parse_args()
    if len(args.files) != 1 + args.compare:
        parser.error("give one file to record, or --compare and two")
    if args.compare:
        return compare(*args.files)
    with tempfile.TemporaryDirectory(prefix="raylab-record-") as place:
        record = {}
        for name, action in runs(Runner(Path(place)), args.quick).items():
            print(name, flush=True)
            record[name] = dict(scores_in(action()))
            args.files[0].write_text(json.dumps(record, indent=1))  # after every action, in case a later one fails
    return 0


if __name__ == "__main__":
    sys.exit(main())
