"""raylab doctor: what would keep clusters from starting, saving and ending at a site, and what to do about it."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from cluster import client, scripts, sites
from cluster.doctor import node_checks, site_checks
from cluster.doctor.node_checks import Finding, attempt
from cluster.slurm import Slurm
from jobs import cli
from jobs.common import home
from jobs.common.progress import say
from raylab.errors import UsageError
from tracking import runs
from tracking.access import login

EXAMPLE = "raylab doctor --site testbed"
CODE = Path(__file__).resolve().parents[1]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", help="a section of sites.toml")
    parser.add_argument("--nodes", type=int, default=2, help="of the site's first node type to look at (2)")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds in the queue for each node type (60)")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # on a node: what the login node knows, as JSON


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.here is not None:
        return on_node(json.loads(args.here))
    if args.site is None:
        raise UsageError("doctor needs --site", do=f"for example: {EXAMPLE}")
    if args.nodes < 1:
        raise UsageError(f"--nodes {args.nodes}: at least one", do="--nodes 2")
    findings = []
    for finding in look(args):
        findings.append(finding)
        if not args.quiet:
            say(line(finding))
    bad = sum(not finding.ok for finding in findings)
    if not args.quiet:
        say(f"{len(findings)} checks, {bad} with something to do" if bad else f"{len(findings)} checks, all well")
    return {
        "site": args.site,
        "ok": not bad,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "exit_code": int(bad > 0),
    }


def look(args: argparse.Namespace) -> Any:
    """All findings on a site; its blanks alone, while it has any."""
    if blanks := sites.blanks(args.site):
        for key, text in blanks.items():
            yield Finding(f"`{key}` of site {args.site} is blank: {text}", False, f"write it into {sites.own_file()}")
        return
    site = sites.site(args.site)
    yield Finding(f"site {site.name} has no blanks")
    tracking = login.tracking_uri()
    python = client.python_of(site, sys.executable)
    command = [python, "-m", "jobs.doctor", "--here"]
    slurm = Slurm()
    files = login.files(tracking, scripts.LOGIN)
    yield from site_checks.examine(site, home.home(), CODE, slurm, command, tracking, args.nodes, args.wait, files)


def on_node(facts: dict[str, Any]) -> dict[str, Any]:
    """The node's part: says its time at once, and then its findings."""
    print(site_checks.answer(time=time.time()), flush=True)
    findings = [*node_checks.here(facts), mlflow(facts["tracking"])]
    print(site_checks.answer(findings=[dataclasses.asdict(finding) for finding in findings]), flush=True)
    return {}


def mlflow(uri: str) -> Finding:
    """Does the tracking server answer from here, by the name that we know it by?"""
    if not uri:
        return Finding("MLflow: the head runs a server of its own (MLFLOW_TRACKING_URI is not set)")
    return attempt(f"MLflow answers at {uri}", lambda: runs.check(uri))


def line(finding: Finding) -> str:
    return f"ok  {finding.what}" if finding.ok else f"!!  {finding.what}: {finding.do}"


if __name__ == "__main__":
    sys.exit(cli.main(["doctor", *sys.argv[1:]]))
