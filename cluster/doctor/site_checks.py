"""`raylab doctor`: is this site, as it is described, one on which clusters start, save and end?

What the login node can tell is looked at here, the rest by node_checks.py in a short Slurm step on a few nodes of each
type. The two talk through a directory below RAYLAB_HOME and through the step's output.
"""

import json
import os
import queue
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cluster import jobscript, scripts, sites
from cluster.directory import versions
from cluster.doctor import node_checks
from cluster.doctor.node_checks import Finding, attempt
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from cluster.slurm import Slurm
from raylab.errors import RaylabError, SlurmError
from raylab.files import atomic_write, locked

MARK = "raylab-doctor "  # begins a line of the step's output that is for us
STEP_TIME, STEP_SECONDS = "00:05:00", 120.0  # Slurm's limit of a step, and ours once it runs
CLOCK_SECONDS = 5.0
SAVE_SECONDS = 10.0  # a short one for a checkpoint to be written in


def examine(
    site: Site,
    home: Path,
    code: Path,
    slurm: Slurm,
    command: Sequence[str],
    tracking: str,
    nodes: int = 2,
    wait: float = 60.0,
    files: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Finding]:
    """Findings, as they are made. `command` runs the node's part, with its facts (JSON) as the last word.

    `files`: {name: text}, secrets that the nodes read from files of mode 0600, as those of a cluster do.
    `nodes` of the site's first node type are looked at, and one of each other type; `wait`: seconds in the queue.
    """
    yield attempt(
        f"scratch {site.scratch} and the time limit {site.time} fit", lambda: sites.check(site, home, site.time)
    )
    config = answers(slurm)
    if isinstance(config, Finding):
        yield config
        return
    yield Finding(f"Slurm {config.get('SLURM_VERSION', '')} answers")
    yield from settings(config, site)
    yield from partitions(slurm, site)
    try:
        with probe(home) as (directory, word):
            yield Finding(f"private files can be made in {home}")
            for name, text in files.items():
                with atomic_write(directory / name) as beside:
                    beside.write_text(text)
            yield try_submission(slurm, site, "head", site.head, directory)
            for kind, node in site.nodes.items():
                refused = try_submission(slurm, site, kind, node, directory)
                yield refused
                if not refused.ok:
                    continue
                count = min(nodes, node.max or nodes) if kind == next(iter(site.nodes)) else 1
                facts = {
                    "site": site.model_dump(mode="json"), "kind": kind, "nodes": count, "probe": str(directory),
                    "word": word, "versions": versions(), "tracking": tracking,
                }  # fmt: skip
                environment = {"PYTHONPATH": str(code), "RAYLAB_HOME": str(home)}
                if tracking:
                    environment["MLFLOW_TRACKING_URI"] = tracking
                    environment |= scripts.login(scripts.LOGIN in files, directory)
                for path in (path for note in node_checks.NOTES for path in directory.glob(note)):
                    path.unlink()  # of the type before
                yield from on_nodes(slurm, site, kind, count, environment, [*command, json.dumps(facts)], wait)
                if seen := sorted(path.stem.removeprefix("node-") for path in directory.glob("node-*.json")):
                    yield Finding(f"what {', '.join(seen)} wrote is seen on the login node")
    except OSError as error:
        yield Finding(f"{home} cannot be written ({error})", False, "export RAYLAB_HOME=DIRECTORY of your own")
    except RaylabError as error:
        yield Finding.of(error)


# --- on the login node ---


def answers(slurm: Slurm) -> dict[str, str] | Finding:
    """Slurm's configuration, or why it is not to be had."""
    try:
        return slurm.config()
    except SlurmError as error:
        return Finding.of(error)


def settings(config: Mapping[str, str], site: Site) -> Iterator[Finding]:
    """What of Slurm's configuration decides how nodes and jobs end here."""
    kill = _number(config.get("KillWait", ""))
    if kill < SAVE_SECONDS:
        lead = (
            "what a cancelled or preempted node has not saved by then is computed again: save often (loop.checkpoint)"
        )
        yield Finding(f"Slurm kills {kill:.0f} s after it has asked a job to end (KillWait)", False, lead)
    else:
        yield Finding(f"a job that is cancelled or preempted has {kill:.0f} s to save (KillWait)")
    track, epilog = config.get("ProctrackType", ""), config.get("Epilog", "(null)")
    if "cgroup" in track or "pgid" in track:
        yield Finding(f"{track} ends what a job has started")
    elif epilog not in ("(null)", ""):
        yield Finding(f"{track} lets daemons survive their job; the site's epilog is there to end them")
    else:
        ask = "Ray's are ended by our agent, unless that is killed: ask for proctrack/cgroup"
        yield Finding(f"{track} lets daemons survive their job", False, ask)
    if _number(config.get("JobRequeue", "1")) == 0:
        yield Finding("the site does not requeue jobs by default; ours ask for it (--requeue)")


