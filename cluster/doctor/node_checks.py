"""The checks of `raylab doctor` on a compute node, run there in a Slurm step with facts from the login node."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster import image
from cluster.doctor import traffic
from cluster.doctor.traffic import Traffic
from cluster.node.agent import compare
from cluster.node.allocation import OBJECT_STORE_LEAST, Allocation
from cluster.node.network import address_of, free_ports
from cluster.sites import NodeType, Site
from raylab.errors import RaylabError, UsageError
from raylab.files import locked, write_json
from raylab.interfaces import interface_of, list_addresses
from raylab.scratch import Scratch, check_parent, default_parents

SEE_SECONDS = 10.0  # limit for a file of another node to become visible here
LETTERS = 4096  # size of the file that the login node keeps replacing
SCRATCH_BYTES = 10**9  # for Ray's logs and objects spilled from its store
FASTER = 3.0  # so many times as fast must another network be to be recommended
PORTS = 12  # ports that a head needs
NOTES = ("node-*.json", "peer-*.json", "met-*.json")  # files that nodes leave in the probe
DEFAULT_PORTS = {6379: "Ray's head", 8265: "Ray's dashboard", 10001: "Ray's client server"}
# the longest socket name of Ray 2.60
SOCKET = "session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"


@dataclass(frozen=True)
class Finding:
    """A line of `raylab doctor`: what was checked and, if the check failed, what to do."""

    what: str
    ok: bool = True
    do: str = ""

    @classmethod
    def of(cls, error: RaylabError) -> "Finding":
        why = "; ".join(error.why.splitlines())
        return cls(error.what + (f" ({why})" if why else ""), False, error.do)


def attempt(well: str, action: Callable[[], object]) -> Finding:
    """A finding with the text `well`, or with the error if `action` raises a RaylabError."""
    try:
        action()
    except RaylabError as error:
        return Finding.of(error)
    return Finding(well)


def here(facts: dict[str, Any]) -> list[Finding]:
    """Run all checks of this node. `facts`: site, kind, nodes, probe (a directory), word, the login node's versions."""
    site = Site.model_validate(facts["site"])
    wanted = facts["versions"]
    same = "Python and packages are the same as on the login node: "
    findings = [attempt(same + ", ".join(f"{k} {v}" for k, v in wanted.items()), lambda: compare(wanted))]
    if (file := site.image) is not None:
        built = "the image was built from the requirements.lock of this code"
        findings.append(attempt(built, lambda: image.check_lock(file, image.own_lock(), Path(facts["code"]))))
    stored, shared = storage(Path(facts["probe"]), facts["word"])
    findings += [*stored, *scratch(site.scratch), shared_memory(), *other_rays(), *default_ports()]
    findings += network(site, Path(facts["probe"]) if shared else None, facts["nodes"])
    node = site.nodes[facts["kind"]]
    return [*findings, cpus(node, Allocation.read(os.environ), list_affinity()), *gpus(node)]


def storage(probe: Path, word: str) -> tuple[list[Finding], bool]:
    """Check the directory `probe`, in which the login node keeps writing; returns the findings, and if it is shared."""
    note = probe / "login"
    if not _until(lambda: note.is_file() and note.read_text() == word, SEE_SECONDS):
        share = "export RAYLAB_HOME=DIRECTORY on storage that login and compute nodes share"
        return [Finding(f"files of the login node in {probe.parents[1]} are not visible here", False, share)], False
    write_json(probe / f"node-{socket.gethostname()}.json", word)
    findings = [Finding("shared storage: files of the login node are visible here")]
    status = note.stat()
    if status.st_mode & 0o777 != 0o600 or status.st_uid != os.getuid():
        mode = f"a private file (0600, uid {os.getuid()}) appears as {status.st_mode & 0o777:04o}, uid {status.st_uid}"
        findings.append(Finding(mode, False, "Ray's token would not be private: choose another RAYLAB_HOME"))
    return [*findings, _check_replacement(probe / "swap"), _check_lock(probe / "lock"), token(note, word)], True


