"""One point of a scaling benchmark: some steps of a recipe on a number of workers, and where their time goes.

Importing it loads torch.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.common.scaling_model import busiest_samples
from jobs.common.workers import start_workers
from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.documents import Document
from raylab.energy import open_counters
from raylab.errors import RunError
from raylab.score import Score
from raylab.training import ledger
from raylab.training.progress import Metrics
from raylab.training.run import execute, load_samples
from raylab.training.step_times import StepParts, StepTimes, WorkerTimes, median_sums, read_step_times, split_steps

WARM_UP = 10  # steps before those that count: in the first ones passes are checked (shard_gradients.CHECKS)
RESAMPLES = 1000
PARTS = ("compute", "communication", "waiting", "input")
FLOAT_BYTES = 4

Scaling = Literal["process", "strong", "weak"]
"""process: this one, without Ray; strong: the same batch on all numbers of workers; weak: the same batch per worker"""


class Point(Document):
    """What was measured; times are seconds of a step, as means over the steps and the workers."""

    scaling: Scaling
    workers: int
    """0: this process, without Ray"""
    batch: int
    shards: int
    busiest: int
    """samples of the worker with the most of them"""
    steps: int
    """measured ones"""
    step: Score
    """with a 95% interval over resamples of the steps"""
    parts: StepParts
    """of `step`; the joules are by "gpu" and "cpu", and what is missing was not measured"""
    cores: float
    """of the nodes of the workers together"""
    cores_used: int
    """threads that compute, of all workers"""
    nodes: int
    load: float
    """the highest load of a node before the start, as processes per core"""
    sums: dict[int, float]
    """seconds of a sum between the workers, by bytes"""

    @property
    def seconds(self) -> float:
        assert self.step.value is not None
        return self.step.value

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.batch / self.seconds

    @property
    def shares_cores(self) -> bool:
        return self.cores_used > self.cores


class _EnoughSteps(Exception):
    """Raised in the loop after the last step that is measured."""


def measure(
    recipe: Recipe, data: Path, directory: Path, samples: int, parameters: int, steps: int, scaling: Scaling
) -> Point:
    """Train the recipe on its workers in `directory`, of data with so many training samples, up to the last step that
    is measured. The sums that the workers measure have up to `parameters` elements.

    Raises RunError if workers came or went meanwhile, and the errors of a run.
    """
    per_epoch = steps_per_epoch(samples, recipe.loop.global_batch_size)
    numbers = choose_steps(per_epoch, steps)
    recipe = override(recipe, {"loop.epochs": numbers[-1] // per_epoch + 2})

    def stop(rows: list[Metrics]) -> None:
        if rows and rows[-1]["step"] > numbers[-1]:
            raise _EnoughSteps

    if recipe.scaling.workers[1] == 0:
        train_here(recipe, data, directory, stop)
    else:
        train_on_ray(recipe, data, directory, stop, sum_sizes(parameters))
    workers = read_step_times(directory)
    check_undisturbed(directory, workers, max(1, recipe.scaling.workers[1]))
    return describe(recipe, scaling, workers, split_steps(workers, numbers))


def choose_steps(per_epoch: int, count: int) -> list[int]:
    """The numbers of the first `count` steps after the warm-up that do not end an epoch: those also score it, and have
    what is left of the samples."""
    numbers = (step for step in range(WARM_UP + 1, WARM_UP + 2 * count + 2) if step % per_epoch != 0)
    return [next(numbers) for _ in range(count)]


def sum_sizes(parameters: int) -> list[int]:
    """Numbers of elements of the sums that are measured: those of the gradient, and of two smaller vectors."""
    return sorted({max(1, parameters // part) for part in (256, 16, 1)})


def train_here(recipe: Recipe, data: Path, directory: Path, stop: Callable[[list[Metrics]], None]) -> None:
    joules = open_counters(recipe.scaling.gpu, 1.0)

    def send(rows: list[Metrics]) -> int:
        stop(rows)
        return int(rows[-1]["step"]) if rows else 0

    with suppress(_EnoughSteps):
        execute(
            recipe,
            *load_samples(recipe, data),
            directory,
            send,
            step_times=StepTimes(directory, "worker-0", recipe, (), joules),
        )


def train_on_ray(
    recipe: Recipe, data: Path, directory: Path, stop: Callable[[list[Metrics]], None], sums: list[int]
) -> None:
    with start_workers(recipe) as workers, suppress(_EnoughSteps):  # no error, at which Ray's session keeps its logs
        workers(directory / "ray.log").train(recipe, data, directory, stop, time_sums=sums)


def check_undisturbed(directory: Path, workers: list[WorkerTimes], expected: int) -> None:
    """Raise RunError unless one group of workers has trained from start to end."""
    groups = ledger.groups(ledger.read_ledger(directory / ledger.FILE))
    if len(workers) != expected or [group.workers for group in groups] != [expected]:
        sizes = ", ".join(str(group.workers) for group in groups)
        raise RunError(
            f"the measurement on {expected} worker(s) was disturbed",
            f"{len(workers)} worker(s) took part, in groups of {sizes or 'none'}",
            "run the same command again: it goes on from the points that are finished",
        )


def describe(recipe: Recipe, scaling: Scaling, workers: list[WorkerTimes], parts: list[StepParts]) -> Point:
    """The point that these steps are. Raises RunError without two of them."""
    if len(parts) < 2:
        raise RunError(f"only {len(parts)} step(s) were measured", do="run the same command again, with more --steps")
    loop = recipe.loop
    count = max(1, recipe.scaling.workers[1])
    nodes = {worker.place.node: worker.place for worker in workers}
    return Point(
        scaling=scaling,
        workers=recipe.scaling.workers[1],
        batch=loop.global_batch_size,
        shards=loop.shards,
        busiest=busiest_samples(loop.global_batch_size, loop.shards, count),
        steps=len(parts),
        step=mean_score([part.seconds for part in parts]),
        parts=mean_parts(parts),
        cores=sum(place.cores for place in nodes.values()),
        cores_used=count * loop.threads,
        nodes=len(nodes),
        load=max(place.load / place.cores for place in nodes.values()),
        sums={FLOAT_BYTES * elements: seconds for elements, seconds in median_sums(workers).items()},
    )


def mean_parts(parts: list[StepParts]) -> StepParts:
    """The means over steps, of joules where all of them have measured it."""

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    kinds = set.intersection(*(set(part.joules) for part in parts))
    return StepParts(
        **{name: mean([getattr(part, name) for part in parts]) for name in (*PARTS, "cpu")},
        joules={kind: mean([part.joules[kind] for part in parts]) for kind in sorted(kinds)},
    )


def mean_score(values: list[float]) -> Score:
    """The mean with its 95% percentile interval over resamples of the values."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return Score(value=float(np.mean(values)), low=float(low), high=float(high))


def count_parameters(recipe: Recipe, data: Path) -> int:
    """The number of elements of the gradient."""
    from raylab.tasks import find_task

    task = find_task(recipe.task)
    model: Any = task.model(recipe, task.load(data, "train", recipe.data, None).spec)
    return sum(weight.numel() for weight in model.parameters())
