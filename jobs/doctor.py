"""raylab doctor: check whether clusters can start, save and end at a site, and say how to fix what prevents it."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cluster import client, scripts, sites
from cluster.doctor import first_look, node_checks, site_checks
from cluster.doctor.node_checks import Finding, attempt
from cluster.slurm import Slurm
from jobs import cli
from jobs.common import home
from jobs.common.console import say
from raylab.errors import UsageError
from tracking import runs
from tracking.access import login

EXAMPLE = "raylab doctor --site testbed"
CODE = Path(__file__).resolve().parents[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", help="a section of sites.toml")
    add_check_options(parser)
    parser.add_argument("--here", help=argparse.SUPPRESS)  # on a node: facts from the login node, as JSON


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Options of a check, for `doctor` and `site check`."""
    parser.add_argument("--nodes", type=int, default=2,
                        help="nodes of the site's first type to check (default: 2)")  # fmt: skip
    parser.add_argument("--wait", type=float, default=60.0,
                        help="seconds to wait in the queue for each node type (default: 60)")  # fmt: skip


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.here is not None:
        return check_node(json.loads(args.here))
    if args.site is None:
        raise UsageError("--site is missing", do=f"for example: {EXAMPLE}")
    return check_site(args)


def check_site(args: argparse.Namespace) -> dict[str, Any]:
    """Run all checks of `args.site` and print the findings; the result of the verb."""
    if args.nodes < 1:
        raise UsageError(f"--nodes is {args.nodes}, but must be at least 1", do="--nodes 2")
    findings = []
    for finding in examine(args):
        findings.append(finding)
        if not args.quiet:
            say(format_finding(finding))
    bad = sum(not finding.ok for finding in findings)
    if not args.quiet:
        say(f"{len(findings)} checks, {bad} failed" if bad else f"{len(findings)} checks passed")
    return {
        "site": args.site,
        "ok": not bad,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "exit_code": int(bad > 0),
    }


def examine(args: argparse.Namespace) -> Iterator[Finding]:
    """Yield all findings on a site; only its blank settings while it has any."""
    if blanks := sites.blanks(args.site):
        for key, text in blanks.items():
            yield Finding(f"`{key}` of site {args.site} is blank: {text}", False, f"write it into {sites.own_file()}")
        return
    site = sites.site(args.site)
    yield Finding(f"site {site.name} has no blanks")
    tracking = login.tracking_uri()
    python = client.python_of(site, sys.executable)
    command = [python, "-m", "cluster.doctor.first_look", "jobs.doctor", "--here"]
    slurm = Slurm()
    files = login.files(tracking, scripts.LOGIN)
    yield from site_checks.examine(site, home.home(), CODE, slurm, command, tracking, args.nodes, args.wait, files)


def check_node(facts: dict[str, Any]) -> dict[str, Any]:
    """Run the checks of a compute node: print its time immediately, then its findings."""
    print(first_look.answer(time=time.time()), flush=True)
    findings = [*node_checks.here(facts), check_mlflow(facts["tracking"])]
    print(first_look.answer(findings=[dataclasses.asdict(finding) for finding in findings]), flush=True)
    return {}


def check_mlflow(uri: str) -> Finding:
    """Check that the tracking server answers this node at the address `uri`."""
    if not uri:
        return Finding("MLflow: the head runs its own server (MLFLOW_TRACKING_URI is not set)")
    return attempt(f"MLflow answers at {uri}", lambda: runs.check(uri))


def format_finding(finding: Finding) -> str:
    return f"ok  {finding.what}" if finding.ok else f"!!  {finding.what}: {finding.do}"


if __name__ == "__main__":
    sys.exit(cli.main(["doctor", *sys.argv[1:]]))
