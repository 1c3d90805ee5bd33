"""Differential privacy of a run across sites: the budget that the sites agree on, and what training spends of it.

The unit is a patient: two runs are neighbours if one of them gets nothing in the place of all rows of one patient, at
one site. The number of rows, and which step reads which row, are the same in both: neither is protected. What leaves a
site and depends on values is a sum over rows or patients, each of whose parts has a bounded norm (clipping), plus
discrete Gaussian noise of the site. Rows come in a fixed order, so no privacy amplification by subsampling is claimed.

A participant that knows the noise of the colluding sites sees the sum of the noise of the others alone, so that is what
counts. The sum of k discrete Gaussians of parameter sigma is not one, but Kairouz, Liu and Steinke (ICML 2021, arXiv
2102.06387) bound the difference by tau = 10 sum_{j<k} exp(-2 pi^2 sigma^2 j / (j + 1)); with SIGMA it is 0 in double
precision.

Accounting is by zero-concentrated differential privacy (zCDP): a sum that a patient can change by D, with noise of
variance s^2, costs rho = D^2 / (2 s^2), and the rho of all sums add up (Canonne, Kamath and Steinke, arXiv 2004.00010,
Theorem 4; Bun and Steinke, TCC 2016). Each patient is accounted by the steps that read the patient's rows, which
follow from the order of rows alone; the largest sum over all patients is what a site spends.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from raylab.federation.discrete_gaussian import LARGEST_SIGMA

SIGMA = LARGEST_SIGMA
"""the noise of one site, in integers: the scale of the values follows from it"""
MOST_VALUES = 2**24
"""of a sum with noise: the rounding of so many values to integers is in the accounts"""
ARITHMETIC = 1 + 1e-6
"""by how much a clipped norm may exceed its bound, because its own computation is rounded"""
DEFAULT_BOUND = 1.0
"""norm of the gradient of a row"""
LOSS_BOUND = 4.0
"""of a validation row; a larger loss counts as this one"""


class Privacy(BaseModel):
    """The privacy budget that the sites agree on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    noise_multiplier: float = Field(ge=1e-3, le=1e6)
    """standard deviation of the noise that counts, divided by the bound on the part of one row"""
    colluding_sites: int = Field(ge=1)
    """how many sites may put together what they know, noise included"""

    def scale(self, sites: int, bound: float) -> float:
        """Return how many integers stand for 1, so that the noise of `sites` sites fits parts of norm `bound`."""
        return SIGMA * math.sqrt(sites - self.colluding_sites) / (self.noise_multiplier * bound)

    def deviation(self, sites: int, bound: float) -> float:
        """Return the standard deviation of the noise of all sites in a sum whose parts have norm `bound`."""
        return SIGMA * math.sqrt(sites) / self.scale(sites, bound)

    def rho(self, sites: int, participation: int) -> float:
        """Return what a patient spends whose parts of all sums, in bounds and squared, add up to `participation`."""
        rounding = math.sqrt(MOST_VALUES) / (2 * SIGMA * math.sqrt(sites - self.colluding_sites))
        return participation * (ARITHMETIC / self.noise_multiplier + rounding) ** 2 / 2

    def spent_epsilon(self, sites: int, participation: int) -> float:
        """Return the epsilon, at the agreed delta, of a patient with this `participation`."""
        return epsilon_of(self.rho(sites, participation), self.delta)

    def find_multiplier(self, sites: int, participation: int) -> float:
        """Return the noise multiplier, rounded up to three digits, with which this `participation` keeps the budget;
        infinity if none does."""
        low, high = -3.0, 6.0  # powers of ten
        if self._with(10**high).spent_epsilon(sites, participation) > self.epsilon:
            return math.inf
        for _ in range(40):
            middle = (low + high) / 2
            keeps = self._with(10**middle).spent_epsilon(sites, participation) <= self.epsilon
            low, high = (low, middle) if keeps else (middle, high)
        digits = 2 - math.floor(high)
        return float(math.ceil(10 ** (high + digits)) / 10.0**digits)

    def _with(self, noise_multiplier: float) -> "Privacy":
        return self.model_copy(update={"noise_multiplier": noise_multiplier})


def epsilon_of(rho: float, delta: float) -> float:
    """Return an epsilon such that rho-zCDP implies (epsilon, delta)-differential privacy.

    It is the minimum over orders a of a rho + log(1 - 1/a) + log(1 / (a delta)) / (a - 1) (Canonne, Kamath and
    Steinke, arXiv 2004.00010, Corollary 13), each of which is valid, over a dense grid of them.
    """
    if rho == 0:
        return 0.0
    order = 1 + np.geomspace(1e-4, 1e7, 20_001)
    bounds = order * rho + np.log1p(-1 / order) - np.log(order * delta) / (order - 1)
    return max(0.0, float(bounds.min()))


def count_participation(patients: NDArray[np.int64], steps: Iterable[NDArray[np.int64]]) -> int:
    """Return the largest sum over `steps` of the square of how many rows a step has of one patient. `patients`: that of
    each row of the site, from 0; a step has the numbers of its rows."""
    squares = np.zeros(int(patients.max()) + 1, dtype=np.int64)
    for rows in steps:
        squares += np.bincount(patients[rows], minlength=len(squares)) ** 2
    return int(squares.max())
