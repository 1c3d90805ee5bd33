"""raylab resume: continue an interrupted run or search from its own recipe, data and checkpoints."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli, tune
from jobs.common import home, run_tracking, training
from jobs.common.console import open_screen
from jobs.common.environment import verb_environment
from jobs.common.results import Run, RunReference, find_run
from jobs.common.workers import start_workers
from raylab.errors import DataError, UsageError
from raylab.tasks import find_task
from raylab.tasks.recipes import read_recipe
from raylab.training.run_record import RESUMABLE

EXAMPLE = "raylab resume NAME"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RUN", help="name, MLflow run id or directory of a run or search")


def main(args: argparse.Namespace) -> dict[str, Any]:
    return resume(args.name, quiet=args.quiet).details


@verb_environment()
def resume(run: RunReference, *, quiet: bool = False) -> Run:
    """Continue an interrupted run or search to its end; the result is the same as without the interruption.

    Raises UsageError if its verb does not train, DataError if its data has changed, and RunError if it fails again.
    """
    directory = find_run(run)
    home.check_writable(directory)
    run_record = home.note(directory)
    if run_record.kind not in RESUMABLE:
        raise UsageError(
            f"{directory.name} is not a training run or search, but a run of '{run_record.kind}'",
            "simulate, fit and benchmark continue from existing results",
            "run the same command again",
        )
    recipe, data = read_recipe(directory / "recipe.json"), Path(run_record.data)
    if find_task(recipe.task).read_meta(data).data_hash != run_record.data_hash:
        raise DataError(
            f"{data} is no longer the data with which {directory.name} started",
            "its data hash differs, so the result would not be that of an undisturbed run",
            f"restore the data, or start a new run: raylab {run_record.kind} {recipe.task} --data {data}",
        )
    with open_screen(quiet, f"{directory.name}: resuming"), run_tracking.reopen_run(directory) as forwarder:
        if run_record.kind == "tune":
            return Run.of(tune.continue_search(directory, recipe, data, forwarder, quiet))
        parent = home.require_parent(run_record)
        with start_workers(recipe) as workers:
            work = training.inspect(recipe, data)
            return Run.of(training.continue_run(directory, recipe, data, parent, quiet, workers, work))


if __name__ == "__main__":
    sys.exit(cli.main(["resume", *sys.argv[1:]]))
