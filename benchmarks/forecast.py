"""Compare forecasts of runs with what the runs then cost, each measured right before its run.

    python benchmarks/forecast.py --ards DIR [--covidnet DIR] [--only NAME ...]

DIR is a prepared directory. Every run is a command of its own in a home that is removed at the end. Printed are the
core-hours of the workers from `raylab estimate`, those that `raylab cost` reports, and the median of the relative
errors. Early stopping is off, so that forecasts are no upper limits.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ARDS = {
    "gru": ("train", "--set", "loop.epochs=40"),
    "gru, long": ("train", "--set", "loop.epochs=120"),
    "gru, hidden 64": ("train", "--set", "loop.epochs=20", "model.hidden=64"),
    "gru, batch 32": ("train", "--set", "loop.epochs=20", "loop.global_batch_size=32"),
    "gru, batch 512": ("train", "--set", "loop.epochs=60", "loop.global_batch_size=512"),
    "gru, 8 shards": ("train", "--set", "loop.epochs=40", "loop.shards=8"),
    "gru, average": ("train", "--set", "loop.epochs=40", "loop.ema_decay=0.9", "model.dropout=0.2"),
    "smoke": ("train", "--smoke", "--set", "loop.epochs=100"),
    "logistic": ("train", "--set", "model.name=logistic"),
    "boosting": ("train", "--set", "model.name=boosting"),
    "gru, 2 workers": ("train", "--workers", "2", "--set", "loop.epochs=120"),
    "search": ("tune", "--trials", "4", "--concurrent", "2", "--scheduler", "fifo", "--set", "loop.epochs=40"),
}
COVIDNET = {
    "covidnet": ("train", "--smoke", "--set", "loop.epochs=6"),
    "covidnet, batch 8": ("train", "--smoke", "--set", "loop.epochs=4", "loop.global_batch_size=8"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ards", type=Path, required=True)
    parser.add_argument("--covidnet", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    cases = [(name, "ards", options.ards, words) for name, words in ARDS.items()]
    if options.covidnet is not None:
        cases += [(name, "covidnet", options.covidnet, words) for name, words in COVIDNET.items()]
    errors = []
    print(f"{'run':20} {'forecast':>10} {'actual':>10} {'error':>7}   core-seconds; load")
    for name, task, data, words in cases:
        if options.only is None or name in options.only:
            with tempfile.TemporaryDirectory() as home:
                expected, actual = compare(task, data.absolute(), words, home)
            errors.append(expected / actual - 1)
            load = os.getloadavg()[0]
            print(f"{name:20} {expected:10.2f} {actual:10.2f} {errors[-1]:+7.1%}   {load:.1f}", flush=True)
    sizes = [abs(error) for error in errors]
    print(f"median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}, of {len(sizes)} runs")


def compare(task: str, data: Path, words: tuple[str, ...], home: str) -> tuple[float, float]:
    """Core-seconds of the workers of a run, as forecast and as they were."""
    verb, *more = words
    run = [verb, task, "--data", str(data), *more]
    expected = call(home, "estimate", *run)["forecast"]["core_hours"]
    call(home, *run, "--name", "run")
    runs = call(home, "cost")["runs"]
    return expected * 3600, sum(run["core_hours"] for run in runs) * 3600


def call(home: str, *words: str) -> dict[str, Any]:
    """The result of a verb."""
    command = [sys.executable, "-m", "jobs.cli", *words, "--quiet"]
    environment = {**os.environ, "RAYLAB_HOME": home, "MLFLOW_TRACKING_URI": ""}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
