"""raylab completion: print the script with which a shell completes verbs, options and files.

In bash also runs, recipe fields and models (jobs/common/completers.py).
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import shtab

from jobs import cli
from jobs.common import completers
from jobs.common.console import say
from raylab.tasks import TASKS

EXAMPLE = "raylab completion bash > ~/.local/share/bash-completion/completions/raylab"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.shell == "bash":
        script = shtab.complete(complete_parser(), "bash", preamble=completers.render_functions()) + completers.LAST
    else:
        script = shtab.complete(complete_parser(), args.shell)
    if not args.quiet:
        say(script)
    return {"shell": args.shell, "script": script}


def complete_parser() -> argparse.ArgumentParser:
    """One parser for all verbs, whose arguments say how they are completed."""
    parser = argparse.ArgumentParser(prog="raylab")
    verbs = parser.add_subparsers()
    for verb, text in cli.VERBS.items():
        cli.add_arguments(verbs.add_parser(verb, help=text), verb)
    _mark_arguments(parser)
    return parser


def _mark_arguments(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark_arguments(child)
        elif action.dest == "task":
            action.choices = action.choices or list(TASKS)
        elif how := _find_completer(action):
            action.complete = how  # type: ignore[attr-defined]


def _find_completer(action: argparse.Action) -> Mapping[str, object] | None:
    """How shtab completes an argument; None if nothing is known about its values."""
    if action.type is Path:
        return shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    if action.metavar == "RUN":
        return {"bash": completers.RUNS}
    if action.metavar in ("PATH=VALUE", "PATH=DIST"):
        return {"bash": completers.FIELDS}
    if action.dest in ("model", "models", "names"):
        return {"bash": completers.MODELS}
    return None


if __name__ == "__main__":
    sys.exit(cli.main(["completion", *sys.argv[1:]]))
