"""raylab warm: keep a Ray running for later commands."""

import argparse
import subprocess
import sys
import time
from typing import Any

import psutil

from jobs import cli
from jobs.common import home
from jobs.common.console import say
from jobs.common.keep_ray import IDLE_SECONDS, LOG
from jobs.common.session import cluster_address
from jobs.common.warm_ray import WarmRay, differences, find_running, identify, record_file
from raylab.errors import RunError, UsageError
from raylab.processes import end_tree, find_own

EXAMPLE = "raylab warm --workers 2"
START_SECONDS = 300.0  # on a busy machine
END_SECONDS = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=2, metavar="N", help="worker processes to keep ready (default: 2)"
    )
    parser.add_argument("--stop", action="store_true", help="end this Ray, and the runs on it")


def main(args: argparse.Namespace) -> dict[str, Any]:
    running = find_running()
    if args.stop:
        if running is not None:
            stop(running)
        say("stopped" if running else "no Ray is kept running for this home")
        return {"stopped": running is not None}
    if cluster_address() is not None:
        raise UsageError("RAY_ADDRESS names a cluster, which is already running", do="unset RAY_ADDRESS")
    if args.workers < 1:
        raise UsageError(f"--workers is {args.workers}, but must be at least 1", do="--workers 2")
    if running is not None and (different := differences(running.identity, identify())):
        raise UsageError(
            "a Ray is already running for this home, but no command would use it",
            f"changed since its start: {', '.join(different)}",
            "raylab warm --stop, then run this command again",
        )
    warm = running or start(args.workers)
    memory = memory_of(warm)
    if not args.quiet:
        say(f"Ray is running, with {memory / 1e9:.1f} GB of memory; commands of this home on this machine use it")
        say(f"it ends after {IDLE_SECONDS / 60:.0f} min without a command; raylab warm --stop ends it now")
    return {"address": warm.address, "pid": warm.pid, "memory_bytes": memory}


def start(workers: int) -> WarmRay:
    """Start the process that keeps a Ray, and wait until it is ready. Raises RunError if it is not."""
    home.check_writable()
    home.home().mkdir(mode=0o700, parents=True, exist_ok=True)
    log = home.home() / LOG
    record_file().unlink(missing_ok=True)  # that of one that was killed
    with log.open("wb") as output:
        command = [sys.executable, "-m", "jobs.common.keep_ray", str(workers)]
        # A session of its own: it outlives this terminal, and Ctrl+C for another process does not end it
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if warm := find_running():
                return warm
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        raise
    process.terminate()
    raise RunError("Ray did not start", do=f"see {log}")


def stop(warm: WarmRay) -> None:
    """End the Ray and the process that keeps it."""
    keeper = find_own(warm)
    if keeper is None:
        return
    end_tree(keeper, keeper.terminate, END_SECONDS)
    record_file().unlink(missing_ok=True)


def memory_of(warm: WarmRay) -> int:
    """The memory of all processes of the Ray in bytes, shared pages divided among those that share them (PSS)."""
    keeper = psutil.Process(warm.pid)
    total = 0
    for process in [keeper, *keeper.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


if __name__ == "__main__":
    sys.exit(cli.main(["warm", *sys.argv[1:]]))
