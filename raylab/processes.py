"""Processes that are known by a file: whether they are still the ones that wrote it."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
from pydantic import Field

from raylab.documents import Document

PROC = Path("/proc")
# Of a start in Unix time, which follows the clock: it jumps by a second and more when the clock is set
TOLERANCE_SECONDS = 1.5


class StartedProcess(Document):
    """A process of this machine, and its start, by which it differs from a later one with the same id."""

    pid: int = Field(ge=0)
    started: float
    """Unix time in seconds, as the clock was when the file was written"""
    start: str = ""
    """BOOT/TICKS, which no clock changes; empty in files of earlier versions, and where the kernel does not tell it"""

    @staticmethod
    def of(pid: int) -> "StartedProcess":
        """The process `pid` that is there now; psutil.NoSuchProcess if there is none."""
        return StartedProcess(pid=pid, started=psutil.Process(pid).create_time(), start=read_start(pid))


def read_start(pid: int) -> str:
    """When the process `pid` started: the id of this boot of the machine, and the clock ticks since; empty where the
    kernel does not tell them."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot}/{fields[19]}"  # field 22 of proc(5), which counts the two before the parenthesis


def find_own(known: StartedProcess) -> psutil.Process | None:
    """The `known` process if it is this user's and still there; else None."""
    try:
        process = psutil.Process(known.pid)
        if known.start:
            is_it = read_start(known.pid) == known.start
        else:
            is_it = abs(process.create_time() - known.started) < TOLERANCE_SECONDS
        is_own = is_it and process.uids().real == os.getuid()
        return process if is_own and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def end_tree(process: psutil.Process, terminate: Callable[[], None], seconds: float) -> None:
    """Call `terminate`, and after `seconds` kill what is left of `process` and of the processes that it has started."""
    processes = [process, *process.children(recursive=True)]
    terminate()
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=seconds)
