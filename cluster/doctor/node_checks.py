"""What `raylab doctor` looks at on a compute node: runs there, in a Slurm step, told what the login node knows."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.node.agent import compare
from cluster.node.ray_process import OBJECT_STORE_LEAST, Allocation, address_of, free_ports
from cluster.sites import NodeType, Site
from raylab.errors import RaylabError, UsageError
from raylab.files import locked, write_json
from raylab.scratch import Scratch

SEE_SECONDS = 10.0  # for what another node wrote to be seen here
LETTERS = 4096  # in the file that the login node keeps replacing
SCRATCH_BYTES = 10**9  # Ray's logs, and what its object store has no room for
PORTS = 12  # that a head takes
NOTES = ("node-*.json", "peer-*.json", "met-*.json")  # that nodes leave in the probe
DEFAULT_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard", 10001: "Ray's client server"}
# as Ray 2.60 names it, at its longest
SOCKET = "session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"


@dataclass(frozen=True)
class Finding:
    """A line of `raylab doctor`: what was looked at and, unless that is well, what to do."""

    what: str
    ok: bool = True
    do: str = ""

    @classmethod
    def of(cls, error: RaylabError) -> "Finding":
        why = "; ".join(error.why.splitlines())
        return cls(error.what + (f" ({why})" if why else ""), False, error.do)


def attempt(well: str, action: Callable[[], object]) -> Finding:
    """`well`, unless the action raises an error of ours, which then is the finding."""
    try:
        action()
    except RaylabError as error:
        return Finding.of(error)
    return Finding(well)


def here(facts: dict[str, Any]) -> list[Finding]:
    """All findings on this node. `facts`: site, kind, nodes, probe (a directory), word, versions of the login node."""
    site = Site.model_validate(facts["site"])
    wanted = facts["versions"]
    same = "Python and packages are those of the login node: "
    findings = [attempt(same + ", ".join(f"{k} {v}" for k, v in wanted.items()), lambda: compare(wanted))]
    stored, shared = storage(Path(facts["probe"]), facts["word"])
    findings += [*stored, *scratch(site.scratch), shared_memory(), *other_rays(), *default_ports()]
    findings += network(site.interface, Path(facts["probe"]) if shared else None, facts["nodes"])
    return findings + gpus(site.nodes[facts["kind"]])


def storage(probe: Path, word: str) -> tuple[list[Finding], bool]:
    """What this node sees of the directory `probe`, in which the login node wrote and goes on writing; is it shared?"""
    note = probe / "login"
    if not _until(lambda: note.is_file() and note.read_text() == word, SEE_SECONDS):
        share = "export RAYLAB_HOME=DIRECTORY on storage that login and compute nodes share"
        return [Finding(f"what the login node wrote in {probe.parents[1]} is not seen here", False, share)], False
    write_json(probe / f"node-{socket.gethostname()}.json", word)
    findings = [Finding("shared storage: a file of the login node is seen here")]
    status = note.stat()
    if status.st_mode & 0o777 != 0o600 or status.st_uid != os.getuid():
        mode = f"a private file (0600) of uid {os.getuid()} is {status.st_mode & 0o777:04o} of uid {status.st_uid} here"
        findings.append(Finding(mode, False, "Ray's token would not be private: choose another RAYLAB_HOME"))
    return [*findings, _check_replacement(probe / "swap"), _check_lock(probe / "lock"), token(note, word)], True


def token(path: Path, word: str) -> Finding:
    """Does Ray here take its token from a file of ours? Asked in a process of its own: it reads these once."""
    code = (
        "import ray._raylet as r; "
        "print(r.get_authentication_mode() == r.AuthenticationMode.TOKEN, "
        "r.AuthenticationTokenLoader.instance().get_raw_token())"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.stdout.split() != ["True", word]:
        why = (done.stderr.strip().splitlines() or ["another token, or none"])[-1]
        return Finding(
            f"Ray does not take its token from a file ({why})", False, "install what requirements.lock names"
        )
    return Finding("Ray takes its token from a private file (RAY_AUTH_MODE=token)")


def _check_replacement(path: Path) -> Finding:
    """The login node keeps renaming files of one letter, LETTERS long, to this name."""
    seen: set[str] = set()

    def two() -> bool:
        text = path.read_text()
        seen.add(text[:1] if text == text[:1] * LETTERS else "torn")
        return len(seen) > 1

    if not _until(two, SEE_SECONDS):
        cache = "agents wait for such files: ask for a shorter attribute cache, or choose another RAYLAB_HOME"
        return Finding(f"a file renamed on the login node is not seen here within {SEE_SECONDS:.0f} s", False, cache)
    if "torn" in seen:
        return Finding("a file that is being replaced is seen half", False, "choose another RAYLAB_HOME")
    return Finding("shared storage: a file that is replaced is seen whole")


def _check_lock(path: Path) -> Finding:
    with locked(path, wait=False) as mine:
        if mine:
            one = "ask for file locks (Lustre: mount option flock); until then never work on one run from two nodes"
            return Finding("a file lock that the login node holds is not seen here", False, one)
    return Finding("shared storage: a lock of the login node holds here")


def scratch(path: str) -> list[Finding]:
    """Can Ray's directory and its longest socket be made there, and is there room?"""
    try:
        with Scratch([path]) as temp:
            place = temp.ray / SOCKET
            place.parent.mkdir(parents=True)
            with socket.socket(socket.AF_UNIX) as probe:
                probe.bind(str(place))
            free = shutil.disk_usage(temp.path).free
    except (OSError, UsageError) as error:
        reason = error.why if isinstance(error, UsageError) else error.strerror or error
        why = f"scratch {path} cannot hold Ray's sockets ({reason})"
        return [Finding(why, False, "correct `scratch` of the site")]
    if free < SCRATCH_BYTES:
        room = f"scratch {path} has {free / 1e9:.1f} GB left, fewer than {SCRATCH_BYTES / 1e9:.0f}"
        return [Finding(room, False, "free some, or choose another `scratch` of the site")]
    return [Finding(f"scratch {path} holds Ray's sockets")]


