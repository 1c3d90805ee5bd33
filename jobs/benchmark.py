"""raylab benchmark: compare all models of a task on the same splits, or measure how a task scales with its workers.

A benchmark is a module with `arguments(parser)`, which adds its own options, and `main(args)`.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs import cli
from jobs.common import benchmark_covidnet, benchmark_icu, benchmark_scaling, home, outputs
from raylab.files import keep_out_of_git_and_uploads
from raylab.tasks import TASKS

EXAMPLE = "raylab benchmark ards --source physionet2012 --path DIR --landmarks 6 12 24 --folds 5 --out benchmark"
TEXTS = {
    benchmark_icu: "compare all models of the task on the same patient-grouped folds",
    benchmark_covidnet: "run the published COVID-Net experiment, with controls",
    benchmark_scaling: "measure samples/s, time and cost of a task on 1, 2, 4, ... workers, beside a model of more",
}


def list_benchmarks() -> dict[str, ModuleType]:
    """The benchmarks by name: of the models of every task on intensive-care data and of covidnet, and `scaling`."""
    of_tasks = {name: benchmark_icu for name, task in TASKS.items() if task.kind == "icu"}
    return {**of_tasks, "covidnet": benchmark_covidnet, "scaling": benchmark_scaling}


def arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = list_benchmarks()
    kinds = parser.add_subparsers(dest="benchmark", metavar="|".join(benchmarks), required=True)
    for name, module in benchmarks.items():
        text = TEXTS[module]
        one = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument(
            "--out", type=Path, required=True, help="directory for data, measurements and tables; a rerun continues an "
            "interrupted benchmark"
        )  # fmt: skip
        if name in TASKS:
            one.set_defaults(task=name)
            add_options_of_models(one)
        module.arguments(one)
        cli.add_plugin_option(one)
        cli.add_common_options(one, default=argparse.SUPPRESS)


def add_options_of_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", type=Path, help="directory of the raw data; for covidnet the folder of COVIDx, or "
                        "one whose lists have domains A and B")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, searches and networks (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=0, help="parallel fits on a local Ray; 0 runs them in this process; if "
        "RAY_ADDRESS is set, its cluster is used (default: 0)"
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=8, help="trials per search; of intensive-care tasks: of each "
                        "model's nested search in each fold, and 1 skips the search (default: 8)")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="recipe fields")


def main(args: argparse.Namespace) -> dict[str, Any]:
    outputs.check_directory(args.out, "--out")
    home.check_writable()
    args.out.mkdir(parents=True, exist_ok=True)
    if not any(args.out.iterdir()):
        keep_out_of_git_and_uploads(args.out)
    result: dict[str, Any] = list_benchmarks()[args.benchmark].main(args)
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