def partitions(slurm: Slurm, site: Site) -> Iterator[Finding]:
    """Each partition that the site names: known, up, its time limit and its way of preemption."""
    named = [node.partition or site.partition for node in (site.head, *site.nodes.values())]
    for name in dict.fromkeys(part for names in named if names for part in names.split(",")):
        try:
            shown = slurm.run("scontrol", "--oneliner", "show", "partition", name)
        except RaylabError as error:
            yield Finding(
                f"Slurm does not know the partition '{name}' ({error.why})", False,
                "correct `partition` of the site; `sinfo` lists what there is",
            )  # fmt: skip
            continue
        facts = dict(re.findall(r"(\w+)=(\S+)", shown))
        yield from partition(name, facts, site)


def partition(name: str, facts: Mapping[str, str], site: Site) -> Iterator[Finding]:
    """Findings on one partition, from `scontrol show partition`."""
    if facts.get("State") != "UP":
        yield Finding(f"partition {name} is {facts.get('State', 'unknown')}", False, "`sinfo` shows which are up")
        return
    limit = facts.get("MaxTime", "UNLIMITED")
    if limit != "UNLIMITED" and sites.seconds(site.time) > sites.seconds(limit):
        yield Finding(f"partition {name} has a time limit of {limit}", False, f"set `time` of the site to {limit}")
    mode, grace = facts.get("PreemptMode", "OFF").split(",")[-1], _number(facts.get("GraceTime", "0"))
    if mode in ("SUSPEND", "GANG"):
        stop = "Ray takes a suspended node for a dead one: choose a partition whose jobs are not suspended"
        yield Finding(f"jobs in partition {name} can be suspended for others", False, stop)
    elif mode in ("REQUEUE", "CANCEL"):
        yield Finding(f"partition {name} is up; its jobs may be preempted, with {grace:.0f} s of grace before KillWait")
    else:
        yield Finding(f"partition {name} is up; its jobs are not preempted")
    oversubscribed = facts.get("OverSubscribe", "NO")
    if oversubscribed.startswith("FORCE"):
        yield Finding(f"partition {name} runs several jobs on the same cores", False, "choose another partition")


def try_submission(slurm: Slurm, site: Site, kind: str, node: NodeType, directory: Path) -> Finding:
    """Would Slurm take a job of this type, with the site's partition, account, limits? Its own words if not."""
    script = directory / f"{kind}.sbatch"
    tag = JobTag(directory.name, 0, "doctor", kind)
    script.write_text(jobscript.script(site, node, tag, "raylab-doctor", site.time, directory, {}, ["true"]))
    return attempt(f"Slurm takes jobs of type {kind}", lambda: slurm.test(script))


@contextmanager
def probe(home: Path) -> Iterator[tuple[Path, str]]:
    """A directory in which nodes see us write, and a word that stands in it; removed at the end.

    `login`: the word, 0600. `swap`: replaced again and again. `lock`: held. Raises SlurmError where files cannot be
    private.
    """
    directory, word = home / "clusters" / f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    directory.mkdir(mode=0o700, parents=True)
    done = threading.Event()

    def swap() -> None:
        letters = "ab"
        while not done.wait(0.1):
            with atomic_write(directory / "swap") as beside:
                beside.write_text(letters[0] * node_checks.LETTERS)
            letters = letters[::-1]

    writer = threading.Thread(target=swap, daemon=True)
    try:
        with atomic_write(directory / "login") as beside:
            beside.write_text(word)
        mode = (directory / "login").stat().st_mode & 0o777
        if mode != 0o600:
            raise SlurmError(
                f"a file made private in {home} has mode {mode:04o}", "its file system does not keep modes",
                "Ray's token would not be private: export RAYLAB_HOME=DIRECTORY elsewhere",
            )  # fmt: skip
        with locked(directory / "lock", wait=False):
            writer.start()
            yield directory, word
    finally:
        done.set()
        if writer.is_alive():
            writer.join()
        shutil.rmtree(directory, ignore_errors=True)


# --- on compute nodes ---


