"""raylab site: write a site section from what Slurm says, and check a site."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster import new_site, sites
from cluster.slurm import Slurm
from jobs import cli, doctor
from jobs.common.console import say
from raylab.errors import DataError
from raylab.storage import explain_storage_error

EXAMPLE = "raylab site new ours"


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="do", metavar="new|check", required=True)
    texts = {
        "new": "ask Slurm about a partition and write a site section into your own sites file",
        "check": "check whether clusters can run at a site, like raylab doctor",
    }
    parsers = {}
    for name, text in texts.items():
        parsers[name] = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        cli.add_common_options(parsers[name], default=argparse.SUPPRESS)
    new, check = parsers["new"], parsers["check"]
    new.add_argument("name", metavar="NAME", help="name of the new section")
    new.add_argument("--partition", help="partition of the nodes (default: Slurm's default partition)")
    check.add_argument("site", metavar="SITE", help="a section of sites.toml")
    doctor.add_check_options(check)


def main(args: argparse.Namespace) -> dict[str, Any]:
    return doctor.check_site(args) if args.do == "check" else create_site(args)


def create_site(args: argparse.Namespace) -> dict[str, Any]:
    """Write the section `args.name`; returns its file, text and blanks."""
    path = sites.own_file()
    new_site.check_name(path, args.name)
    facts = new_site.ask(Slurm(), args.partition)
    modules = os.environ.get("LOADEDMODULES", "")
    section = new_site.render_section(args.name, facts, modules, time.strftime("%Y-%m-%d"))
    write(path, args.name, section)
    blanks = sites.blanks(args.name)
    if not args.quiet:
        say(f"{section}\nwritten to {path}")
        for key, text in blanks.items():
            say(f"fill in `{key}` there: {text}")
        say(f"next: raylab site check {args.name}")
    return {"site": args.name, "file": str(path), "section": section, "blanks": blanks}


def write(path: Path, name: str, section: str) -> None:
    try:
        new_site.add_section(path, name, section)
    except OSError as error:
        raise explain_storage_error(error, str(path)) or DataError(f"{path} cannot be written", str(error)) from error


if __name__ == "__main__":
    sys.exit(cli.main(["site", *sys.argv[1:]]))
