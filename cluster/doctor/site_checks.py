"""`raylab doctor`: check whether clusters can start, save and end on this site as it is described.

The checks of the login node are here and in slurm_checks.py, those of compute nodes in node_checks.py, which runs in a
short Slurm step on a few nodes of each type. The two communicate through a directory below RAYLAB_HOME and through the
step's output.
"""

import errno
import json
import os
import queue
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from cluster import jobscript, scripts, sites
from cluster.doctor import node_checks, slurm_checks
from cluster.doctor.first_look import MARK, join
from cluster.doctor.node_checks import Finding, attempt
from cluster.image import node_versions
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from cluster.slurm import Slurm, clean_environment
from raylab import storage
from raylab.errors import RaylabError, SlurmError
from raylab.files import atomic_write, locked

STEP_TIME, STEP_SECONDS = "00:05:00", 120.0  # time limit of the step in Slurm, and our limit once it is running
CLOCK_SECONDS = 5.0
ROOM_BYTES = 64 << 20  # of a checkpoint; a quota shows only when something is written


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
    """Yield findings as checks finish. `command` runs the node's part, with its facts (JSON) as the last argument.

    `files`: {name: text}, secrets that the nodes read from files of mode 0600, as the nodes of a cluster do.
    `nodes`: number of nodes of the site's first type to check; of each other type, one. `wait`: seconds in the queue.
    """
    yield attempt(
        f"scratch {site.scratch} and time limit {site.time} are valid", lambda: sites.check(site, home, site.time)
    )
    config = answers(slurm)
    if isinstance(config, Finding):
        yield config
        return
    yield Finding(f"Slurm {config.get('SLURM_VERSION', '')} answers")
    yield from slurm_checks.settings(config, site)
    yield from slurm_checks.partitions(slurm, site, config, datetime.now())
    yield from slurm_checks.accounting(slurm, config, site)
    submissions = {kind: try_submission(slurm, site, kind, node, home) for kind, node in sites.node_types(site).items()}
    yield from submissions.values()
    full = check_room(home, site)
    if full is not None:
        yield full
    try:
        with probe(home) as (directory, word):
            yield Finding(f"private files can be created in {home}")
            for name, text in files.items():
                with atomic_write(directory / name) as beside:
                    beside.write_text(text)
            for kind, node in site.nodes.items():
                if not submissions[kind].ok:
                    continue
                count = min(nodes, node.max or nodes) if kind == next(iter(site.nodes)) else 1
                facts = {
                    "site": site.model_dump(mode="json"),
                    "kind": kind,
                    "nodes": count,
                    "probe": str(directory),
                    "code": str(code),
                    "word": word,
                    "versions": node_versions(site),
                    "tracking": tracking,
                }
                environment = {"PYTHONPATH": str(code), "RAYLAB_HOME": str(home)}
                if tracking:
                    environment["MLFLOW_TRACKING_URI"] = tracking
                    environment |= scripts.login(scripts.LOGIN in files, directory)
                for path in (path for note in node_checks.NOTES for path in directory.glob(note)):
                    path.unlink()  # left by the previous node type
                yield from on_nodes(slurm, site, kind, count, environment, [*command, json.dumps(facts)], wait)
                if seen := sorted(path.stem.removeprefix("node-") for path in directory.glob("node-*.json")):
                    yield Finding(f"files of {', '.join(seen)} are visible on the login node")
    except OSError as error:
        if full is None:
            yield Finding(
                f"{home} cannot be written ({error})", False, "export RAYLAB_HOME=DIRECTORY, one that you own"
            )
    except RaylabError as error:
        yield Finding.of(error)


# --- on the login node ---


def answers(slurm: Slurm) -> dict[str, str] | Finding:
    """Slurm's configuration, or a finding if Slurm does not answer."""
    try:
        return slurm.config()
    except SlurmError as error:
        return Finding.of(error)


def check_room(home: Path, site: Site) -> Finding | None:
    """A finding if the disk of `home`, or its quota, has no room for a checkpoint; None otherwise."""
    try:
        storage.check_writable(home / "checkpoint", ROOM_BYTES)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return None  # the probe reports it
        why = storage.CAUSES[error.errno][0]
        where = f", such as {site.shared}/raylab" if site.shared else ""
        room = f"`raylab rm` shows what runs occupy; or export RAYLAB_HOME=DIRECTORY on storage with room{where}"
        return Finding(f"{home} has no room for {ROOM_BYTES >> 20} MB: {why}", False, room)
    return None


