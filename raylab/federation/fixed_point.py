"""Sums as integers modulo 2^64, whose result does not depend on the order or the place of the additions.

A value is multiplied by 2^exponent and rounded to an integer. The exponent follows from a bound on the magnitude of
the sum that is agreed beforehand: the largest power of two that keeps the sum within 2^62. Addition wraps around, so
masks that are uniform over all 64-bit integers can be added and cancel exactly.
"""

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from raylab.errors import NonFiniteError

BITS = 62  # of the largest sum; the rest is the sign, and room for rounding

Integers = NDArray[np.int64]


def exponent_for(bound: float) -> int:
    """Return the exponent for sums of a magnitude of at most `bound`."""
    return BITS - math.ceil(math.log2(bound))


def check(values: NDArray[np.float64], bound: float, what: str) -> None:
    """Raise NonFiniteError, which names `what` they are, unless all `values` are finite and within `bound`."""
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{what}: a value is NaN or infinite", "it overflowed or is undefined", "lower optim.lr")
    if values.size and float(np.abs(values).max()) > bound * (1 + 1e-6):
        raise NonFiniteError(
            f"{what}: a value of {float(np.abs(values).max()):.3g} exceeds the agreed bound {bound:.3g}",
            "the sum of all sites could wrap around",
            "lower optim.lr, or check the inputs",
        )


def encode(values: NDArray[np.float64], bound: float, what: str) -> Integers:
    """Return `values` as integers for sums within `bound`, rounded to the nearest. Raises NonFiniteError as `check`."""
    check(values, bound, what)
    return np.rint(np.ldexp(values, exponent_for(bound))).astype(np.int64)


def decode(integers: Integers, bound: float) -> NDArray[np.float64]:
    """Return the values of a sum that `encode` began."""
    return np.ldexp(integers.astype(np.float64), -exponent_for(bound))


def add_all(parts: Sequence[Integers]) -> Integers:
    """Return the sums of one or more `parts` modulo 2^64."""
    return reduce(add, parts)


def add(left: Integers, right: Integers) -> Integers:
    """Return the sums modulo 2^64."""
    total: Integers = (left.view(np.uint64) + right.view(np.uint64)).view(np.int64)
    return total
