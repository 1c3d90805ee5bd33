"""raylab completion: print the script with which a shell completes verbs, options and files."""

import argparse
import sys
from pathlib import Path
from typing import Any

import shtab

from jobs import cli
from jobs.common.console import say

EXAMPLE = "raylab completion bash > ~/.local/share/bash-completion/completions/raylab"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)


def main(args: argparse.Namespace) -> dict[str, Any]:
    script = shtab.complete(complete_parser(), args.shell)
    if not args.quiet:
        say(script)
    return {"shell": args.shell, "script": script}


def complete_parser() -> argparse.ArgumentParser:
    """One parser for all verbs, with path arguments marked as files or directories."""
    parser = argparse.ArgumentParser(prog="raylab")
    verbs = parser.add_subparsers()
    for verb, text in cli.VERBS.items():
        cli.add_arguments(verbs.add_parser(verb, help=text), verb)
    _mark_paths(parser)
    return parser


def _mark_paths(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if action.type is Path:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _mark_paths(child)


if __name__ == "__main__":
    sys.exit(cli.main(["completion", *sys.argv[1:]]))