def try_submission(slurm: Slurm, site: Site, kind: str, node: NodeType, home: Path) -> Finding:
    """Check that Slurm accepts a job of this type with the site's partition, account and limits."""
    tag = JobTag(f"doctor-{secrets.token_hex(4)}", 0, "doctor", kind)
    text = jobscript.script(site, node, tag, "raylab-doctor", site.time, home, {}, ["true"])
    with tempfile.TemporaryDirectory(prefix="raylab-") as directory:  # not in `home`, which may be full
        script = Path(directory) / f"{kind}.sbatch"
        script.write_text(text)
        return attempt(f"Slurm accepts jobs of type {kind}", lambda: slurm.test(script))


@contextmanager
def probe(home: Path) -> Iterator[tuple[Path, str]]:
    """A temporary directory in which this node keeps writing for the nodes to read, and the word in its file `login`.

    `login` has mode 0600, `swap` is replaced repeatedly, `lock` is locked. Raises SlurmError if files cannot be
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
                f"a file created with mode 0600 in {home} has mode {mode:04o}", "its file system ignores modes",
                "Ray's token would not be private: export RAYLAB_HOME=DIRECTORY on another file system",
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
    """Run the node's part as a Slurm step on `count` nodes of a type and yield the merged findings; cancels the step at
    the end."""
    tag = JobTag(f"doctor-{secrets.token_hex(4)}", 0, "doctor", kind)
    words = jobscript.step(site, site.nodes[kind], tag, "raylab-doctor", STEP_TIME, environment, command, count)
    if slurm.directory is not None:
        words[0] = str(slurm.directory / words[0])
    clean = {name: value for name, value in clean_environment(os.environ).items() if name not in jobscript.FOREIGN}
    try:
        process = subprocess.Popen(
            words, env=clean, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        yield Finding("there is no srun on PATH", False, "run this on a login node of the site")
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
    """Yield the nodes' findings from the step's output; other lines are shown only if a node does not answer."""
    begun: dict[str, str] = {}
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
                longer = f"raylab doctor --wait {10 * wait:.0f}, or try later; the other findings are still valid"
                yield Finding(f"no node of type {kind} within {wait:.0f} s: {why}", False, longer)
                return
            noise.append(f"did not finish within {STEP_SECONDS:.0f} s")
            break
        if got is None:
            break
        came, line = got
        if not line.startswith(MARK):
            noise.append(line.strip())
            continue
        host, note = join(line, begun)
        if note is None:
            continue
        if "time" in note:
            clocks[host] = came - note["time"]
            deadline = time.monotonic() + STEP_SECONDS
        else:
            findings[host] = [Finding(**finding) for finding in note["findings"]]
    if len(findings) < count:
        heard = " / ".join([line for line in noise if line][-3:])
        yield Finding(
            f"{count - len(findings)} of {count} nodes of type {kind} did not answer: {heard}", False,
            "put code and environment on shared storage; correct `python`, `setup` or `image` of the site",
        )  # fmt: skip
    yield from merge_findings(findings)
    for host, apart in clocks.items():
        if abs(apart) > CLOCK_SECONDS:
            way = "behind" if apart > 0 else "ahead of"
            ask = "ask for NTP on the nodes; until then times in logs and MLflow are wrong"
            yield Finding(f"{host}: its clock is {abs(apart):.0f} s {way} the login node's", False, ask)
    if clocks and all(abs(apart) <= CLOCK_SECONDS for apart in clocks.values()):
        yield Finding(f"{', '.join(sorted(clocks))}: clock within {CLOCK_SECONDS:.0f} s of the login node's clock")


def merge_findings(findings: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of several nodes, each prefixed with the names of the nodes; equal findings are merged."""
    hosts: dict[Finding, list[str]] = {}
    for host in sorted(findings):
        for finding in findings[host]:
            hosts.setdefault(finding, []).append(host)
    return [Finding(f"{', '.join(names)}: {one.what}", one.ok, one.do) for one, names in hosts.items()]


def _why(slurm: Slurm, tag: JobTag) -> str:
    try:
        return next((job.why() for job in slurm.jobs() if job.comment == str(tag)), "it did not start")
    except SlurmError as error:
        return error.what


def _cancel(slurm: Slurm, tag: JobTag) -> Finding | None:
    """Cancel the step's job if it still exists; returns a finding if that fails."""
    try:
        slurm.cancel([job.id for job in slurm.jobs() if job.comment == str(tag) and job.alive])
    except SlurmError as error:
        look = f"scancel --name raylab-doctor; otherwise it ends after {STEP_TIME}"
        return Finding(f"the doctor's job may still exist ({error.what})", False, look)
    return None
