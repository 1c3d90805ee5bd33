"""A connection to Ray: the cluster that RAY_ADDRESS names, or a local one of our own."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylab.errors import RunError, UsageError

OBJECT_STORE_BYTES = 200_000_000  # nothing large goes through it: data is read from files by every worker

# Read by Ray when it is imported, as is the token: nothing may import it before `ray_environment`
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: a report waits for the one before it to be fetched
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves workers on a machine that does anything else
}


def ray_environment() -> None:
    """Set what Ray reads when it is imported: call this before anything imports it."""
    for name, text in ENVIRONMENT.items():
        os.environ.setdefault(name, text)
    if not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_TOKEN" not in os.environ:
        # Other users of this machine can reach a local Ray's ports: they need a token that they cannot read
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def ray_session(cpus: float, log: Path) -> Iterator[None]:
    """Connected to Ray while open. `cpus`: logical CPUs that a local Ray declares, were they more than real ones.

    What Ray prints goes to the file `log`. A local Ray is ended at the end; a cluster is left as it is. Within another
    session this one does nothing.
    """
    ray_environment()
    remote = os.environ.get("RAY_ADDRESS")
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
    with _to_file(log):
        try:
            if remote:
                ray.init(address=remote, log_to_driver=False, logging_level="ERROR")
            else:
                ray.init(
                    num_cpus=max(int(-(-cpus // 1)), len(os.sched_getaffinity(0))),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(
                f"no Ray cluster could be reached at {remote}" if remote else "a local Ray could not be started",
                str(error).splitlines()[0],
                "check RAY_ADDRESS and the token (RAY_AUTH_TOKEN_PATH)" if remote else f"see {log}",
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _to_file(log: Path) -> Iterator[None]:
    """Output of Ray's own threads and child processes goes to `log`; ours goes through `jobs.progress`."""
    import sys

    from jobs import progress

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
