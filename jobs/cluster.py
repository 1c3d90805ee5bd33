"""raylab cluster: manage a Ray cluster on Slurm: up, status, down, tunnel, env, submit, logs, stop, resume."""

import argparse
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import client, relay, scripts, sites
from cluster.directory import Directory, find
from cluster.node import head
from cluster.slurm import Slurm
from cluster.spec import ClusterSpec, Hooks
from jobs import cli
from jobs.common import budget, home
from jobs.common.console import say
from jobs.common.duration import duration
from jobs.common.environment import verb_environment
from jobs.common.submitted import Cluster, Process, Submission, ThisMachine
from raylab import loopback
from raylab.errors import RunError, SlurmError, UsageError
from raylab.tasks.recipes import read_recipe
from raylab.training import ledger
from raylab.training.run_record import RunRecord
from tracking import runs
from tracking.access import identity, login, secret

EXAMPLE = "raylab cluster up --site testbed --min 0 --max 3 --wait"
CODE = Path(__file__).resolve().parents[1]
LINK = "open it in Chrome, Edge or Firefox within 15 minutes; it works once; `raylab cluster tunnel` prints a new link"
WAIT_SECONDS = 24 * 3600.0
LOST_SECONDS = 60.0  # in which a head whose Ray does not answer any more has gone, on a busy node
APPEAR_SECONDS = 120.0  # in which a job that was submitted, or that a new head resumes, is in the cluster's status


def arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="do", metavar="up|status|down|tunnel|env|submit|logs|stop|resume", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        cli.add_common_options(one, default=argparse.SUPPRESS)
        default = "ray" if name == "up" else "the only one of this RAYLAB_HOME"
        one.add_argument("--name", help=f"name of the cluster (default: {default})")
        return one

    up = verb("up", "submit the head as a Slurm job; it submits workers on demand")
    up.add_argument("--site", required=True, help="a section of sites.toml")
    up.add_argument("--min", type=int, default=0, help="minimum number of nodes, of the first type (default: 0)")
    up.add_argument("--max", type=int, default=8, help="maximum number of nodes of all types together (default: 8)")
    up.add_argument("--node-type", nargs="+", default=[], metavar="TYPE",
                    help="node types of the site (default: its first)")  # fmt: skip
    up.add_argument("--time", help="time limit of each job, e.g. 02:00:00 (default: the site's)")
    up.add_argument("--static", type=int, metavar="N", help="one allocation of N nodes that never grows or shrinks")
    up.add_argument("--dedicated-head", action="store_true",
                    help="give the head a node of its own, where nodes are allocated whole (whole_nodes)")  # fmt: skip
    up.add_argument("--dry-run", action="store_true", help="print all scripts and configurations, submit nothing")
    up.add_argument("--wait", action="store_true", help="wait until the cluster is ready")
    verb("status", "print nodes, resources, demand, Slurm's reasons and running jobs")
    verb("down", "end all jobs and processes of this cluster, and nothing else")
    verb("tunnel", "forward dashboard, job API and MLflow to loopback ports of this machine").add_argument(
        "--stop", action="store_true", help="stop the relay"
    )
    verb("env", "print shell lines for eval that make `ray job submit` work here")
    submit = verb("submit", "run a command on the cluster: submit -- python -m jobs.train ...")
    submit.add_argument("--detach", action="store_true", help="do not follow the output")
    submit.add_argument("command", nargs="+", metavar="CMD", help="the command and its arguments")
    logs = verb("logs", "print the output of a submitted command")
    logs.add_argument("job", metavar="JOB", help="id that `submit` printed")
    logs.add_argument("--follow", action="store_true", help="follow the output until the command ends")
    stop = verb("stop", "stop a submitted command; its run can be resumed")
    stop.add_argument("job", metavar="JOB", help="id that `submit` printed")
    resume = verb("resume", "resume interrupted runs of this cluster")
    resume.add_argument("runs", nargs="*", metavar="RUN", help="runs to resume (default: all)")
    hold = verb("hold", "wait until every run of this cluster has saved and stopped, as the head does before it ends")
    hold.add_argument("--seconds", type=float, default=60.0, help="maximum waiting time (default: 60)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = DO[args.do](args)
    return result


def describe_cluster(
    site: str,
    name: str,
    low: int,
    high: int,
    types: Sequence[str],
    time: str | None,
    static: int | None = None,
    dedicated_head: bool = False,
) -> tuple[ClusterSpec, dict[str, str]]:
    """The specification of a new cluster of this home, and the secrets that go into its directory."""
    found, where = sites.site(site), home.home()
    tracking = tracking_for_nodes(where)
    files = login.files(tracking, scripts.LOGIN)
    spec = client.make_spec(
        site=found,
        home=where,
        code=CODE,
        name=name,
        low=low,
        high=high,
        types=list(types),
        time=time,
        static=static,
        revision=runs.code_revision(CODE),
        tracking=tracking,
        hooks=hooks(name, tracking, client.python_of(found, sys.executable)),
        python=sys.executable,
        login=bool(files),
        group=os.environ.get(home.GROUP, ""),
        dedicated_head=dedicated_head,
    )
    return spec, files


def do_up(args: argparse.Namespace) -> dict[str, Any]:
    nodes = (args.min, args.max, args.node_type, args.time, args.static, args.dedicated_head)
    spec, files = describe_cluster(args.site, args.name or "ray", *nodes)
    where, name, site = home.home(), spec.name, spec.site
    if args.dry_run:
        texts = client.dry_run(spec, where / "clusters" / name)
        for file, text in texts.items():
            say(f"# ---- {file}\n{text}")
        return {"name": name, "texts": texts}
    slurm = Slurm()
    directory, job = client.up(spec, where, slurm, files)
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


def tracking_for_nodes(where: Path) -> str:
    """MLFLOW_TRACKING_URI for the nodes of a cluster; "" if its head serves the home's own MLflow."""
    uri = login.tracking_uri()
    if not identity.is_local(uri):
        return uri
    if runs.address(where) == runs.database_uri(runs.database(where)):  # the home's own MLflow: the head serves it
        return ""
    raise UsageError(
        f"MLFLOW_TRACKING_URI is {uri}, a port of this machine",
        "on a compute node the same address is a different port, which any user there may have opened",
        "unset MLFLOW_TRACKING_URI (the head then runs its own MLflow server), or use the server's host name",
    )


def hooks(name: str, tracking: str, python: str) -> Hooks:
    """The services and commands that the head runs besides Ray."""
    raylab = [python, "-m", "jobs.cli"]
    services = {"sync": [*raylab, "sync", "--follow"]}
    if not tracking:
        services["mlflow"] = [*raylab, "ui", "--quiet", "--port", head.PORT]
    return Hooks(
        services=services,
        requeue=[*raylab, "cluster", "resume", "--name", name],
        drain=[*raylab, "cluster", "hold", "--name", name],
    )


def do_status(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    status = client.status(directory, Slurm())
    if not args.quiet and args.json is None:
        tell(status)
    return status


def tell(status: dict[str, Any]) -> None:
    """Print the status of a cluster."""
    head = status["head"]
    where = f", head on {head['node']} (start {head['generation'] + 1})" if head else ""
    say(f"cluster {status['name']} at {status['site']}: {status['state']}{where}")
    for job in status["jobs"]:
        left = "" if job["seconds_left"] is None else f"{duration(job['seconds_left'])} left"
        what = "+".join(filter(None, (job["kind"] if job["kind"] == "head" else "", job["type"])))
        what = f"{what:8} {job['state']:10} {job['node']:12}"
        say(f"  job {job['job']:>8}  {what} {left}{job['why']}")
    for node in status["nodes"]:
        used = "  ".join(f"{name} {a:g}/{b:g}" for name, (a, b) in node["resources"].items())
        say(f"  node {node['ip']:>15}  {node['type']:8} {node['state']:10} {used}")
    for wait in status["demand"]:
        bundle = " + ".join(f"{amount:g} {name}" for name, amount in wait["bundle"].items())
        say(f"  demand: {wait['count']} x ({bundle})")
    for job in status["ray_jobs"]:
        say(f"  ray job {job['id']}: {job['status'].lower()}  {job['entrypoint']}")
    for problem in status["problems"]:
        say(f"  a node did not start (job {problem['job']}): {problem['text']}")


def do_down(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    relay.stop(directory)
    done = client.down(directory, Slurm())
    if not args.quiet:
        say(f"cluster {done['name']} is down: {len(done['ended'])} job(s) ended")
    return done


def do_tunnel(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    if args.stop:
        relay.stop(directory)
        return {"stopped": True}
    spec, here = directory.spec, directory.read("head")
    token = secret.create(Path(spec.home))
    if here is not None and spec.site.ssh:
        ways = {"8265": here["dashboard"].rpartition(":")[2]} | {str(p): str(p) for p in here["ports"].values()}
        options = " ".join(f"-L {near}:127.0.0.1:{far}" for near, far in ways.items())
        line = f"ssh -N {options} {here['node']}"
        say(line)
        over_ssh = {"ssh": line}
        if "mlflow" in here["ports"]:
            over_ssh["mlflow"] = secret.link(token, here["ports"]["mlflow"])
            say(f"MLflow, once that command is running: {over_ssh['mlflow']}\n{LINK}")
        return over_ssh
    running = relay.start(directory)
    ports = running["ports"]
    say(f"dashboard and job API: http://127.0.0.1:{ports['dashboard']}   (they require the token)")
    link = "" if spec.tracking else secret.link(token, ports["mlflow"])
    if link:
        say(f"MLflow: {link}\n{LINK}")
    forwards = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports.values())
    say(f"from another computer, first run: ssh -N {forwards} {socket.gethostname()}")
    return {"ports": ports, **({"mlflow": link} if link else {})}


def reach(directory: Directory) -> dict[str, str]:
    """The environment in which Ray and MLflow commands connect to the cluster, from its head or through the relay."""
    spec, here = directory.spec, directory.read("head")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(directory.token)}
    if here is not None and os.environ.get("RAY_ADDRESS") == here["address"]:
        return token | {"RAY_API_SERVER_ADDRESS": here["dashboard"]}
    ports = relay.start(directory)["ports"]
    if spec.tracking:
        mlflow = {"MLFLOW_TRACKING_URI": spec.tracking}
    else:  # with a check of the server's identity, because another user may later listen on this port
        mlflow = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
            "MLFLOW_TRACKING_AUTH": identity.AUTH,
            secret.ENVIRONMENT: str(secret.path(Path(spec.home))),
        }
    return token | mlflow | {
        "RAY_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard']}",
        **scripts.login(spec.login, directory.path),
        "RAYLAB_HOME": spec.home,
        **({home.GROUP: spec.group} if spec.group else {}),
        **loopback.no_proxy(dict(os.environ)),
    }  # fmt: skip


def do_env(args: argparse.Namespace) -> dict[str, Any]:
    environment = reach(find(home.home(), args.name))
    for name, value in environment.items():
        say(f"export {name}={shlex.quote(value)}")
    return environment


@verb_environment()
def cluster(
    site: str | None = None,
    *,
    name: str = "ray",
    min: int = 0,
    max: int = 8,
    node_types: Sequence[str] = (),
    time: str | None = None,
) -> Cluster:
    """Where `submit` starts runs that outlive this process: a Ray cluster on Slurm or, without `site`, this machine.

    The cluster `name` of this home is used if it is up, and brought up else, with `min` to `max` nodes of `node_types`
    (default: the site's first) and jobs of at most `time` (default: the site's); returns when it is ready. Raises
    UsageError for an unknown or incomplete site, or if the cluster of this name is at another one, and SlurmError if it
    does not start.
    """
    if site is None:
        return ThisMachine()
    slurm = Slurm()
    directory = Directory(home.home() / "clusters" / name)
    if (directory.path / "cluster.json").is_file() and client.jobs(directory, slurm):
        spec = directory.spec
        if spec.site.name != site:
            raise UsageError(
                f"cluster '{name}' is at site '{spec.site.name}', not '{site}'",
                do="choose another name for the other site",
            )
        if (spec.min, spec.max) != (min, max):
            say(f"cluster {name} is up with {spec.min} to {spec.max} nodes; for {min} to {max}, end it first: down()")
    else:
        spec, files = describe_cluster(site, name, min, max, node_types, time)
        directory, job = client.up(spec, home.home(), slurm, files)
        say(f"cluster {name}: the head is job {job} of site {site}")
    client.wait(directory, slurm, WAIT_SECONDS, say)
    return SlurmCluster(directory)


class SlurmCluster(Cluster):
    """A Ray cluster on Slurm; submitted runs are jobs of its Ray, and continue when its head comes back."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.name, self.home = directory.path.name, Path(directory.spec.home)

    def __repr__(self) -> str:
        status = self.status()
        jobs = ", ".join(f"{job['type'] or job['kind']} {job['state']}" for job in status["jobs"])
        return f"cluster {self.name} at {status['site']}: {status['state']} ({jobs})"

    def status(self) -> dict[str, Any]:
        """What `raylab cluster status --json` prints."""
        return client.status(self.directory, Slurm())

    def down(self) -> None:
        """End all jobs and processes of this cluster; its runs can be resumed on another one."""
        relay.stop(self.directory)
        client.down(self.directory, Slurm())

    def check(self, call: Submission) -> None:
        budget.check_call(call, self.directory)

    def start(self, name: str, words: list[str]) -> Process:
        while True:
            head = client.wait(self.directory, Slurm(), WAIT_SECONDS, say)["head"]  # a new one may be on its way
            try:
                return Process(job=submit(self.directory, [self.directory.spec.python, *words], follow=False)["job"])
            except (RunError, SlurmError) as error:
                is_refused = isinstance(error, RunError) and "Failed to connect" not in error.why
                if is_refused or not self._has_lost(head):
                    raise
                say("the head has ended meanwhile")

    def _has_lost(self, head: dict[str, Any]) -> bool:
        """Whether `head` is no longer there, or is about to go."""
        deadline = time.monotonic() + LOST_SECONDS
        while self.status()["head"] == head:
            if time.monotonic() > deadline:
                return False
            time.sleep(1.0)
        return True

    def is_alive(self, submission: Submission, name: str) -> bool:
        if not submission.job or not (self.directory.path / "cluster.json").is_file():
            return False
        status = self.status()
        if status["state"] != "ready":  # a head that comes back resumes what was running
            return bool(status["state"] != "down")
        if time.time() - max(submission.time, status["head"].get("since", 0.0)) < APPEAR_SECONDS:
            return True
        return any(
            job["id"] == submission.job or re.search(rf"resume {re.escape(name)}\b", job["entrypoint"])
            for job in status["ray_jobs"]
        )

    def stop(self, submission: Submission) -> None:
        ray_job(self.directory, "stop", submission.job, quiet=True)


def do_submit(args: argparse.Namespace) -> dict[str, Any]:
    command = args.command[1:] if args.command[0] == "--" else args.command
    directory = find(home.home(), args.name)
    budget.check_command(command, directory)
    return submit(directory, command, follow=not args.detach)


def submit(directory: Directory, command: list[str], follow: bool) -> dict[str, Any]:
    """Run `command` as a Ray job in this working directory, which the head shares; RunError if it fails."""
    job = f"raylab-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    entry = ["sh", "-c", f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"]
    words = ["submit", "--log-style=record", "--log-color=false", "--submission-id", job, "--no-wait", "--", *entry]
    sent = ray_job(directory, *words, quiet=True)
    if sent.returncode != 0:
        raise RunError(f"Ray rejected job {job}", (sent.stderr or sent.stdout).strip()[-300:], "raylab cluster status")
    say(f"job {job}    raylab cluster logs {job} --follow    raylab cluster stop {job}")
    if follow:
        ray_job(directory, "logs", "--log-style=record", "--log-color=false", "--follow", job)
        ended = ray_job(directory, "status", job, quiet=True)
        if "succeeded" not in (ended.stdout + ended.stderr).lower():
            raise RunError(f"job {job} failed", do=f"raylab cluster logs {job}; raylab cluster status")
    return {"job": job}


def ray_job(directory: Directory, *words: str, quiet: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run `ray job ...` on the cluster; its output is printed, or captured if `quiet`."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", *words]
    return subprocess.run(command, env={**os.environ, **reach(directory)}, capture_output=quiet, text=True)


def do_logs(args: argparse.Namespace) -> dict[str, Any]:
    code = ray_job(find(home.home(), args.name), "logs", args.job, *(["--follow"] if args.follow else [])).returncode
    return {"job": args.job, "exit_code": code}


def do_stop(args: argparse.Namespace) -> dict[str, Any]:
    return {"job": args.job, "exit_code": ray_job(find(home.home(), args.name), "stop", args.job).returncode}


def do_resume(args: argparse.Namespace) -> dict[str, Any]:
    directory = find(home.home(), args.name)
    names = args.runs or [path.name for path, _ in interrupted(directory.spec.name)]
    done = []
    for name in names:
        words = [directory.spec.python, "-m", "jobs.cli", "resume", name]
        done.append({"run": name, **submit(directory, words, follow=False)})
    if not args.quiet:
        say(f"resumed: {', '.join(names) if names else 'nothing was interrupted'}")
    return {"resumed": done}


def interrupted(cluster: str) -> list[tuple[Path, RunRecord]]:
    """Runs and searches of this home on `cluster` that neither ended nor were stopped by a user."""
    return [(path, run) for path, run in home.records() if run.cluster == cluster and run.status == "RUNNING"]


def _workers(run: Path) -> int:
    return read_recipe(run / "recipe.json").scaling.workers[1]


def do_hold(args: argparse.Namespace) -> dict[str, Any]:
    """Wait until runs have saved and stopped. Runs with workers stop when their nodes are drained; trials that train in
    their own process are not notified, so they are not waited for."""
    runs = interrupted(find(home.home(), args.name).spec.name)
    deadline = time.monotonic() + args.seconds
    waiting = [path for path, run in runs if run.kind != "tune" and _workers(path)]
    while waiting and time.monotonic() < deadline:
        ledgers = [(path, ledger.read_ledger(path / ledger.FILE)) for path in waiting]
        waiting = [path for path, entries in ledgers if entries and not ledger.is_handed_over(entries)]
        time.sleep(0.2)
    return {"still_running": [path.name for path in waiting]}


DO = {
    "up": do_up,
    "status": do_status,
    "down": do_down,
    "tunnel": do_tunnel,
    "env": do_env,
    "submit": do_submit,
    "logs": do_logs,
    "stop": do_stop,
    "resume": do_resume,
    "hold": do_hold,
}


if __name__ == "__main__":
    sys.exit(cli.main(["cluster", *sys.argv[1:]]))