def token(path: Path, word: str) -> Finding:
    """Check that Ray on this node reads its token from a file, in a new process, because Ray reads it only once."""
    code = (
        "import ray._raylet as r; "
        "print(r.get_authentication_mode() == r.AuthenticationMode.TOKEN, "
        "r.AuthenticationTokenLoader.instance().get_raw_token())"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.stdout.split() != ["True", word]:
        why = (done.stderr.strip().splitlines() or ["a different token, or none"])[-1]
        return Finding(
            f"Ray does not read its token from a file ({why})", False, "install the versions of requirements.lock"
        )
    return Finding("Ray reads its token from a private file (RAY_AUTH_MODE=token)")


def _check_replacement(path: Path) -> Finding:
    """Check that replacing a file is atomic. The login node keeps renaming files with LETTERS times one letter to this
    name."""
    seen: set[str] = set()

    def has_changed() -> bool:
        text = path.read_text()
        seen.add(text[:1] if text == text[:1] * LETTERS else "torn")
        return len(seen) > 1

    if not _until(has_changed, SEE_SECONDS):
        cache = "agents wait for such files: ask for a shorter attribute cache, or choose another RAYLAB_HOME"
        late = f"a file renamed on the login node is not visible here within {SEE_SECONDS:.0f} s"
        return Finding(late, False, cache)
    if "torn" in seen:
        return Finding("replacing a file is not atomic here", False, "choose another RAYLAB_HOME")
    return Finding("shared storage: replacing a file is atomic")


def _check_lock(path: Path) -> Finding:
    with locked(path, wait=False) as mine:
        if mine:
            one = "ask for file locks (Lustre: mount option flock); until then never use one run from two nodes"
            return Finding("a file lock of the login node has no effect here", False, one)
    return Finding("shared storage: file locks of the login node work here")


def scratch(path: str) -> list[Finding]:
    """Check that Ray's directory and its longest socket can be created there, and that there is enough space."""
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
        return [Finding(why, False, f"correct `scratch` of the site{suggest_scratch(path)}")]
    if free < SCRATCH_BYTES:
        room = f"scratch {path} has {free / 1e9:.1f} GB free, less than {SCRATCH_BYTES / 1e9:.0f} GB"
        do = f"free some space, or choose another `scratch` of the site{suggest_scratch(path)}"
        return [Finding(room, False, do)]
    return [Finding(f"scratch {path} can hold Ray's sockets")]


def suggest_scratch(path: str) -> str:
    """The directories of this node that are short, private enough and have room, as the end of a sentence."""
    suited = []
    for place in dict.fromkeys((*default_parents(), "/scratch", "/local", "/dev/shm")):
        try:
            check_parent(Path(place))
            if place != path and os.access(place, os.W_OK) and shutil.disk_usage(place).free >= SCRATCH_BYTES:
                suited.append(place)
        except OSError:
            continue
    return f"; suited here: {', '.join(suited)}" if suited else "; ask for a short, node-local directory"


def shared_memory() -> Finding:
    """Check that /dev/shm, which holds Ray's object store, has enough space."""
    free = shutil.disk_usage("/dev/shm").free
    if 0.8 * free < OBJECT_STORE_LEAST:
        ask = f"ask for at least {OBJECT_STORE_LEAST / 0.8e6:.0f} MB, which Ray's object store needs"
        return Finding(f"/dev/shm has only {free / 1e6:.0f} MB free", False, ask)
    return Finding("/dev/shm has enough space for Ray's object store")


def other_rays() -> list[Finding]:
    """Report other Ray processes on this node. They are no problem, because ours shares nothing with them."""
    processes = []
    for process in psutil.process_iter(["name", "username", "pid"]):
        if process.info["name"] in ("gcs_server", "raylet"):
            processes.append(f"{process.info['name']} of {process.info['username']}, pid {process.info['pid']}")
    if not processes:
        return [Finding("no other Ray is running here")]
    own = "raylab uses its own ports, addresses and directories"
    return [Finding(f"another Ray is running here ({'; '.join(sorted(processes))}): {own}")]


def default_ports() -> list[Finding]:
    """Report programs on Ray's default ports. raylab never uses these, but a Ray command without an address would
    connect to that program."""
    findings = []
    for port, whose in DEFAULT_PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                env = "always give Ray commands an address: raylab cluster env sets RAY_ADDRESS"
                findings.append(Finding(f"port {port}, the default of {whose}, is used by another program", False, env))
    return findings


def network(site: Site, probe: Path | None, nodes: int) -> list[Finding]:
    """Check this node's address and ports, that the nodes of this step, listed in `probe`, can connect to each other,
    and which interface carries what they send."""
    try:
        address = address_of(site)
        free_ports(address, PORTS)
    except RaylabError as error:
        return [Finding.of(error)]
    if address.startswith("127."):
        name = "name the network that nodes share: `interface` of the site (`ip address` lists them)"
        return [Finding(f"this node's host name resolves to {address}, which other nodes cannot reach", False, name)]
    findings = [Finding(f"address {address} ({interface_of(address)}), {PORTS} free ports")]
    return findings if probe is None else [*findings, *_meet(address, probe, nodes)]


def _meet(address: str, probe: Path, nodes: int) -> list[Finding]:
    """Connect to the other nodes at the address that Ray uses, and to the next node at its other addresses too."""
    host, own = socket.gethostname(), interface_of(address)
    addresses = {name: other for name, other in list_addresses().items() if not other.startswith("127.")}
    with traffic.Listener({**addresses, own: address}, host) as listener:
        write_json(probe / f"peer-{host}.json", {"interface": own, "places": listener.places})
        _until(lambda: len(list(probe.glob("peer-*.json"))) >= nodes, SEE_SECONDS)
        notes = {path.stem.removeprefix("peer-"): json.loads(path.read_text()) for path in probe.glob("peer-*.json")}
        peers = sorted(notes)
        findings = []
        for peer in peers:
            if peer != host:
                findings.append(_send_to(peer, own, notes[peer], peer == peers[(peers.index(host) + 1) % len(peers)]))
        write_json(probe / f"met-{host}.json", len(findings))
        _until(lambda: len(list(probe.glob("met-*.json"))) >= nodes, SEE_SECONDS)
    if len(peers) < nodes:
        few = f"only {len(peers)} of {nodes} nodes reported an address"
        return [Finding(few, False, "see the other nodes' output"), *findings]
    return findings


def _send_to(peer: str, own: str, note: dict[str, Any], with_others: bool) -> Finding:
    """Send to a node at the address that Ray uses; `with_others`, or if that fails, at its other addresses too."""
    places = {name: (str(address), int(port)) for name, (address, port) in note["places"].items()}
    used = traffic.send(places.pop(note["interface"]), peer)
    others = {}
    if used is None or with_others:
        others = {name: sent for name, place in places.items() if (sent := traffic.send(place, peer)) is not None}
    return judge_traffic(peer, own, used, others)


def judge_traffic(peer: str, own: str, used: Traffic | None, others: Mapping[str, Traffic]) -> Finding:
    """The finding on what was sent to `peer` at the address that Ray uses, of this node's interface `own`, and at its
    addresses at `others`."""
    best = max(others, key=lambda name: others[name].rate, default=None)
    if used is None:
        if best is None:
            name = "`interface` of the site must be a network that nodes share; ask for the ports between nodes"
            return Finding(f"{peer} cannot be reached from here", False, name)
        through = f"{peer} cannot be reached from here through {own}, but through {best}"
        return Finding(through, False, f"set `interface` of the site to '{best}'")
    text = f"traffic to {peer} goes through {used.carrier} at {traffic.describe_rate(used.rate)}"
    if used.carrier != own:
        routes = "ask for the routes between nodes, or name another `interface` of the site"
        return Finding(f"{text}, though the address is that of {own}", False, routes)
    if best is not None and others[best].rate > FASTER * used.rate:
        faster = f"{text}; through {best}, at {traffic.describe_rate(others[best].rate)}"
        return Finding(faster, False, f"set `interface` of the site to '{best}'")
    return Finding(text)


def list_affinity() -> list[int]:
    """The CPUs of this node on which Slurm lets this process run."""
    return sorted(os.sched_getaffinity(0))


def cpus(node: NodeType, allocation: Allocation, affinity: list[int]) -> Finding:
    """Compare the CPUs of the site's node type, of Slurm's allocation, of the affinity mask, and those Ray counts."""
    mask = f"this step may run on {allocation.usable_cpus} (affinity {format_cpus(affinity)})"
    counts = f"Slurm allocated {allocation.allocated_cpus} CPU(s), {mask}, and Ray counts {allocation.cpus}"
    if allocation.cpus >= node.cpus:
        return Finding(counts)
    if allocation.allocated_cpus < node.cpus:
        do = "correct `cpus` of the node type: `sinfo -o '%P %c'` lists them"
    else:
        do = "a step is bound to fewer CPUs than its job has: remove options that bind it from `sbatch` and `setup`"
    return Finding(f"the site has {node.cpus} CPU(s), {counts}", False, do)


def format_cpus(cpus: Sequence[int]) -> str:
    """Numbers of CPUs as Slurm writes them: `0-3,8`."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def gpus(node: NodeType) -> list[Finding]:
    """Compare the GPUs of the site's node type, of Slurm's allocation and of PyTorch; nothing for a type without."""
    if not node.gpus:
        return []
    given = Allocation.read(os.environ).gpus
    visible = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if given != node.gpus or len(visible) != given:
        count = f"the site has {node.gpus} GPUs, Slurm allocated {given}, {len(visible)} are visible to programs"
        return [Finding(count, False, "correct `gpus` or `gpu_type` of the node type: `sinfo -o '%P %G'` lists them")]
    if node.pretended_gpus:
        return [Finding(f"Slurm allocated {given} GPU(s) and Ray will use them; those of the test cluster are fake")]
    import torch

    if torch.cuda.device_count() != given:
        lacks = f"Slurm allocated {given} GPUs, PyTorch finds {torch.cuda.device_count()}"
        return [Finding(lacks, False, "run nvidia-smi on the node; its driver may be too old for PyTorch's CUDA")]
    return [Finding(f"Slurm allocated {given} GPU(s), PyTorch finds them, and Ray will use them")]


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition becomes true before the deadline; a missing file counts as false."""
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
