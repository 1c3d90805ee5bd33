"""Control of a testbed from the host: the verbs of `python -m cluster.testbed`."""

import contextlib
import os
import re
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.testbed import INSIDE, accounting, config, controller
from cluster.testbed.config import Plan
from cluster.testbed.faults import Fault
from raylab.errors import RaylabError, UsageError, unknown

CHECKOUT = Path(__file__).parents[2]
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
TOOLS = ("slurmctld", "slurmd", "munged", *config.COMMANDS, "ip", "mount", "unshare", "nsenter", "setpriv", "setsid")
CGROUPS = Path("/sys/fs/cgroup")
HIERARCHIES = ("freezer", "memory", "cpuset")  # cgroup version 1 mounts that Slurm's plugin requires
SPACES = ("--pid", "--fork", "--kill-child", "--mount", "--net", "--uts", "--ipc")
SYSTEM = "/usr/local/bin:/usr/bin"  # not the directory of another testbed
PRIVATE = Path("/tmp")  # every node has its own
START_SECONDS, ACCOUNTING_SECONDS, END_SECONDS, NOTICE_SECONDS = 30, 90, 10, 90


def obstacle() -> str:
    """The reason why this machine cannot run a testbed; empty if it can."""
    if INSIDE.is_file():
        return "this is a machine of a testbed already"
    if os.getuid() != 0:
        return "a testbed creates namespaces and cgroups, which only root may do"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)} (Debian, Ubuntu: apt-get install {PACKAGES})"
    if not Path("/etc/slurm").is_dir():
        return "Slurm is not installed from Debian packages: it does not read /etc/slurm"
    spaces = ["unshare", *SPACES, "--cgroup", "mount", "-t", "proc", "proc", "/proc"]
    tried = subprocess.run(spaces, capture_output=True, text=True)
    return f"this machine does not allow namespaces: {tried.stderr.strip()}" if tried.returncode != 0 else ""


def has_cgroups(name: str) -> bool:
    """Create the testbed's cgroups (version 1); returns False if that is not possible. Version 2, where Slurm relies on
    systemd, is not supported; a testbed then runs without cgroups, as in containers that may not create any."""
    if not all((CGROUPS / top / "cgroup.procs").is_file() for top in HIERARCHIES):
        return False
    try:
        for top in HIERARCHIES:
            (CGROUPS / top / name).mkdir(exist_ok=True)
    except OSError:  # read-only, as in most containers
        return False
    return True


