"""The process that keeps a Ray running for later commands (warm_ray.py), until it is idle or told to end.

    python -m jobs.common.keep_ray WORKERS

WORKERS processes have imported what training needs and wait for a run. Those that a run took are replaced.
"""

import contextlib
import os
import signal
import sys
import time
from typing import Any

from jobs.common.home import home
from jobs.common.session import exit_if_stuck, ray_session
from jobs.common.warm_ray import WarmRay, identify, record_file
from raylab.files import locked, write_json
from raylab.processes import StartedProcess

IDLE_SECONDS = 1800.0  # without a command, after which the Ray ends
REFILL_SECONDS = 20.0  # before spare workers are replaced: a run that has just taken them starts without their imports
LOOK_SECONDS = 1.0
LOG = "warm-ray.log"  # in the home


def keep(workers: int) -> None:
    """Start a Ray with `workers` spare ones, write its record, and attend to it until it may end."""
    identity, record = identify(), record_file()
    with locked(record.with_suffix(".lock"), wait=False) as is_only_one:
        if not is_only_one:
            return
        with ray_session(workers, home() / LOG):
            import ray

            from raylab.distributed.spares import add_worker, create_pool

            pool = create_pool()
            for _ in range(workers):
                add_worker(pool)
            warm = WarmRay(
                address=ray.get_runtime_context().gcs_address,
                token=os.environ["RAY_AUTH_TOKEN"],
                cpus=int(ray.cluster_resources()["CPU"]),
                directory=os.environ["RAY_TMPDIR"],
                identity=identity,
                **StartedProcess.of(os.getpid()).to_json(),
            )
            write_json(record, warm.to_json())
            try:
                attend(pool, workers)
            finally:
                record.unlink(missing_ok=True)


def attend(pool: Any, workers: int) -> None:
    """Replace spare workers that runs took; returns when no command has used this Ray for IDLE_SECONDS."""
    import ray

    from raylab.distributed.spares import add_worker

    used_at = full_at = time.monotonic()
    while time.monotonic() - used_at < IDLE_SECONDS:
        time.sleep(LOOK_SECONDS)
        if is_used():
            used_at = time.monotonic()
        if ray.get(pool.count.remote()) == workers:
            full_at = time.monotonic()
        elif time.monotonic() - full_at > REFILL_SECONDS:
            add_worker(pool)


def is_used() -> bool:
    """Whether another process is connected to this Ray."""
    import ray

    own = ray.get_runtime_context().get_job_id()
    return any(not job["IsDead"] and job["JobID"] != own for job in ray._private.state.state.job_table())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with contextlib.suppress(SystemExit):  # it was told to end
        keep(int(sys.argv[1]))
    exit_if_stuck(0)
