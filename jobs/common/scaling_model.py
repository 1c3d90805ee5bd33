"""How long a step takes on numbers of workers that were not measured: a model, fitted to what was.

A step is the computation of the worker with the most samples, interpolated between measured sizes, and one all-reduce
of the gradient, 2 (N - 1) messages of n / N bytes each for N workers (Thakur, Rabenseifner & Gropp 2005, Int. J. High
Perform. Comput. Appl. 19:49): alpha for each message and beta for each byte. Nobody waits for slower workers in it.
"""

from collections.abc import Mapping
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


def fit_network(sums: Mapping[tuple[int, int], float]) -> Network | None:
    """Fit to the seconds of sums {(workers, bytes): seconds} by least squares of relative errors, with neither constant
    below 0; None unless sums of two sizes or more were measured."""
    from scipy.optimize import nnls  # slow to import, and only a fit needs it

    measured = {key: seconds for key, seconds in sums.items() if key[0] > 1}
    if len({size for _, size in measured}) < 2:
        return None
    seconds = np.array(list(measured.values()))
    terms = np.array([[2 * (n - 1), 2 * (n - 1) / n * size] for n, size in measured]) / seconds[:, None]
    scale = terms.max(axis=0)  # messages and bytes differ by many orders of magnitude
    solution, _ = nnls(terms / scale, np.ones(len(seconds)))
    error = float(np.abs(terms / scale @ solution - 1).max())
    return Network(float(solution[0] / scale[0]), float(solution[1] / scale[1]), error)


def busiest_samples(batch: int, shards: int, workers: int) -> int:
    """How many samples of a batch the worker with the most of them computes (ProcessGroup.own_shards)."""
    sizes = [batch // shards + (shard < batch % shards) for shard in range(shards)]
    return max(sum(sizes[rank * shards // workers : (rank + 1) * shards // workers]) for rank in range(workers))


class StepModel(NamedTuple):
    """Predicts the seconds of a step."""

    compute: dict[int, float]
    """seconds that one process takes for so many samples, inputs included: measured"""
    network: Network
    gradient: int
    """bytes"""

    def covers(self, samples: int) -> bool:
        """Whether so many samples lie between measured sizes."""
        return min(self.compute) <= samples <= max(self.compute)

    def step_seconds(self, workers: int, samples: int) -> float:
        """Seconds of a step on so many workers, of which none computes more than `samples`."""
        sizes = sorted(self.compute)
        own = float(np.interp(samples, sizes, [self.compute[size] for size in sizes]))
        return own + self.network.sum_seconds(workers, self.gradient)
