"""The connection to Ray: to the cluster that RAY_ADDRESS names, or to a local Ray started here."""

import logging
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from raylab.errors import RunError, UsageError
from raylab.scratch import Scratch, default_parents

OBJECT_STORE_BYTES = 200_000_000  # small, because every worker reads its data from files

LOGS = "ray-logs"  # directory next to a session's log
STARTS = 3  # attempts to start a local Ray, which gives its helper processes 15 s: too little on a busy machine

# Ray reads these variables and the token at import: call `ray_environment` before anything imports it
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # otherwise Ctrl+C ends a search as if it had finished
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it also handles SIGTERM, and aborts the process after 3 s
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves workers on a machine that runs anything else
}
# For a local Ray only. Outside Linux, Ray binds everything to loopback unless the first variable enables clusters;
# "0" selects this on Linux too. With port -1, Ray continues without its metrics server.
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "false",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None for a local Ray (unset, empty or "local")."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def ray_environment() -> None:
    """Set the variables that Ray reads at import; call this before anything imports Ray.

    Raises UsageError if a local Ray could not start workers.
    """
    if cluster_address() is None and shutil.which("bash") is None:
        # Ray uses bash to start workers that have their own environment variables, such as those of a search. Without
        # bash they exit immediately, and Ray restarts them forever.
        raise UsageError(
            "there is no bash on PATH, and Ray needs it to start workers",
            f"PATH is '{os.environ.get('PATH', '')}'",
            "install bash, or add its directory to PATH",
        )
    for name, text in ENVIRONMENT.items():
        os.environ.setdefault(name, text)
    if cluster_address() is None:
        os.environ.update(LOCAL)
        # Other users of this machine can connect to a local Ray's ports, so it requires a token that they cannot read
        if not os.environ.get("RAY_AUTH_TOKEN"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def ray_session(cpus: float, log: Path) -> Iterator[None]:
    """Connect to Ray while the context is open. `cpus`: logical CPUs that a local Ray declares, at least the real ones.

    Ray's output goes to the file `log`. A local Ray keeps its files in a private directory and is stopped on exit;
    after an error its logs are copied to LOGS next to `log`. A cluster keeps running. Inside another session this
    does nothing. Raises RunError if Ray cannot be started or reached, and UsageError if there is no directory for its
    files or no bash. The SIGTERM handler stays in place, also while Ray starts.
    """
    ray_environment()
    remote = cluster_address()
    if remote and remote.startswith("http"):
        raise UsageError(
            f"RAY_ADDRESS is {remote}, the address of a cluster's job API",
            "runs start on the cluster, not on this machine",
            "raylab cluster submit -- python -m jobs.train ..., or unset RAY_ADDRESS",
        )
    import ray

    if ray.is_initialized():  # inside a caller's session
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    with ExitStack() as stack:
        scratch = None if remote else stack.enter_context(_local_scratch())
        stack.enter_context(_to_file(log))
        stack.callback(ray.shutdown)
        if scratch is None:
            _connect(str(remote))
        else:
            _start(cpus, scratch, log)
        try:
            yield
        except Exception:
            if scratch is not None:
                scratch.keep_logs(log.with_name(LOGS))
            raise


def _connect(address: str) -> None:
    import ray

    try:
        with _start_of_ray():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        raise RunError(
            f"no Ray cluster could be reached at {address}",
            _first_line(error),
            "check RAY_ADDRESS and the token (RAY_AUTH_TOKEN_PATH)",
        ) from error


def _start(cpus: float, scratch: Scratch, log: Path) -> None:
    import ray

    for attempt in range(STARTS):
        try:
            with _start_of_ray():
                # without "local", Ray joins whatever cluster a file in a shared directory names
                ray.init(
                    address="local",
                    num_cpus=max(int(-(-cpus // 1)), len(os.sched_getaffinity(0))),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _temp_dir=str(scratch.ray),
                )
            return
        except Exception as error:  # Ray raises a plain Exception when its node starts too slowly
            if attempt < STARTS - 1:
                continue
            scratch.keep_logs(log.with_name(LOGS))
            raise RunError(
                f"a local Ray did not start in {STARTS} attempts",
                _first_line(error),
                f"see {log} and {log.with_name(LOGS)}; on a busy machine, try again later",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _local_scratch() -> Iterator[Scratch]:
    """A private directory for a local Ray. RAY_TMPDIR names it, because Ray's libraries keep lock files there."""
    before = os.environ.get("RAY_TMPDIR")
    with Scratch(default_parents()) as scratch:
        os.environ["RAY_TMPDIR"] = str(scratch.path)
        try:
            yield scratch
        finally:
            if before is None:
                del os.environ["RAY_TMPDIR"]
            else:
                os.environ["RAY_TMPDIR"] = before


@contextmanager
def _start_of_ray() -> Iterator[None]:
    """Wrap `ray.init`: keep the SIGTERM handler, and end all processes of a failed start.

    Ray swallows exceptions of signal handlers in parts of its start, so a SIGTERM is also recorded and raised again at
    the end.
    """
    import ray._private.utils

    us = psutil.Process()
    others = set(us.children())
    before = signal.getsignal(signal.SIGTERM)
    handled = callable(before) and threading.current_thread() is threading.main_thread()
    set_sigterm_handler = ray._private.utils.set_sigterm_handler
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if callable(before):
            before(number, frame)

    try:
        if handled:
            signal.signal(signal.SIGTERM, note)
            ray._private.utils.set_sigterm_handler = lambda handler: None
        yield
        if came:
            raise KeyboardInterrupt
    except BaseException as error:
        for child in set(us.children()) - others:
            for process in (*child.children(recursive=True), child):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        if came and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        ray._private.utils.set_sigterm_handler = set_sigterm_handler
        if handled:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _to_file(log: Path) -> Iterator[None]:
    """Redirect this process's standard output and error to `log`; `jobs.common.progress` still prints to the screen."""
    import sys

    from jobs.common import progress

    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_err = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    progress.stream = os.fdopen(os.dup(kept_out), "w", buffering=1)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept_out, 1)
        os.dup2(kept_err, 2)
        progress.stream.close()
        progress.stream = None
        for fd in (kept_out, kept_err, handle):
            os.close(fd)
