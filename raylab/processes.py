"""Processes that are known by a file: whether they are still the ones that wrote it."""

import os
from collections.abc import Callable

import psutil

TOLERANCE_SECONDS = 1.0  # of a start time, which the kernel gives in ticks since boot


def find_own(pid: int, started: float) -> psutil.Process | None:
    """The process `pid` of this user that started at the time `started` (Unix seconds); None if it is gone."""
    try:
        process = psutil.Process(pid)
        is_it = abs(process.create_time() - started) < TOLERANCE_SECONDS and process.uids().real == os.getuid()
        return process if is_it and process.status() != psutil.STATUS_ZOMBIE else None
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
