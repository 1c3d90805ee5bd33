"""Memory of processes: what one uses, what it may use, and whether the kernel has ended one for lack of it."""

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from raylab.errors import OutOfMemoryError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
KERNEL_LOG = Path("/dev/kmsg")
LIMITS = ("memory.max", "memory.limit_in_bytes")  # of cgroup versions 2 and 1
KILLS = ("memory.events", "memory.oom_control")
# Words of errors of allocators: torch on a CPU and on a GPU, cuDNN, C++, threads
WORDS = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc",
         "ALLOC_FAILED", "can't start new thread")  # fmt: skip


def advise(run: str = "NAME") -> str:
    return (
        f"give it more memory (Slurm: --mem) or start fewer workers on a node, then: raylab resume {run}; or start "
        "another run with a smaller loop.global_batch_size, more loop.shards, or fewer scaling.cpus_per_worker, which "
        "load inputs ahead"
    )


def explain_memory_error(error: BaseException, run: str = "NAME") -> OutOfMemoryError | None:
    """Return the error for the user if a failed allocation is `error`, or led to it; else None."""
    link: BaseException | None = error
    while link is not None:
        failed = isinstance(link, MemoryError) or (isinstance(link, OSError) and link.errno == errno.ENOMEM)
        if failed or (isinstance(link, RuntimeError) and any(words in str(link) for words in WORDS)):
            said = (str(link).splitlines() or [""])[0][:200] or type(link).__name__
            who = f"process {os.getpid()} on {os.uname().nodename}"
            used, limit = read_resident_bytes(os.getpid()), read_limit_bytes(list_cgroups(os.getpid()))
            return OutOfMemoryError(f"{who} ran out of memory", f"{said}; {describe(used, limit)}", advise(run))
        link = link.__cause__ or link.__context__
    return None


def describe(used: int, limit: int) -> str:
    """`it used 3.10 GB, and 4.00 GB are there for it and what runs beside it`"""
    return f"it used {used / 1e9:.2f} GB, and {limit / 1e9:.2f} GB are there for it and what runs beside it"


def read_resident_bytes(pid: int) -> int:
    """The memory that a process has now; 0 if there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmRSS:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.M):
            return int(found[1]) * 1024
    return 0


def read_limit_bytes(cgroups: Iterable[Path]) -> int:
    """The most that `cgroups` and this machine allow."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.M)
    limits = [int(found[1]) * 1024] if found else []
    for directory in cgroups:
        for name in LIMITS:
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((directory / name).read_text()))
    return min(limits, default=0)


def list_cgroups(pid: int, controller: str = "memory") -> list[Path]:
    """The directories of a process's cgroup of this controller and of those that contain it, where they are visible."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for line in (PROC / str(pid) / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):  # one without controllers: version 2
                continue
            root = CGROUPS / controllers
            here = root / path.lstrip("/")
            if not here.is_dir():  # of a namespace in which this path is the root
                here = root
            found += [here, *(parent for parent in here.parents if parent.is_relative_to(root))]
    return found


def count_kills(cgroups: Iterable[Path]) -> int:
    """How many processes the kernel has ended for lack of memory in the first of `cgroups` that counts them; on this
    machine, where none does."""
    for directory in cgroups:
        for name in KILLS:
            with contextlib.suppress(OSError):
                if found := re.search(r"^oom_kill (\d+)", (directory / name).read_text(), re.M):
                    return int(found[1])
    found = re.search(r"^oom_kill (\d+)", (PROC / "vmstat").read_text(), re.M)
    return int(found[1]) if found else 0


def read_kernel_log(pid: int, since: float = 0.0) -> int:
    """The memory that a process had when the kernel ended it for lack of memory, after `since` seconds from the start
    of this machine; 0 if it did not, or if the kernel's log cannot be read."""
    used = 0
    with contextlib.suppress(OSError):
        log = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK)
        try:
            while True:
                with contextlib.suppress(BrokenPipeError):  # this record was overwritten meanwhile
                    record = os.read(log, 8192).decode(errors="replace")
                    written = int(record.split(",", 3)[2]) / 1e6  # priority,number,microseconds,...
                    if f"Killed process {pid} " in record and written >= since:
                        used = 1024 * sum(int(part) for part in re.findall(r"(?:anon|file|shmem)-rss:(\d+)kB", record))
        except BlockingIOError:
            pass
        finally:
            os.close(log)
    return used
