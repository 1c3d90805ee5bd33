"""raylab transfer: train from the weights of a parent run, which MLflow shows."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import cli, train
from jobs.common.console import open_screen
from jobs.common.environment import verb_environment
from jobs.common.results import Run, RunReference, check_task, find_run
from raylab.training.run import read_model

EXAMPLE = "raylab transfer covidnet --from covidnet-a --data prepared/b"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help="task of the parent run")
    parser.add_argument("--from", dest="parent", required=True, metavar="RUN", help="run that provides the weights")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared directory of the new domain")
    train.add_settings(parser)
    parser.add_argument(
        "--workers", metavar="N|MIN:MAX", help="number of workers (default: the recipe's); 0 trains in this process"
    )
    train.add_priority(parser)
    parser.add_argument("--name", help="name of the run (default: made from task and time)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    return transfer(
        args.parent,
        args.data,
        task=args.task,
        workers=args.workers,
        priority=args.priority,
        name=args.name,
        settings=train.parse_settings(args),
        quiet=args.quiet,
    ).details


@verb_environment()
def transfer(
    parent: RunReference,
    data: Path | str,
    *,
    task: str | None = None,
    workers: train.Workers | None = None,
    priority: float | None = None,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Train a new run on other data from the weights of run `parent`, with that run's recipe.

    `task`: DataError if the parent is of another task. The other arguments and errors are those of `train`.
    """
    directory = find_run(parent)
    with open_screen(quiet, f"{directory.name}: checking the recipe and the data"):
        _, recipe, _, _ = read_model(directory)  # the parent's recipe: its network, so that the weights fit
        check_task(directory, recipe.task, task)
        recipe = train.build_recipe(recipe, settings or {}, workers, priority=priority)
        return Run.of(train.start(recipe, Path(data).absolute(), name, directory, quiet, kind="transfer"))


if __name__ == "__main__":
    sys.exit(cli.main(["transfer", *sys.argv[1:]]))