def on_nodes(
    slurm: Slurm,
    site: Site,
    kind: str,
    count: int,
    environment: Mapping[str, str],
    command: Sequence[str],
    wait: float,
) -> Iterator[Finding]:
    """Run the node's part as a step on `count` nodes of a type and merge what they say. It is gone afterwards."""
    tag = JobTag(f"doctor-{secrets.token_hex(4)}", 0, "doctor", kind)
    words = jobscript.step(
        site, site.nodes[kind], tag, "raylab-doctor", STEP_TIME, environment, command, count
    )  # fmt: skip
    if slurm.directory is not None:
        words[0] = str(slurm.directory / words[0])
    foreign = ("SLURM_", *jobscript.FOREIGN)  # of a job that we may run in ourselves, and of its Ray
    clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    try:
        process = subprocess.Popen(
            words, env=clean, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        yield Finding("srun is not there", False, "work on a login node of the site")
        return
    lines: queue.Queue[tuple[float, str] | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    try:
        yield from _listen(slurm, tag, kind, count, lines, wait)
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left = _cancel(slurm, tag)
    if left:
        yield left


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[tuple[float, str] | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((time.time(), line))
    lines.put(None)


def _listen(
    slurm: Slurm,
    tag: JobTag,
    kind: str,
    count: int,
    lines: "queue.Queue[tuple[float, str] | None]",
    wait: float,
) -> Iterator[Finding]:
    """The nodes' findings from the step's output, in which other lines are noise, shown when there is nothing else."""
    clocks: dict[str, float] = {}
    findings: dict[str, list[Finding]] = {}
    noise: list[str] = []
    deadline = time.monotonic() + wait
    while True:
        try:
            got = lines.get(timeout=max(0.1, deadline - time.monotonic()))
        except queue.Empty:
            if not clocks:
                why = _why(slurm, tag)
                longer = f"raylab doctor --wait {10 * wait:.0f}, or try later; the login node's part stands"
                yield Finding(f"no node of type {kind} within {wait:.0f} s: {why}", False, longer)
                return
            noise.append(f"no end within {STEP_SECONDS:.0f} s")
            break
        if got is None:
            break
        came, line = got
        if not line.startswith(MARK):
            noise.append(line.strip())
            continue
        note: dict[str, Any] = json.loads(line.removeprefix(MARK))
        if "time" in note:
            clocks[note["host"]] = came - note["time"]
            deadline = time.monotonic() + STEP_SECONDS
        else:
            findings[note["host"]] = [Finding(**finding) for finding in note["findings"]]
    if len(findings) < count:
        heard = " / ".join([line for line in noise if line][-3:])
        yield Finding(
            f"{count - len(findings)} of {count} nodes of type {kind} gave no answer: {heard}", False,
            "put code and environment on shared storage; correct `python`, `setup` or `image` of the site",
        )  # fmt: skip
    yield from merge_findings(findings)
    for host, apart in clocks.items():
        if abs(apart) > CLOCK_SECONDS:
            yield Finding(
                f"{host}: its clock is {apart:+.0f} s from the login node's", False, "ask for NTP on the nodes"
            )
    if clocks and all(abs(apart) <= CLOCK_SECONDS for apart in clocks.values()):
        yield Finding(f"{', '.join(sorted(clocks))}: clock within {CLOCK_SECONDS:.0f} s of the login node's")


def merge_findings(findings: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Findings of several nodes, what several say once, with their names before it."""
    hosts: dict[Finding, list[str]] = {}
    for host in sorted(findings):
        for finding in findings[host]:
            hosts.setdefault(finding, []).append(host)
    return [Finding(f"{', '.join(names)}: {one.what}", one.ok, one.do) for one, names in hosts.items()]


def answer(**facts: Any) -> str:
    """A line of the node's part."""
    return MARK + json.dumps({"host": socket.gethostname(), **facts})


def _why(slurm: Slurm, tag: JobTag) -> str:
    try:
        return next((job.why() for job in slurm.jobs() if job.comment == str(tag)), "it did not start")
    except SlurmError as error:
        return error.what


def _cancel(slurm: Slurm, tag: JobTag) -> Finding | None:
    """End the step's job, whatever became of it."""
    try:
        slurm.cancel([job.id for job in slurm.jobs() if job.comment == str(tag) and job.alive])
    except SlurmError as error:
        look = f"scancel --name raylab-doctor; by itself it ends after {STEP_TIME}"
        return Finding(f"the doctor's job may still be there ({error.what})", False, look)
    return None


def _number(text: str) -> float:
    match = re.match(r"\d+", text)
    return float(match[0]) if match else 0.0
