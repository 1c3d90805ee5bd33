"""The connection to Ray: to the cluster that RAY_ADDRESS names, or to a local Ray started here."""

import gc
import logging
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from jobs.common import home
from jobs.common.warm_ray import WarmRay, find_usable
from raylab.errors import RunError, UsageError
from raylab.scratch import Scratch, default_parents
from raylab.training.run_record import RESUMABLE
from raylab.witness import SIGNALS

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200_000_000  # small, because every worker reads its data from files

LOGS = "ray-logs"  # directory next to a session's log
T = TypeVar("T")
END_SECONDS = 60.0  # that a start of Ray and its end may take
STARTS = 3  # attempts to start a local Ray, which gives its helper processes 15 s: too little on a busy machine

stuck: "list[_Connection[Any]]" = []  # whose Ray did not end in time

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
    "RAY_kill_worker_timeout_milliseconds": "1000",  # a worker that hangs is killed after so long, not after 5 s
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None for a local Ray (unset, empty or "local")."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def ray_environment() -> WarmRay | None:
    """Set the variables that Ray reads at import; call this before anything imports Ray.

    Returns the Ray that is kept running for commands like this one, if there is one and RAY_ADDRESS names no cluster.
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
    if cluster_address() is not None:
        return None
    os.environ.update(LOCAL)
    warm = find_usable()
    # Other users of this machine can connect to a local Ray's ports, so it requires a token that they cannot read
    token = os.environ.get("RAY_AUTH_TOKEN") or (warm.token if warm else secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN"] = token
    return warm if warm and warm.token == token else None


@contextmanager
def ray_session(cpus: float, log: Path) -> Iterator[None]:
    """Connect to Ray while the context is open, see `ray_ahead`; its output goes to the file `log`."""
    with ray_ahead(cpus, lambda: None) as connect:
        connect(log)
        yield


@contextmanager
def ray_ahead(cpus: float, prepare: Callable[[], T]) -> Iterator[Callable[[Path], T]]:
    """Connect to Ray, and call `prepare`, in a thread of its own, while the caller checks its input.

    Yields the function that waits for both and returns what `prepare` returned. From then on the output of this
    process, and so of Ray, goes to the file that it is given (`jobs.common.console` still prints to the screen). It
    raises RunError if Ray cannot be started or reached.

    `cpus`: logical CPUs that a local Ray declares, at least the real ones. A local Ray keeps its files in a private
    directory and is stopped on exit; after an error its logs are copied to LOGS next to the log. A cluster keeps
    running, and so does the Ray of `raylab warm`, which is used where it suits (warm_ray.py). Inside another session
    `prepare` alone is called. Raises UsageError if there is no directory for Ray's files or no bash.
    """
    warm = ray_environment()
    if warm is not None and warm.cpus < cpus:
        log.warning(f"the Ray that raylab warm keeps running is not used: it has {warm.cpus} of {cpus:g} CPUs")
        warm = None
    remote = cluster_address()
    if remote and remote.startswith("http"):
        raise UsageError(
            f"RAY_ADDRESS is {remote}, the address of a cluster's job API",
            "runs start on the cluster, not on this machine",
            "raylab cluster submit -- python -m jobs.train ..., or unset RAY_ADDRESS",
        )
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # inside a caller's session
        yield lambda log: prepare()
        return
    with ExitStack() as stack:
        scratch = None
        if warm is not None:
            remote = warm.address
            stack.enter_context(_library_files(Path(warm.directory)))
        elif remote is None:
            scratch = stack.enter_context(Scratch(default_parents()))
            stack.enter_context(_library_files(scratch.path))
        output = stack.enter_context(ExitStack())  # ends after Ray, which writes until its end
        connection = stack.enter_context(_Connection(cpus, remote, scratch, prepare))
        logs: list[Path] = []

        def connect(log: Path) -> T:
            output.enter_context(_to_file(log))
            logs.append(log)
            return connection.wait(log)

        try:
            yield connect
        except Exception:
            if scratch is not None and logs:
                scratch.keep_logs(logs[0].with_name(LOGS))
            raise


def exit_if_stuck(code: int) -> None:
    """End this process with `code`, and its local Ray, if Ray has not ended in END_SECONDS; call this last of all.

    Where Ray's GCS does not answer, as on a machine without a free core, Ray waits for it without a limit, and so does
    what Ray and Tune do when an interpreter ends.
    """
    alive = [connection for connection in stuck if connection.thread.is_alive()]
    if not alive:
        return
    log.warning("Ray did not end within %.0f s; its processes are killed", END_SECONDS)
    for connection in alive:
        connection.kill()
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError):
            file.flush()
    os._exit(code)


class _Connection(Generic[T]):
    """The thread that connects to Ray and holds the connection.

    Ray swallows exceptions of signal handlers in parts of its start, so that an interrupt must not find the main thread
    there. The thread lasts as long as the connection, because the kernel ends Ray's processes with the thread that
    started them (PR_SET_PDEATHSIG).
    """

    def __init__(self, cpus: float, address: str | None, scratch: Scratch | None, prepare: Callable[[], T]) -> None:
        self.cpus, self.address, self.scratch, self.prepare = cpus, address, scratch, prepare
        self.result: list[T] = []
        self.error: Exception | None = None
        self.has_started, self.must_end = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="ray-session", daemon=True)

    def __enter__(self) -> "_Connection[T]":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.must_end.set()
        # A start is waited for: if Ray's processes ended in the middle of it, Ray would end this process as well
        self.thread.join(END_SECONDS)
        if self.thread.is_alive():
            stuck.append(self)

    def wait(self, log: Path) -> T:
        """What `prepare` returned, once Ray is connected; raises RunError if it cannot be."""
        self.has_started.wait()
        if self.result:
            return self.result[0]
        why = (str(self.error).splitlines() or [type(self.error).__name__])[0]
        then = describe_continuation(log.parent)
        if self.scratch is None:
            do = "check RAY_ADDRESS and the token (RAY_AUTH_TOKEN_PATH)" if cluster_address() else "raylab warm --stop"
            what = f"no Ray cluster could be reached at {self.address}"
            raise RunError(what, why, f"{do}; then: {then}") from self.error
        do = f"see {log} and {log.with_name(LOGS)}, or wait until the machine is less busy; then: {then}"
        raise RunError(f"a local Ray did not start in {STARTS} attempts", why, do) from self.error

    def _run(self) -> None:
        # A closed terminal, Ctrl+C and Slurm signal every process. Ray's processes inherit this mask and stay until we
        # have recorded how the run ended: without them Ray ends this process.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for _ in range(STARTS if self.scratch is not None else 1):
            try:
                self._connect()
                self.result.append(self.prepare())
                break
            except Exception as error:  # Ray raises a plain Exception when its node starts too slowly
                self.error = error
                self._disconnect()
            if self.must_end.is_set():
                break
        self.has_started.set()
        self.must_end.wait()
        self._disconnect()

    def _disconnect(self) -> None:
        if "ray" not in sys.modules:
            return
        processes = [] if self.scratch is None else _list_processes(self.scratch)
        with _no_garbage():
            sys.modules["ray"].shutdown()
        _kill(processes)  # Ray's agents are told to end by a signal that they block

    def kill(self) -> None:
        """Kill the processes of a local Ray."""
        if self.scratch is not None:
            _kill(_list_processes(self.scratch))

    def _connect(self) -> None:
        import ray
        import ray._private.utils

        for name in ("ray", "ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # SIGTERM stays ours: outside the main thread Ray's attempt to handle it would fail
        set_sigterm_handler = ray._private.utils.set_sigterm_handler
        ray._private.utils.set_sigterm_handler = lambda handler: None
        try:
            if self.scratch is None:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
                return
            # without "local", Ray joins whatever cluster a file in a shared directory names
            ray.init(
                address="local",
                num_cpus=max(int(-(-self.cpus // 1)), len(os.sched_getaffinity(0))),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(self.scratch.ray),
            )
            for process in chain(*ray._private.worker._global_node.all_processes.values()):
                process.process.terminate = process.process.kill  # instead of a signal that they block
        finally:
            ray._private.utils.set_sigterm_handler = set_sigterm_handler


def describe_continuation(directory: Path) -> str:
    """The command that continues the work whose files are in `directory`."""
    is_run = home.is_open(directory) and home.note(directory).kind in RESUMABLE
    return f"raylab resume {directory.name}" if is_run else "the same command again"


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Collect all garbage, then none while the context is open.

    While Ray shuts down, whoever frees a reference to one of its objects ends this process, with exit code 1 and
    without a word. So would any thread, such as the one that sends to MLflow, that happened to collect Tune's garbage.
    """
    caller = threading.get_ident()
    own: list[str] = []

    def note(phase: str, info: object) -> None:
        if threading.get_ident() == caller:
            own.append(phase)

    was_enabled = gc.isenabled()
    gc.disable()
    gc.callbacks.append(note)
    try:
        while gc.collect() == 0 and not own:  # it does nothing, and calls nobody, while another thread collects
            time.sleep(0.01)
        yield
    finally:
        gc.callbacks.remove(note)
        if was_enabled:
            gc.enable()


def _list_processes(scratch: Scratch) -> list[psutil.Process]:
    """All processes of the Ray in `scratch`."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if str(scratch.ray) in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _library_files(directory: Path) -> Iterator[None]:
    """Let Ray's libraries keep their lock files in the private `directory` of a local Ray."""
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before


@contextmanager
def _to_file(log: Path) -> Iterator[None]:
    """Redirect this process's standard output and error to `log`; `jobs.common.console` still prints to the screen."""
    from jobs.common import console

    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept_out, kept_err = os.dup(1), os.dup(2)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    console.stream = os.fdopen(os.dup(kept_out), "w", buffering=1, errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept_out, 1)
        os.dup2(kept_err, 2)
        console.stream.close()
        console.stream = None
        for fd in (kept_out, kept_err, handle):
            os.close(fd)
