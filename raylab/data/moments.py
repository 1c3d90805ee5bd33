"""Means and standard deviations over several sites, from sums that each forms of its own values."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sum_moments(n: Floats, mean: Floats, std: Floats) -> Floats:
    """Return n, n * mean and n * (std^2 + mean^2), [3 * K], of K inputs with `n` values each [K]; they add up over
    sites, and none exceeds `n` if the values are between 0 and 1."""
    return np.concatenate([n, n * mean, n * (std * std + mean * mean)])


def pool_moments(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (n, mean, std), each [K], of all sites whose `sum_moments` add up to `sums`; mean and std are 0 where
    there is no value."""
    n, first, second = sums.reshape(3, -1)
    counted = np.maximum(n, 1.0)
    mean = first / counted
    return n, mean, np.sqrt(np.maximum(0.0, second / counted - mean * mean))
