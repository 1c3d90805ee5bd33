"""raylab recipe: print every field of a shipped recipe with its value and description."""

import argparse
import sys
from typing import Any

from jobs import cli
from jobs.common.console import say
from raylab.config.overrides import override
from raylab.tasks import TASKS
from raylab.tasks.recipe_page import lines
from raylab.tasks.recipes import shipped_recipe, with_search_space

EXAMPLE = "raylab recipe ards --model boosting"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help=f"one of: {', '.join(TASKS)}")
    parser.add_argument("--model", metavar="NAME", help="model (default: that of the recipe)")
    parser.add_argument("--smoke", action="store_true", help="use the task's small recipe for quick tests")


def main(args: argparse.Namespace) -> dict[str, Any]:
    recipe = shipped_recipe(args.task, args.smoke)
    if args.model is not None:
        recipe = with_search_space(override(recipe, {"model.name": args.model}))
    if not args.quiet and args.json is None:
        say("\n".join(lines(recipe)))
    return recipe.model_dump(mode="json")


if __name__ == "__main__":
    sys.exit(cli.main(["recipe", *sys.argv[1:]]))
