"""A connection to Ray: the cluster that RAY_ADDRESS names, or a local one of our own."""

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

OBJECT_STORE_BYTES = 200_000_000  # nothing large goes through it: data is read from files by every worker

LOGS = "ray-logs"  # beside a session's log
STARTS = 3  # of a local Ray, which gives its own helpers 15 s: on a busy machine they may need another go

# Read by Ray when it is imported, as is the token: nothing may import it before `ray_environment`
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else Ctrl+C ends a search as if it had finished
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # it takes SIGTERM too, and aborts the process after 3 s
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves workers on a machine that does anything else
}
# Of a local Ray only. Off Linux, Ray keeps to loopback unless this variable asks for a cluster; at "0" it does so here
# too: node address, gRPC and all. No metrics are served: -1 is no port, and Ray goes on without that server.
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "false",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None for a local Ray, which Ray also calls "local"."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def ray_environment() -> None:
    """Set what Ray reads when it is imported: call this before anything imports it.

    Raises UsageError where a local Ray could not start workers.
    """
    if cluster_address() is None and shutil.which("bash") is None:
        # It starts workers with environment variables of their own, as those of a search, through bash. Without it they
        # die at once, and Ray starts them again without end.
        raise UsageError(
            "there is no bash on PATH, and Ray starts workers with it",
            f"PATH is '{os.environ.get('PATH', '')}'",
            "install bash, or add its directory to PATH",
        )
    for name, text in ENVIRONMENT.items():
        os.environ.setdefault(name, text)
    if cluster_address() is None:
        os.environ.update(LOCAL)
        # Other users of this machine can reach a local Ray's ports: they need a token that they cannot read
        if not os.environ.get("RAY_AUTH_TOKEN"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def ray_session(cpus: float, log: Path) -> Iterator[None]:
    """Connected to Ray while open. `cpus`: logical CPUs that a local Ray declares, were they more than real ones.

    What Ray prints goes to the file `log`. A local Ray keeps its files in a private directory and is ended at the end;
    when that is an error, its own logs are copied to LOGS beside `log`. A cluster is left as it is. Within
    another session this one does nothing. Raises RunError where Ray cannot be started or reached, and UsageError where
    there is no place for its files or no bash. SIGTERM keeps its handler, also while Ray starts.
    """
    ray_environment()
    remote = cluster_address()
    if remote and remote.startswith("http"):
        raise UsageError(
            f"RAY_ADDRESS is {remote}, the address of a cluster's job API",
            "drivers run on the cluster, not here",
            "raylab cluster submit -- python -m jobs.train ..., or unset RAY_ADDRESS",
        )
    import ray

    if ray.is_initialized():  # a caller's session serves
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
                # "local": without it, Ray joins whatever cluster a file in a shared directory names
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
        except Exception as error:  # of any kind: Ray raises a plain Exception when its node is late
            if attempt < STARTS - 1:
                continue
            scratch.keep_logs(log.with_name(LOGS))
            raise RunError(
                f"a local Ray could not be started, {STARTS} times",
                _first_line(error),
                f"see {log} and {log.with_name(LOGS)}; on a busy machine, try again later",
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _local_scratch() -> Iterator[Scratch]:
    """A private directory for a local Ray, which its workers know too: Ray's libraries keep lock files there."""
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
    """Around `ray.init`: SIGTERM keeps its handler, and a failed start leaves no process.

    Ray swallows what a handler raises in some places of its start: a SIGTERM is noted too, and raised at the end.
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
    """Output of Ray's own threads and child processes goes to `log`; ours goes through `jobs.common.progress`."""
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
