"""How long a step takes on numbers of workers that were not measured: a model, fitted to what was.

A step is the computation of the worker with the most samples, interpolated between measured sizes, and one all-reduce
of the gradient, 2 (N - 1) messages of n / N bytes each for N workers (Thakur, Rabenseifner & Gropp 2005, Int. J. High
Perform. Comput. Appl. 19:49): alpha for each message and beta for each byte. Nobody waits for slower workers in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Network(NamedTuple):
    """The alpha-beta model of sums between workers."""

    alpha: float
    """seconds for each message"""
    beta: float
    """seconds for each byte"""
    error: float
    """largest relative error at the sums to which it was fitted"""

    def sum_seconds(self, workers: int, size: float) -> float:
        """Seconds of the sum of `size` bytes over so many workers."""
        return self.alpha * 2 * (workers - 1) + self.beta * 2 * (workers - 1) / workers * size


class Sum(NamedTuple):
    """A measured sum between workers."""

    workers: int
    size: int
    """bytes"""
    seconds: float


def fit_network(sums: Sequence[Sum]) -> Network | None:
    """Fit to measured sums by least squares of relative errors, with neither constant below 0; None unless they have
    two sizes or more."""
    from scipy.optimize import nnls  # slow to import, and only a fit needs it

    if len({one.size for one in sums if one.workers > 1}) < 2:
        return None
    ones = [one for one in sums if one.workers > 1]
    terms = np.array(
        [
            [2 * (n - 1) / seconds, 2 * (n - 1) / n * size / seconds]  # messages and bytes, in measured times
            for n, size, seconds in ones
        ]
    )
    scale = terms.max(axis=0)  # they differ by many orders of magnitude
    solution, _ = nnls(terms / scale, np.ones(len(ones)))
    error = float(np.abs(terms / scale @ solution - 1).max())
    return Network(float(solution[0] / scale[0]), float(solution[1] / scale[1]), error)


def busiest_samples(batch: int, shards: int, workers: int) -> int:
    """How many samples of a batch the worker with the most of them computes (ProcessGroup.own_shards)."""
    sizes = [batch // shards + (shard < batch % shards) for shard in range(shards)]
    return max(sum(sizes[rank * shards // workers : (rank + 1) * shards // workers]) for rank in range(workers))


class StepModel(NamedTuple):
    """Predicts the seconds of a step."""

    compute: dict[int, float]
    """seconds that a worker takes for so many samples, inputs included"""
    network: Network
    gradient: int
    """bytes"""

    def covers(self, samples: int) -> bool:
        """Whether so many samples lie between the sizes, or a tenth above, as where shards are uneven."""
        return min(self.compute) <= samples <= 1.1 * max(self.compute)

    def step_seconds(self, workers: int, samples: int) -> float:
        """Seconds of a step on so many workers, of which none computes more than `samples`."""
        sizes = sorted(self.compute)
        own = float(np.interp(samples, sizes, [self.compute[size] for size in sizes])) * max(1.0, samples / sizes[-1])
        return own + self.network.sum_seconds(workers, self.gradient)