def shared(root: Path, environment: dict[str, str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Directories and symbolic links below the private /tmp that the nodes need: the testbed's own, the checkout, its
    Python, the data next to it, and the paths of RAYLAB_TESTBED_SHARE."""
    requested = [Path(name) for name in environment.get("RAYLAB_TESTBED_SHARE", "").split(":") if name]
    for path in requested:
        if not path.is_absolute() or not path.is_dir():
            raise UsageError(
                f"RAYLAB_TESTBED_SHARE contains '{path}', which is not a directory", do="use absolute paths"
            )
    beside = CHECKOUT.parent / "shared"
    data = Path(environment.get("RAYLAB_DATA") or beside / "data")
    wanted = [root, CHECKOUT, CHECKOUT / ".venv", Path(sys.prefix), Path(sys.base_prefix), beside, data]
    directories, links = set(), set()
    for path in [*wanted, *requested]:
        if path.is_symlink() and path.is_relative_to(PRIVATE):
            links.add(path)
        real = path.resolve()
        if (path == root or real.is_dir()) and real.is_relative_to(PRIVATE) and real != PRIVATE:
            directories.add(real)
    outermost = {path for path in directories if not any(other in path.parents for other in directories)}
    inside = {link for link in links if any(other in link.parents for other in outermost)}
    return tuple(sorted(outermost)), tuple(sorted(links - inside))


# --- up and down ---


def up(root: Path, accounts: bool = False, faults: frozenset[Fault] = frozenset()) -> Plan:
    """Start a testbed in the directory `root`, which is created and replaces an earlier testbed that is down.

    `accounts`: with Slurm's accounting.
    """
    if why := obstacle():
        raise UsageError("this machine cannot run a testbed", why=why)
    check_name(root)
    plan = prepare(Plan(root, accounting=accounts, faults=faults))
    if controller(root) is not None:
        raise UsageError(f"the testbed {root} is up already", do="make slurm-down")
    down(root)
    directories, links = shared(root, dict(os.environ))
    try:
        root.mkdir(mode=0o711)
    except OSError as error:
        raise UsageError(f"the testbed's directory {root} cannot be created", why=str(error)) from None
    try:
        plan = replace(plan, shares=directories, links=links, cgroups=has_cgroups(plan.cgroup))
        write(plan)
        start(plan)
    except BaseException as error:
        logs = "\n".join(_tail(path) for path in sorted((root / "log").glob("*.log")))
        down(root)
        if not isinstance(error, TimeoutError):
            raise
        raise RaylabError(f"the testbed {root} did not start", why=logs, do="read its logs above") from None
    return plan


def prepare(plan: Plan) -> Plan:
    """The plan with what it needs of this host. Raises UsageError for what this host lacks."""
    if Fault.JOB_LIMIT in plan.faults:
        plan = replace(plan, accounting=True)
    if plan.accounting:
        accounting.check()
    if plan.faults & {Fault.ONE_CORE_AFFINITY, Fault.WHOLE_NODES}:
        # a core that is not there binds nothing, and no step can use it
        plan = replace(plan, cpus=min(plan.cpus, len(os.sched_getaffinity(0))))
    if Fault.ONE_CORE_AFFINITY in plan.faults and plan.cpus < 2:
        raise _impossible(Fault.ONE_CORE_AFFINITY, "this machine has one core")
    if Fault.TWO_PYTHONS in plan.faults:
        python = Path(sys.executable).resolve()
        others = sorted({path.resolve() for path in Path("/usr/bin").glob("python3*") if path.is_file()} - {python})
        other = next((path for path in others if _python_version(path) not in ("", _python_version(python))), None)
        if other is None:
            raise _impossible(Fault.TWO_PYTHONS, f"/usr/bin has no Python of another version than {python}")
        plan = replace(plan, python=python, other_python=other)
    if Fault.CLOCK_SKEW in plan.faults and shutil.which("cc") is None:
        raise _impossible(Fault.CLOCK_SKEW, "there is no C compiler to make its clock (Debian: apt-get install gcc)")
    return plan


def _impossible(fault: Fault, why: str) -> UsageError:
    return UsageError(f"this machine cannot produce the fault {fault}", why=why)


def _python_version(python: Path) -> str:
    """The version that an interpreter prints; empty for a program that is none."""
    return subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()


def check_name(root: Path) -> None:
    """Raise UsageError for a directory that Slurm, its sockets or the nodes cannot use."""
    elsewhere = "RAYLAB_TESTBED=/tmp/short make slurm-up"
    if len(bytes(root)) > config.LONGEST:
        raise UsageError(
            f"the path of the testbed's directory {root} has {len(bytes(root))} bytes",
            why=f"paths of the sockets in it may have 107 bytes, which leaves {config.LONGEST} for the directory",
            do=elsewhere,
        )
    if re.search(r"[^\w./+-]", str(root), re.ASCII):
        raise UsageError(f"the testbed's directory {root} has characters that slurm.conf does not allow", do=elsewhere)
    if any(root.is_relative_to(place) for place in ("/dev/shm", "/run", "/proc", "/sys")):
        raise UsageError(f"the testbed's directory {root} cannot be shared: every node has its own", do=elsewhere)


def start(plan: Plan) -> None:
    """Start the machines and wait until all nodes are idle."""
    root = plan.root
    first = ["unshare", *SPACES, "bash", f"{root}/lib/machine.sh", "controller", str(root)]
    with (root / "log/ctl.log").open("wb") as log:
        # detached into its own session, so that it survives this process and its terminal
        subprocess.run(
            ["setsid", "--fork", *first], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, cwd="/"
        )

    def ended() -> bool:
        return (root / "run/ctl.pid").exists() and controller(root) is None

    wait_until(lambda: _all_idle(plan), ACCOUNTING_SECONDS if plan.accounting else START_SECONDS, ended)
    for words in config.commands(plan):
        _do(root, *words)


def _all_idle(plan: Plan) -> bool:
    if not (plan.root / "run/booted").exists():
        return False
    sinfo = run(plan.root, ["timeout", "5", "sinfo", "--noheader", "--partition=batch", "--states=idle", "--format=%D"])
    return sinfo.stdout.strip() == str(plan.nodes)


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join([f"{path.name}:", *path.read_text(errors="replace").splitlines()[-lines:]])


def wait_until(condition: Callable[[], bool], seconds: float, hopeless: Callable[[], bool] = lambda: False) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or hopeless():
            raise TimeoutError
        time.sleep(0.02)


def write(plan: Plan) -> None:
    """Write the files of the testbed's directory. Other users may traverse it, but cannot read keys, state or logs."""
    root = plan.root
    modes = {"etc": 0o755, "lib": 0o755, "bin": 0o755, "run": 0o755, "log": 0o700, "state": 0o700, "nodes": 0o711}
    for name, mode in {**modes, "shared": 0o1777, "shared/home": 0o700}.items():
        (root / name).mkdir()
        (root / name).chmod(mode)  # whatever the umask
    root.chmod(0o711)
    key = os.open(root / "etc/munge.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(key, "wb") as file:
        file.write(secrets.token_bytes(1024))
    for number in range(plan.gpus):  # slurmd requires a device; this one is a /dev/null
        os.mknod(root / f"etc/gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    texts = {
        # first, because `down` recognises a testbed by it
        "lib/machine.sh": Path(__file__).with_name("machine.sh").read_text(),
        "etc/slurm.conf": config.slurm_conf(plan),
        "etc/gres.conf": config.gres_conf(plan),
        "etc/cgroup.conf": config.cgroup_conf(),
        "etc/hosts": config.hosts(plan),
        "lib/settings.sh": config.settings(plan),
        "lib/task-prolog.sh": config.task_prolog(plan),
        "lib/epilog.sh": config.epilog(),
    }
    if script := config.job_submit(plan):
        texts["etc/job_submit.lua"] = script
    if plan.accounting:
        texts["etc/slurm.conf"] = accounting.amend(texts["etc/slurm.conf"])
        texts |= {"etc/slurmdbd.conf": accounting.slurmdbd_conf(plan), "lib/accounting.sh": accounting.script(plan)}
    for command in config.COMMANDS:
        texts[f"bin/{command}"] = config.shim(plan, Path(str(shutil.which(command))))
    if shutil.which("apptainer", path=SYSTEM) is None:
        texts["bin/apptainer"] = Path(__file__).with_name("apptainer.sh").read_text()
    for name, text in texts.items():
        (root / name).write_text(text)
        (root / name).chmod(0o755 if name.startswith(("bin/", "lib/")) else 0o600 if "slurmdbd" in name else 0o644)
    if Fault.CLOCK_SKEW in plan.faults:
        options = ["-shared", "-fPIC", f"-DSECONDS={config.SKEW_SECONDS}", "-o", f"{root}/lib/clock.so"]
        subprocess.run(["cc", *options, Path(__file__).with_name("clock.c"), "-ldl"], check=True)


def down(root: Path) -> None:
    """Stop the testbed and remove all its files; does nothing if there is none."""
    if INSIDE.is_file():
        raise UsageError("a machine of a testbed cannot stop its own testbed", do="run make slurm-down on the host")
    if not os.path.lexists(root):
        return
    if not (root / "lib/machine.sh").is_file() or root.stat().st_uid != os.getuid() or root.is_symlink():
        raise UsageError(
            f"{root} is not a testbed of yours and was not changed", do="set RAYLAB_TESTBED to another directory"
        )
    if (pid := controller(root)) is not None:
        _kill(root, pid)
    _remove_cgroups(Plan(root).cgroup)
    shutil.rmtree(root)


def _kill(root: Path, pid: int) -> None:
    """Kill the first process, which ends every process, mount and network of the testbed."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            if controller(root) == pid:  # checked again, because the pid cannot be reused from here on
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], END_SECONDS)
        finally:
            os.close(process)


def _remove_cgroups(name: str) -> None:
    def removed() -> bool:
        left = {(CGROUPS / top / name).resolve() for top in os.listdir(CGROUPS) if (CGROUPS / top / name).is_dir()}
        for top in left:
            for directory, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # busy until its last process is reaped
                    Path(directory).rmdir()
        return not any(top.exists() for top in left)

    if CGROUPS.is_dir():
        wait_until(removed, END_SECONDS)


# --- a running testbed ---


def command(root: Path, words: Sequence[str], on: str = "ctl") -> list[str]:
    """The command line that runs `words` from this host on a machine of the testbed, in the current directory."""
    return ["bash", f"{root}/lib/machine.sh", "enter", str(root), on, *words]


def run(root: Path, words: Sequence[str], on: str = "ctl") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(root, words, on), capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _do(root: Path, *words: str) -> str:
    done = run(root, words)
    if done.returncode != 0:
        raise RaylabError(f"{' '.join(words)}: exit code {done.returncode}", why=(done.stderr or done.stdout).strip())
    return done.stdout


def check_up(root: Path) -> None:
    if controller(root) is None:
        raise UsageError(f"no testbed is up in {root}", do="make slurm-up")


def status(root: Path) -> str:
    nodes = _do(root, "sinfo", "--Node", "--partition=batch", "--format=%N %t %C %m %G %E")
    return nodes + "\n" + _do(root, "squeue")


def _pid_of(root: Path, node: str) -> str | None:
    """The pid on ctl of a node's first process; None if the node is down."""
    _node(root, node)
    pid = (root / f"run/{node}.pid").read_text().strip() if (root / f"run/{node}.pid").exists() else ""
    words = run(root, ["cat", f"/proc/{pid}/cmdline"]).stdout.split("\0")[1:5]
    return pid if words == [f"{root}/lib/machine.sh", "node", str(root), node] else None


def _node(root: Path, node: str) -> None:
    check_up(root)
    settings = (root / "lib/settings.sh").read_text().splitlines()
    names = next(line for line in settings if line.startswith("nodes=")).removeprefix("nodes=").strip("'").split()
    if node not in names:
        raise unknown("node", node, names)


def crash(root: Path, node: str) -> None:
    """Simulate a power failure: all processes of the node end immediately. Slurm notices after SlurmdTimeout."""
    pid = _pid_of(root, node)
    if pid is None:
        raise UsageError(f"{node} is down already", do=f"python -m cluster.testbed boot {node}")
    _do(root, "sh", "-c", f"kill -9 {pid}")
    wait_until(lambda: _pid_of(root, node) is None, END_SECONDS)


def boot(root: Path, node: str) -> None:
    """Start a crashed node again. A real node never reboots before Slurm notices the crash; until then Slurm would
    count its jobs as running, so this waits until Slurm has ended them, about 25 s after the crash."""
    if _pid_of(root, node) is not None:
        raise UsageError(f"{node} is up already")

    def without_jobs() -> bool:
        squeue = run(root, ["squeue", "--noheader", f"--nodelist={node}"])
        return squeue.returncode != 0 or not squeue.stdout.strip()  # without a controller there are no jobs to wait for

    try:
        wait_until(without_jobs, NOTICE_SECONDS)
    except TimeoutError:
        raise RaylabError(
            f"{node} was not booted: after {NOTICE_SECONDS} s Slurm still lists jobs on it", do=f"squeue -w {node}"
        ) from None
    _do(root, "bash", f"{root}/lib/machine.sh", "boot", str(root), node)


def cable(root: Path, node: str, state: str) -> None:
    """Pull the node's network cable (`down`) or plug it in (`up`)."""
    _node(root, node)
    _do(root, "ip", "link", "set", f"to-{node}", state)


def kill_controller(root: Path) -> None:
    """Stop slurmctld. Jobs continue; squeue and other commands fail until it is started again."""
    check_up(root)
    _do(root, "sh", "-c", 'kill "$(cat /run/slurmctld.pid)"')
    wait_until(lambda: run(root, ["sh", "-c", 'kill -0 "$(cat /run/slurmctld.pid)"']).returncode != 0, END_SECONDS)


def start_controller(root: Path) -> None:
    check_up(root)
    _do(root, "slurmctld")
