"""raylab benchmark: compare all models of a task on the same splits, in one table and one MLflow experiment.

A task's benchmark is a module with `arguments(group)`, which adds its own options, and `main(args)`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import benchmark_ards, benchmark_covidnet, home, outputs
from raylab.files import keep_out_of_git_and_uploads

EXAMPLE = "raylab benchmark ards --source physionet2012 --path DIR --landmarks 6 12 24 --folds 5 --out benchmark"
TASKS = {"ards": benchmark_ards, "covidnet": benchmark_covidnet}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for data, fits and tables; a rerun continues an interrupted "
        "benchmark"
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, searches and networks (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=0, help="parallel fits on a local Ray; 0 runs them in this process; if "
        "RAY_ADDRESS is set, its cluster is used (default: 0)"
    )  # fmt: skip
    for name, module in TASKS.items():
        module.arguments(parser.add_argument_group(name))


def main(args: argparse.Namespace) -> dict[str, Any]:
    outputs.check_directory(args.out, "--out")
    home.check_writable()
    args.out.mkdir(parents=True, exist_ok=True)
    if not any(args.out.iterdir()):
        keep_out_of_git_and_uploads(args.out)
    result: dict[str, Any] = TASKS[args.task].main(args)
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
