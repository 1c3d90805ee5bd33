"""Where the time of a run's steps goes, measured by each of its workers: times/WORKER.jsonl in the run's directory.

A line is a WorkerPlace, a SumTime or a StepStart. No clock is compared with that of another worker: whoever comes last
to a collective waits for nobody, so the shortest time that any worker spends in the collectives of a step is the time
of the communication itself, and what the others spend beyond it is waiting.
"""

import json
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from raylab.config.recipe import Recipe
from raylab.documents import Document, parse_document
from raylab.files import read_lines
from raylab.training.process_group import ProcessGroup
from raylab.training.shard_tree import nodes_of

FOLDER = "times"
REPEATS = 5  # of each sum, after one that is not counted


class WorkerPlace(Document):
    """Where a worker is, and how busy that was when it began."""

    node: str
    cores: int
    """of the node that this process may use"""
    load: float
    """processes of the node that ran or wanted to, averaged over a minute"""


class SumTime(Document):
    """One sum of a gradient of `elements` elements over `workers` workers, as this worker saw it."""

    elements: int
    workers: int
    sum_seconds: float


class StepStart(Document):
    """The counters of a worker when the step after the first `step` ones began, each in seconds."""

    step: int
    time: float
    collectives: float
    input: float
    cpu: float
    """of all threads of the process"""
    joules: dict[str, float]
    """by "gpu" and "cpu"; what is missing was not measured"""


class StepTimes:
    """Writes the lines of this worker. `elements`: the sizes of the sums that it measures when a group begins."""

    def __init__(
        self,
        directory: Path,
        worker: str,
        recipe: Recipe,
        elements: Sequence[int],
        joules: Callable[[], dict[str, float]],
    ) -> None:
        self.recipe, self.elements, self.read_joules = recipe, elements, joules
        self.path = directory / FOLDER / f"{worker}.jsonl"
        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self._write(WorkerPlace(node=socket.gethostname(), cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0]))

    def measure_sums(self, group: ProcessGroup) -> None:
        """Sum vectors of zeros as a step sums its gradients; a collective. A group of one has nothing to sum."""
        if group.size == 1:
            return
        loop, device = self.recipe.loop, "cuda" if self.recipe.scaling.gpu else "cpu"
        is_exact = loop.gradient_reduction == "exact" or (loop.gradient_reduction == "auto" and device == "cpu")
        for elements in self.elements:
            out = torch.zeros(elements, device=device)
            for repeat in range(REPEATS + 1):
                own = nodes_of(group.own_shards(loop.shards), loop.shards)
                nodes = {node: torch.zeros(elements, device=device) for node in own}
                group.add_up([0])  # they begin together
                self._synchronize()
                began = time.perf_counter()
                if is_exact:
                    group.sum_in_order(nodes, loop.shards, out)
                else:
                    group.sum_in_any_order(nodes, out)
                self._synchronize()
                seconds = time.perf_counter() - began
                if repeat > 0:
                    self._write(SumTime(elements=elements, workers=group.size, sum_seconds=seconds))

    def start_step(self, step: int, group: ProcessGroup, input_seconds: float) -> None:
        """Note the counters before a step. On a GPU this waits until the steps before have been computed."""
        self._synchronize()
        self._write(
            StepStart(
                step=step,
                time=time.perf_counter(),
                collectives=group.seconds,
                input=input_seconds,
                cpu=time.process_time(),
                joules=self.read_joules(),
            )
        )

    def _synchronize(self) -> None:
        if self.recipe.scaling.gpu:
            torch.cuda.synchronize()

    def _write(self, line: Document) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line.to_json()) + "\n")


class WorkerTimes(NamedTuple):
    """What one worker has measured."""

    place: WorkerPlace
    sums: list[SumTime]
    steps: list[StepStart]


class StepParts(Document):
    """The parts of a step in seconds, as means over its workers; they add up to the step."""

    compute: float
    """forward and backward passes, the optimiser, and what the loop itself does"""
    communication: float
    waiting: float
    """for other workers"""
    input: float
    """waiting for the samples of the step"""
    cpu: float
    """CPU time of all workers together, beside the parts"""
    joules: dict[str, float]
    """of all workers together, where all of them measured it"""

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.waiting + self.input


def read_step_times(directory: Path) -> list[WorkerTimes]:
    """What the workers of the run in `directory` have measured. DataError names a line that is damaged."""
    found = []
    for path in sorted((directory / FOLDER).glob("*.jsonl")):
        if not (lines := read_lines(path)):
            continue  # its worker was killed before it had written one
        sums = [parse_document(line, SumTime, path) for line in lines if "sum_seconds" in line]
        steps = [parse_document(line, StepStart, path) for line in lines if "collectives" in line]
        found.append(WorkerTimes(parse_document(lines[0], WorkerPlace, path), sums, steps))
    return found


def split_steps(workers: Iterable[WorkerTimes], numbers: Iterable[int]) -> list[StepParts]:
    """The parts of the steps with these `numbers`, from 1, that all workers have measured from start to end."""
    spans: list[dict[int, tuple[StepStart, StepStart]]] = [
        {end.step: (begin, end) for begin, end in pairwise(worker.steps) if end.step == begin.step + 1}
        for worker in workers
    ]
    return [_split([span[number] for span in spans]) for number in numbers if all(number in span for span in spans)]


def _split(spans: list[tuple[StepStart, StepStart]]) -> StepParts:
    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    seconds = mean(end.time - begin.time for begin, end in spans)
    collectives = [end.collectives - begin.collectives for begin, end in spans]
    loading = mean(end.input - begin.input for begin, end in spans)
    kinds = set.intersection(*(set(begin.joules) & set(end.joules) for begin, end in spans))
    return StepParts(
        compute=seconds - mean(collectives) - loading,
        communication=min(collectives),
        waiting=mean(collectives) - min(collectives),
        input=loading,
        cpu=sum(end.cpu - begin.cpu for begin, end in spans),
        joules={kind: sum(end.joules[kind] - begin.joules[kind] for begin, end in spans) for kind in sorted(kinds)},
    )


def median_sums(workers: Iterable[WorkerTimes]) -> dict[int, float]:
    """Seconds of a sum by its number of elements: the median over repeats of the last worker's time."""
    repeats: dict[int, list[list[float]]] = defaultdict(list)
    for worker in workers:
        own: dict[int, list[float]] = defaultdict(list)
        for one in worker.sums:
            own[one.elements].append(one.sum_seconds)
        for elements, seconds in own.items():
            repeats[elements].append(seconds)
    return {
        elements: statistics.median(min(each) for each in zip(*of_workers, strict=True))
        for elements, of_workers in repeats.items()
    }
