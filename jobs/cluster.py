"""raylab cluster: a Ray cluster on Slurm: up, status, down, tunnel, env, submit, logs, stop, resume."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from cluster import client, sites
from cluster.directory import Directory, find
from cluster.slurm import Slurm
from jobs import cli, home
from jobs.progress import duration, say
from tracking import runs

EXAMPLE = "raylab cluster up --site testbed --min 0 --max 3 --wait"
CODE = Path(__file__).resolve().parents[1]
WAIT_SECONDS = 24 * 3600.0


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="do", metavar="up|status|down|tunnel|env|submit|logs|stop|resume", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("--name", help="of the cluster; the only one of this RAYLAB_HOME otherwise")
        return one

    up = verb("up", "submit the head as a Slurm job; it submits workers as work asks for them")
    up.add_argument("--site", required=True, help="a section of sites.toml")
    up.add_argument("--min", type=int, default=0, help="nodes kept, of the first type (0)")
    up.add_argument("--max", type=int, default=8, help="nodes at the most, of all types together (8)")
    up.add_argument("--node-type", nargs="+", default=[], metavar="TYPE", help="of the site; its first otherwise")
    up.add_argument("--time", help="limit of each job, e.g. 02:00:00; the site's otherwise")
    up.add_argument("--static", type=int, metavar="N", help="one allocation of N nodes that neither grows nor shrinks")
    up.add_argument("--dry-run", action="store_true", help="print every script and configuration, submit nothing")
    up.add_argument("--wait", action="store_true", help="until it is ready")
    verb("status", "nodes, resources, demand, Slurm's reasons, running jobs")
    verb("down", "end everything of this cluster, and nothing else")


def main(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = DO[args.do](args)
    return result


def do_up(args: argparse.Namespace) -> dict[str, Any]:
    site = sites.site(args.site)
    where = home.home()
    name = args.name or "ray"
    asked = client.ask(
        site=site,
        home=where,
        code=CODE,
        name=name,
        low=args.min,
        high=args.max,
        types=args.node_type,
        time=args.time,
        static=args.static,
        revision=runs.code_revision(CODE),
        tracking=os.environ.get("MLFLOW_TRACKING_URI", ""),
        hooks=hooks(name),
        python=sys.executable,
    )
    if args.dry_run:
        texts = client.dry_run(asked, where / "clusters" / name)
        for file, text in texts.items():
            say(f"# ---- {file}\n{text}")
        return {"name": name, "texts": texts}
    slurm = client.commands(site.name)
    directory, job = client.up(asked, where, slurm)
    if not args.quiet:
        say(f"cluster {name}: the head is job {job} of site {site.name}")
    result: dict[str, Any] = {"name": name, "job": job, "directory": str(directory.path)}
    if args.wait:
        began = time.monotonic()
        result |= client.wait(directory, slurm, WAIT_SECONDS, lambda text: None if args.quiet else say(text))
        if not args.quiet:
            say(f"ready after {time.monotonic() - began:.0f} s on {result['head']['node']}")
    if not args.quiet:
        option = "" if args.name is None else f" --name {name}"
        say(f"next: raylab cluster status{option}        raylab cluster down{option}")
        say(f"      raylab cluster submit{option} -- python -m jobs.train ards --data DIR --workers 1:{args.max}")
        say(f'      eval "$(raylab cluster env{option})"   for `ray job submit` as it is')
    return result


def hooks(name: str) -> dict[str, Any]:
    """What the head runs beside Ray: `cluster` knows of no model and no MLflow, so it is told here."""
    return {"services": {}, "ready": [], "leave": []}


def do_status(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    found = client.status(directory, _slurm(directory))
    if not args.quiet and args.json is None:
        tell(found)
    return found


def tell(found: dict[str, Any]) -> None:
    """`status` for a person."""
    head = found["head"]
    where = f", head on {head['node']} (start {head['epoch'] + 1})" if head else ""
    say(f"cluster {found['name']} at {found['site']}: {found['state']}{where}")
    for job in found["jobs"]:
        left = "" if job["seconds_left"] is None else f"{duration(job['seconds_left'])} left"
        what = f"{job['type'] or job['kind']:8} {job['state']:10} {job['node']:12}"
        say(f"  job {job['job']:>8}  {what} {left}{job['why']}")
    for node in found["nodes"]:
        used = "  ".join(f"{name} {a:g}/{b:g}" for name, (a, b) in node["resources"].items())
        say(f"  node {node['ip']:>15}  {node['type']:8} {node['state']:10} {used}")
    for wait in found["demand"]:
        asked = " + ".join(f"{amount:g} {name}" for name, amount in wait["bundle"].items())
        say(f"  demand: {wait['count']} x ({asked})")
    for job in found["ray_jobs"]:
        say(f"  ray job {job['id']}: {job['status'].lower()}  {job['entrypoint']}")
    for problem in found["problems"]:
        say(f"  a node did not come up (job {problem['job']}): {problem['text']}")


def do_down(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    done = client.down(directory, _slurm(directory))
    if not args.quiet:
        say(f"cluster {done['name']} is down: {len(done['ended'])} job(s) ended")
    return done


def _slurm(directory: Directory) -> Slurm:
    return client.commands(directory.asked["site"]["name"])


DO = {"up": do_up, "status": do_status, "down": do_down}


if __name__ == "__main__":
    sys.exit(cli.main(["cluster", *sys.argv[1:]]))
