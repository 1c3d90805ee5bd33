"""raylab estimate: say what a run or search will cost, from 20 measured steps, and whether the budget suffices."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs import cli, train, tune
from jobs.common.place import Place

EXAMPLE = "raylab estimate train ards --data prepared/ards --site testbed --workers 2"
VERBS = {"train": train, "tune": tune}


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="do", metavar="train|tune", required=True)
    for verb, module in VERBS.items():
        text = f"print what `raylab {verb}` with the same arguments would cost, and start nothing"
        one = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        module.arguments(one)
        cli.add_common_options(one, default=argparse.SUPPRESS)
        one.add_argument("--site", help="a section of sites.toml (default: that of this home's only cluster)")
        one.add_argument("--node-type", metavar="TYPE", help="a node type of the site (default: its first)")


def estimate(words: list[str], site: str) -> dict[str, Any]:
    """The estimate of a verb with its arguments at a site."""
    parser, _ = cli.build_parser("estimate")
    return main(parser.parse_args([*words, "--site", site]))


def estimate_call(function: str, arguments: Mapping[str, Any], site: str) -> dict[str, Any]:
    """The estimate of a call of `raylab.train` or `raylab.tune` at a site."""
    verb = VERBS[function]
    recipe, is_quiet = verb.recipe_of_call(arguments), arguments.get("quiet", False)
    result: dict[str, Any] = verb.dry_run(recipe, Path(arguments["data"]), is_quiet, Place(site))
    return result


def main(args: argparse.Namespace) -> dict[str, Any]:
    verb = VERBS[args.do]
    result: dict[str, Any] = verb.dry_run(
        verb.recipe_of(args), args.data.absolute(), args.quiet, Place(args.site, args.node_type)
    )
    return result


if __name__ == "__main__":
    sys.exit(cli.main(["estimate", *sys.argv[1:]]))
