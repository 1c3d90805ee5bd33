"""How sure a score is: bootstrap intervals clustered by patient, and Wilson intervals of a count.

A score here is a function of row weights, `w[R, N] -> {name: value[R]}`, NaN where it is undefined.
Weights of 1 give the score of the data; a row of resample weights gives the score of that resample,
so R resamples are one vectorised call. Patients are drawn, not rows: the rows of one patient are not
independent (Field & Welsh 2007, JRSS B 69:369, the cluster bootstrap).
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import DataError, UsageError

Floats = NDArray[np.float64]
WeightedScores = Callable[[Floats], dict[str, Floats]]

CELLS = 1 << 18  # of one [r, N] block: 2 MiB of float64, so that a block stays in the cache
Z_95 = 1.959963984540054  # standard normal quantile .975


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % score interval of the proportion k of n (Wilson 1927, JASA 22:209, without continuity correction)."""
    if not 0 <= k <= n or n == 0:
        raise DataError(f"no Wilson interval of {k} out of {n}", "it needs 0 <= k <= n and n >= 1")
    share, z2 = k / n, Z_95 * Z_95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # at k = 0 and k = n the end is exactly 0 or 1; rounding would leave it an ulp beside
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def resample_weights(group: NDArray[Any], bootstraps: int, seed: int) -> Iterator[Floats]:
    """Blocks w[r, N] of resamples, r summing to `bootstraps`: how often the patient of each row was drawn.

    A resample is as many patients as there are, drawn with replacement (multinomial counts). It depends on the
    seed and the set of patients only: not on the order of the rows, nor on the size of the blocks.
    """
    patients, index = np.unique(group, return_inverse=True)
    G, N = len(patients), len(index)
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // N)
    for start in range(0, bootstraps, block):
        r = min(block, bootstraps - start)
        drawn_RG = rng.integers(G, size=(r, G)) + G * np.arange(r)[:, None]
        counts_RG = np.bincount(drawn_RG.ravel(), minlength=r * G).reshape(r, G).astype(np.float64)
        yield np.take(counts_RG, index, axis=1)


def clustered(
    score: WeightedScores, group: NDArray[Any], bootstraps: int, seed: int, why: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Every score with its 95 % percentile interval over resamples of patients; ready for JSON, never NaN.

    {"value", "low", "high", "undefined"}: resamples in which the score does not exist are left out of the interval
    and counted. A score that does not exist on the data is {"value": None, "low": None, "high": None, "why"},
    its reason taken from `why`.
    """
    if bootstraps < 1:
        raise UsageError(f"bootstraps = {bootstraps}", "an interval needs resamples", "use 1000 or more")
    values = score(np.ones((1, len(group))))
    blocks = [score(w) for w in resample_weights(group, bootstraps, seed)]
    one_patient = bool((group == group[0]).all())
    return {
        name: _interval(float(value[0]), np.concatenate([b[name] for b in blocks]), one_patient, why.get(name, ""))
        for name, value in values.items()
    }


def _interval(value: float, draws: Floats, one_patient: bool, why: str) -> dict[str, Any]:
    if not isfinite(value):
        return {"value": None, "low": None, "high": None, "why": why or "undefined on these data"}
    defined = draws[np.isfinite(draws)]
    out: dict[str, Any] = {"value": value, "low": None, "high": None, "undefined": len(draws) - len(defined)}
    if one_patient:
        out["why"] = "no interval: all rows are of one patient"
    elif len(defined) == 0:
        out["why"] = "no interval: undefined in every resample"
    else:
        out["low"], out["high"] = (float(q) for q in np.percentile(defined, [2.5, 97.5]))
    return out
