"""raylab transfer: `train` with a parent, so that MLflow shows where the weights came from."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli, train
from jobs.common import home
from raylab.config.assignments import parse_assignments
from raylab.config.overrides import override
from raylab.errors import DataError
from raylab.training.run import read_model

EXAMPLE = "raylab transfer covidnet --from covidnet-a --data prepared/b"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task")
    parser.add_argument("--from", dest="parent", required=True, metavar="RUN", help="the run that gives the weights")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared directory of the new domain")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE")
    parser.add_argument("--workers", metavar="N|MIN:MAX")
    parser.add_argument("--name")


def main(args: argparse.Namespace) -> dict[str, Any]:
    parent = home.find(args.parent)
    _, recipe, _, _ = read_model(parent)  # the parent's recipe: its network, so that the weights fit
    if recipe.task != args.task:
        raise DataError(f"run {parent.name} is of task '{recipe.task}', not '{args.task}'")
    settings = parse_assignments(args.set)
    if args.workers is not None:
        settings["scaling.workers"] = args.workers
    return train.start(override(recipe, settings), args.data.absolute(), args.name, parent, args.quiet, kind="transfer")


if __name__ == "__main__":
    sys.exit(cli.main(["transfer", *sys.argv[1:]]))
