"""Compare forecasts of runs with what the runs then cost, each measured right before its run.

    python benchmarks/forecast.py --ards DIR [--covidnet DIR]

DIR is a prepared directory. Each run trains in this process, as with `--workers 0`, without scores, plots and MLflow,
which no worker pays. Printed are the seconds that `raylab estimate` would forecast, those that the run took, and the
median of the relative errors: in CPU time, because a busy machine changes wall times from one minute to the next, or
with --wall in wall time, which is what is billed. Early stopping is off, so that forecasts are no upper limits.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.common.forecast import measure, run_seconds
from jobs.common.training import inspect
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.tasks.recipes import shipped_recipe
from raylab.training.run import execute, load_samples

ARDS: dict[str, dict[str, Any]] = {
    "gru": {"loop.epochs": 24},
    "gru, short": {"loop.epochs": 12},
    "gru, 64 units": {"loop.epochs": 20, "model.hidden": 64},
    "gru, batch 32": {"loop.epochs": 20, "loop.global_batch_size": 32},
    "gru, batch 512": {"loop.epochs": 30, "loop.global_batch_size": 512},
    "gru, 8 shards": {"loop.epochs": 24, "loop.shards": 8},
    "gru, average": {"loop.epochs": 24, "loop.ema_decay": 0.9, "model.dropout": 0.2},
    "gru, checkpoints": {"loop.epochs": 24, "loop.checkpoint_steps": 5},
    "grud": {"loop.epochs": 10, "model.name": "grud"},
    "boosting": {"model.name": "boosting"},
}
COVIDNET = {
    "covidnet": {"loop.epochs": 6},
    "covidnet, batch 8": {"loop.epochs": 4, "loop.global_batch_size": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ards", type=Path, required=True)
    parser.add_argument("--covidnet", type=Path)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    clock = time.monotonic if options.wall else time.process_time
    cases = [(name, shipped_recipe("ards"), settings, options.ards) for name, settings in ARDS.items()]
    if options.covidnet is not None:
        small = shipped_recipe("covidnet", smoke=True)
        cases += [(name, small, settings, options.covidnet) for name, settings in COVIDNET.items()]
    errors = []
    print(f"{'run':20} {'forecast':>10} {'actual':>10} {'error':>7}   seconds; load")
    compare(shipped_recipe("ards", smoke=True), options.ards.absolute(), clock)  # imports what is imported once
    for name, recipe, settings, data in cases:
        expected, actual = compare(override(recipe, settings), data.absolute(), clock)
        errors.append(expected / actual - 1)
        print(f"{name:20} {expected:10.2f} {actual:10.2f} {errors[-1]:+7.1%}   {os.getloadavg()[0]:.1f}", flush=True)
    sizes = [abs(error) for error in errors]
    print(f"median error {statistics.median(sizes):.1%}, largest {max(sizes):.1%}, of {len(sizes)} runs")


def compare(recipe: Recipe, data: Path, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a run, as forecast and as they were."""
    work = inspect(recipe, data)
    expected = run_seconds(measure(recipe, data, work, clock), recipe, work, workers=1)
    with tempfile.TemporaryDirectory() as directory:
        began = clock()
        execute(recipe, *load_samples(recipe, data), Path(directory), lambda rows: 0)
        return expected, clock() - began


if __name__ == "__main__":
    main()
