"""Means and standard deviations over several sites, from sums that each forms of its own values."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CLEAR = 5.0  # standard deviations
LEAST_STD = 0.02  # of values between 0 and 1


def sum_moments(n: Floats, mean: Floats, std: Floats) -> Floats:
    """Return n, n * mean and n * (std^2 + mean^2), [3 * K], of K inputs with `n` values each [K]; they add up over
    sites, and none exceeds `n` if the values are between 0 and 1."""
    return np.concatenate([n, n * mean, n * (std * std + mean * mean)])


def settle_moments(sums: Floats, noise: float) -> Floats:
    """Return `sums` that have noise of standard deviation `noise` as `sum_moments` that values between 0 and 1 can
    have: an input whose number of values is less than CLEAR times the noise has none, and a standard deviation is at
    least LEAST_STD."""
    n, first, second = sums.reshape(3, -1)
    is_clear = n > CLEAR * noise
    counted = np.where(is_clear, n, 1.0)
    mean = np.clip(first / counted, 0.0, 1.0)
    std = np.sqrt(np.clip(second / counted - mean * mean, LEAST_STD**2, 0.25))
    return sum_moments(*(np.where(is_clear, each, 0.0) for each in (n, mean, std)))


def pool_moments(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Return (n, mean, std), each [K], of all sites whose `sum_moments` add up to `sums`; mean and std are 0 where
    there is no value."""
    n, first, second = sums.reshape(3, -1)
    counted = np.maximum(n, 1.0)
    mean = first / counted
    return n, mean, np.sqrt(np.maximum(0.0, second / counted - mean * mean))
