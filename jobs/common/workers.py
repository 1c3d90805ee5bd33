"""The workers of a run, started in the background."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.session import ray_ahead
from raylab.config.recipe import Recipe

if TYPE_CHECKING:  # it imports Ray
    from raylab.distributed.train import Supervisor

StartedWorkers = Callable[[Path], "Supervisor"]
"""Waits until the workers of a run are there, with the file for Ray's output."""


@contextmanager
def start_workers(recipe: Recipe) -> Iterator[StartedWorkers]:
    """Start Ray and the run's workers in the background, if the recipe has any."""
    made: list[Supervisor] = []

    def supervise() -> "Supervisor":
        from raylab.distributed.train import Supervisor

        made.append(Supervisor(recipe))
        return made[0]

    high = recipe.scaling.workers[1]
    if high == 0:
        yield lambda log: supervise()
        return
    with ray_ahead(high * recipe.scaling.cpus_per_worker, supervise) as workers:
        try:
            yield workers
        finally:
            for supervisor in made:
                supervisor.close()
