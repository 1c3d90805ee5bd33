"""raylab benchmark: compare all models of a task on the same splits, or measure how a task scales with its workers.

A benchmark is a module with `arguments(parser)`, which adds its own options, and `main(args)`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import benchmark_ards, benchmark_covidnet, benchmark_scaling, home, outputs
from raylab.files import keep_out_of_git_and_uploads

EXAMPLE = "raylab benchmark ards --source physionet2012 --path DIR --landmarks 6 12 24 --folds 5 --out benchmark"
OF_MODELS = {"ards": benchmark_ards, "covidnet": benchmark_covidnet}
BENCHMARKS = {**OF_MODELS, "scaling": benchmark_scaling}
TEXTS = {
    "ards": "compare all models of ARDS on the same patient-grouped folds",
    "covidnet": "run the published COVID-Net experiment, with controls",
    "scaling": "measure samples/s, time and cost of a task on 1, 2, 4, ... workers, beside a model of more of them",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="benchmark", metavar="|".join(BENCHMARKS), required=True)
    for name, module in BENCHMARKS.items():
        one = kinds.add_parser(name, help=TEXTS[name], description=TEXTS[name], allow_abbrev=False)
        one.add_argument(
            "--out", type=Path, required=True, help="directory for data, measurements and tables; a rerun continues an "
            "interrupted benchmark"
        )  # fmt: skip
        if name in OF_MODELS:
            add_options_of_models(one)
        module.arguments(one)
        cli.add_common_options(one, default=argparse.SUPPRESS)


def add_options_of_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", type=Path, help="directory of the raw data; for covidnet the folder of COVIDx, or "
                        "one whose lists have domains A and B")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of splits, searches and networks (default: 0)")
    parser.add_argument(
        "--workers", type=int, default=0, help="parallel fits on a local Ray; 0 runs them in this process; if "
        "RAY_ADDRESS is set, its cluster is used (default: 0)"
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=8, help="trials per search; for ards: of each model's nested "
                        "search in each fold, and 1 skips the search (default: 8)")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="PATH=VALUE", help="recipe fields")


def main(args: argparse.Namespace) -> dict[str, Any]:
    outputs.check_directory(args.out, "--out")
    home.check_writable()
    args.out.mkdir(parents=True, exist_ok=True)
    if not any(args.out.iterdir()):
        keep_out_of_git_and_uploads(args.out)
    result: dict[str, Any] = BENCHMARKS[args.benchmark].main(args)
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["benchmark", *sys.argv[1:]]))