def shared_memory() -> Finding:
    """Ray's object store lies in /dev/shm."""
    free = shutil.disk_usage("/dev/shm").free
    if 0.8 * free < OBJECT_STORE_LEAST:
        ask = f"ask for at least {OBJECT_STORE_LEAST / 0.8e6:.0f} MB; Ray's object store lies there"
        return Finding(f"/dev/shm has {free / 1e6:.0f} MB left", False, ask)
    return Finding("/dev/shm has room for Ray's object store")


def other_rays() -> list[Finding]:
    """Rays that run here already: said, as ours shares nothing with them."""
    processes = []
    for process in psutil.process_iter(["name", "username", "pid"]):
        if process.info["name"] in ("gcs_server", "raylet"):
            processes.append(f"{process.info['name']} of {process.info['username']}, pid {process.info['pid']}")
    if not processes:
        return [Finding("no other Ray runs here")]
    own = "ours has ports, addresses and directories of its own"
    return [Finding(f"another Ray runs here ({'; '.join(sorted(processes))}): {own}")]


def default_ports() -> list[Finding]:
    """Ours never takes Ray's default ports; somebody's command that does would reach the program found there."""
    findings = []
    for port, whose in DEFAULT_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                env = "name an address in all that you start there: raylab cluster env sets RAY_ADDRESS"
                findings.append(
                    Finding(f"port {port}, the default of {whose}, is taken by another program", False, env)
                )
    return findings


def network(interface: str | None, probe: Path | None, nodes: int) -> list[Finding]:
    """This node's address and ports, and whether the nodes of this step reach one another (through `probe`)."""
    try:
        address = address_of(interface)
        free_ports(address, PORTS)
    except RaylabError as error:
        return [Finding.of(error)]
    if address.startswith("127."):
        name = "name the network that nodes share: `interface` of the site (`ip address` lists them)"
        return [Finding(f"other nodes do not reach this one at {address}, which is its name's address", False, name)]
    findings = [Finding(f"address {address}, {PORTS} free ports")]
    return findings if probe is None else [*findings, _meet(address, probe, nodes)]


def _meet(address: str, probe: Path, nodes: int) -> Finding:
    host = socket.gethostname()
    with socket.create_server((address, 0)) as server:
        threading.Thread(target=_accept, args=(server,), daemon=True).start()
        write_json(probe / f"peer-{host}.json", [address, server.getsockname()[1]])
        _until(lambda: len(list(probe.glob("peer-*.json"))) >= nodes, SEE_SECONDS)
        peers = {path.stem.removeprefix("peer-"): path for path in probe.glob("peer-*.json")}
        away = [peer for peer, path in sorted(peers.items()) if not _can_connect(path)]
        write_json(probe / f"met-{host}.json", away)
        _until(lambda: len(list(probe.glob("met-*.json"))) >= nodes, SEE_SECONDS)
    if len(peers) < nodes:
        return Finding(f"{len(peers)} of {nodes} nodes told their address", False, "look at what the others say here")
    if away:
        name = "`interface` of the site must be a network that nodes share; ask for the ports between nodes"
        return Finding(f"{', '.join(away)} cannot be reached from here", False, name)
    return Finding(f"{nodes} nodes reach one another" if nodes > 1 else "a port opened here is reached from here")


def _accept(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:  # closed: all have met
            return


def _can_connect(path: Path) -> bool:
    address, port = json.loads(path.read_text())
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def gpus(node: NodeType) -> list[Finding]:
    """GPUs that the site promises, that Slurm gave, and that PyTorch finds, where the node type has any."""
    if not node.gpus:
        return []
    given = Allocation.read(os.environ).gpus
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if given != node.gpus or len(visible) != given:
        count = f"the site promises {node.gpus} GPUs, Slurm gave {given}, {len(visible)} are visible to programs"
        return [Finding(count, False, "correct `gpus` or `gpu_type` of the node type: `sinfo -o '%P %G'` lists them")]
    if node.pretended_gpus:
        return [Finding(f"{given} GPU(s) given by Slurm, which Ray is told of; the test cluster's are pretended")]
    import torch

    if torch.cuda.device_count() != given:
        lacks = f"Slurm gave {given} GPUs, PyTorch finds {torch.cuda.device_count()}"
        return [Finding(lacks, False, "nvidia-smi on the node; the driver may be older than PyTorch's CUDA needs")]
    return [Finding(f"{given} GPU(s) given by Slurm, found by PyTorch, which Ray is told of")]


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds before the deadline; a file that is not there yet is no error."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return True
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
