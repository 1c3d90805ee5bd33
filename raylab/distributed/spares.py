"""Worker processes that have imported what training needs before any run asks for them: on a Ray that is kept running.

Whoever keeps that Ray (jobs/common/keep_ray.py) makes them; a run's Supervisor takes them. One that a run has had is
ended with it and never used again.
"""

from typing import Any

import ray

from raylab.distributed.worker import Worker

NAME, NAMESPACE = "spares", "raylab"


class Spares:
    """The actor that hands out idle workers, each once."""

    def __init__(self) -> None:
        self.idle: list[Any] = []

    def add(self, worker: Any) -> None:
        self.idle.append(worker)

    def take(self) -> Any:
        """An idle worker; None if there is none."""
        return self.idle.pop(0) if self.idle else None

    def count(self) -> int:
        return len(self.idle)


def create_pool() -> Any:
    """The pool of the connected Ray, without any worker yet. It ends with the process that calls this."""
    return ray.remote(num_cpus=0)(Spares).options(name=NAME, namespace=NAMESPACE).remote()


def add_worker(pool: Any) -> None:
    """Add a worker to `pool` once it has imported what training needs."""
    # Without CPUs of its own, so that it takes none from runs while it is idle; the Allocator counts those of a run
    worker = ray.remote(num_cpus=0)(Worker).remote()
    ray.get(worker.load_libraries.remote())
    ray.get(pool.add.remote(worker))


def find_pool() -> Any:
    """The pool of the connected Ray; None if it keeps no spares."""
    try:
        return ray.get_actor(NAME, NAMESPACE)
    except ValueError:
        return None
