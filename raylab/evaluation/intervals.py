"""95% confidence intervals of scores: the bootstrap clustered by patient, and Wilson intervals of proportions.

A bootstrapped score is a function of row weights, `w[R, N] -> {name: value[R]}`, NaN where undefined. Weights of 1 give
the score of the data; a row of resample weights gives the score of that resample, so that R resamples are a single
vectorised call. Patients are resampled instead of rows, because the rows of a patient are not independent (Field &
Welsh 2007, JRSS B 69:369, the cluster bootstrap). Where rows belong to something else, such as tiles of the ground,
`unit` is its name in the reasons for missing intervals.

Small samples: a proportion always has a Wilson interval, which does not collapse and stays within 0 to 1. A
bootstrapped score has an interval only with at least FEW patients in every stratum that it compares (with and without
the outcome, or of each class). It also has none if the resamples are not informative: if all score the same, as after
perfect separation, or if more than 5% of them are undefined. Then `low` and `high` are None and `why` gives the reason,
with the counts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import DataError, UsageError
from raylab.score import Score, undefined, without_interval

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
WeightedScores = Callable[[Floats], dict[str, Floats]]

CELLS = 1 << 18  # of one [r, N] block: 2 MiB of float64, so that a block stays in the cache
Z_95 = 1.959963984540054  # standard normal quantile 0.975
FEW = 10
"""Minimum number of patients in a stratum for a bootstrap interval.

By simulation (benchmarks/interval_coverage.py, docs/log.md): with at least 10 patients with and 10 without the outcome,
95% intervals of non-zero width cover a true AUROC of 0.7 to 0.95 in 86% to 97% of samples, and those of a mean error in
89%. With 4 and 4, the interval has zero width in up to 63% of samples, and covers nothing.
"""
NAMED = 3  # strata that lack patients and are named; of many classes, the others are counted
FLAT = 1e-9  # an interval narrower than this counts as zero width
UNDEFINED = 0.05  # fraction of undefined resamples above which the ends of a 95% interval are unknown


def wilson(k: float, n: float) -> tuple[float, float]:
    """Return the 95% score interval of the proportion k / n (Wilson 1927, JASA 22:209; no continuity correction)."""
    if not 0 <= k <= n or n == 0:
        raise DataError(f"no Wilson interval of {k} out of {n}", "it needs 0 <= k <= n and n >= 1")
    rate, z2 = k / n, Z_95 * Z_95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    # at k = 0 and k = n the end is exactly 0 or 1, from which rounding would deviate by an ulp
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def proportion(hits: NDArray[Any], of: NDArray[Any], group: NDArray[Any], why: str, unit: str = "patient") -> Score:
    """Return the proportion sum(hits[N]) / sum(of[N]) of counts per row, hits <= of, with its 95% Wilson interval.

    The rows of a patient are not independent, so the interval uses the effective sample size (`effective_size`). If
    sum(of) is 0 the value is None, with `why`; for a single patient there is no interval.
    """
    hits_N, of_N = np.asarray(hits, dtype=np.float64), np.asarray(of, dtype=np.float64)
    total = float(of_N.sum())
    if total == 0:
        return undefined(why)
    value = float(hits_N.sum()) / total
    _, index = np.unique(group[of_N > 0], return_inverse=True)
    if index.max() == 0 and total > 1:
        return without_interval(value, f"too few: all rows are of one {unit}")
    hits_G, of_G = (np.bincount(index, counts[of_N > 0]).astype(np.float64) for counts in (hits_N, of_N))
    n = effective_size(hits_G, of_G)
    low, high = wilson(value * n, n)
    return Score(value=value, low=low, high=high)


def effective_size(hits_G: Floats, of_G: Floats) -> float:
    """Return the effective sample size of the proportion sum(hits) / sum(of) of G patients.

    It is the number of rows divided by the design effect, the variance between patients over that of independent rows
    (Rao & Scott 1992, Biometrics 48:577). The result is at most the number of rows, and at least the size if all rows
    of each patient agree, sum(of)^2 / sum(of^2) (Kish 1965). With fewer than FEW patients, or at a proportion of 0 or
    1, the design effect cannot be estimated and that minimum is returned.
    """
    n, G = float(of_G.sum()), len(of_G)
    rate = float(hits_G.sum()) / n
    minimum = n * n / float(np.square(of_G).sum())
    if G < FEW or rate in (0.0, 1.0):
        return minimum
    variance = G / (G - 1) * float(np.square(hits_G - rate * of_G).sum()) / (n * n)
    return min(max(rate * (1 - rate) / variance, minimum), n) if variance > 0 else n


@dataclass(frozen=True)
class Part:
    """Rows of the data that are scored together, such as a cohort.

    `rows` are their indices [n]. `score` takes the weights of these rows in this order, and `strata` mark them in this
    order: such as {"with the outcome": rows[n]}, the parts that need at least FEW patients each. `why` gives the reason
    for a score that is undefined on the data.
    """

    rows: NDArray[np.intp]
    score: WeightedScores
    why: Mapping[str, str]
    strata: Mapping[str, Bools]


def resample_counts(patients: int, rows: int, bootstraps: int, seed: int) -> Iterator[Floats]:
    """Yield blocks [r, patients] of resamples, `bootstraps` in total: how often each patient was drawn; a block is made
    for data with so many rows.

    A resample draws as many patients as there are, with replacement (multinomial counts). It depends only on the seed
    and the number of patients, and not on the size of the blocks.
    """
    rng = np.random.default_rng(seed)
    block = max(1, CELLS // rows)
    for start in range(0, bootstraps, block):
        r = min(block, bootstraps - start)
        drawn = rng.integers(patients, size=(r, patients)) + patients * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * patients).reshape(r, patients).astype(np.float64)


def resample_weights(group: NDArray[Any], bootstraps: int, seed: int) -> Iterator[Floats]:
    """Yield blocks w[r, N] of resamples, `bootstraps` in total: how often the patient of each row was drawn, whatever
    the order of the rows."""
    patients, index = np.unique(group, return_inverse=True)
    for counts in resample_counts(len(patients), len(index), bootstraps, seed):
        yield np.take(counts, index, axis=1)


def clustered(
    score: WeightedScores,
    group: NDArray[Any],
    bootstraps: int,
    seed: int,
    why: Mapping[str, str],
    strata: Mapping[str, Bools],
    unit: str = "patient",
) -> dict[str, Score]:
    """Return the result of `clustered_parts` for all rows as one part."""
    part = Part(np.arange(len(group)), score, why, strata)
    return clustered_parts({"all": part}, group, bootstraps, seed, unit)["all"]


def clustered_difference(
    of_a: WeightedScores,
    of_b: WeightedScores,
    group: NDArray[Any],
    bootstraps: int,
    seed: int,
    why: Mapping[str, str],
    strata: Mapping[str, Bools],
    unit: str = "patient",
) -> dict[str, Score]:
    """Return the scores of a minus those of b on the same rows, over shared resamples; see `clustered`."""

    def difference(w: Floats) -> dict[str, Floats]:
        a, b = of_a(w), of_b(w)
        return {name: a[name] - b[name] for name in a}

    return clustered(difference, group, bootstraps, seed, why, strata, unit)


def clustered_parts(
    parts: Mapping[str, Part], group: NDArray[Any], bootstraps: int, seed: int, unit: str = "patient"
) -> dict[str, dict[str, Score]]:
    """Return every score of every part with its 95% percentile interval over resamples of patients; never NaN.

    All parts share the resamples, which draw from all patients of group[N]: how many patients of a part a resample has
    is random, as it was when the data were sampled. Resamples in which a score is undefined are excluded from its
    interval and counted (`undefined`). A part without enough patients in its strata, and a score whose resamples are
    not informative, has no interval.
    """
    if bootstraps < 1:
        raise UsageError(f"bootstraps = {bootstraps}", "an interval needs resamples", "use 1000 or more")
    values = {name: part.score(np.ones((1, len(part.rows)))) for name, part in parts.items()}
    few = {name: too_few(group[part.rows], part.strata, unit) for name, part in parts.items()}
    patients, index = np.unique(group, return_inverse=True)
    patient_of = {name: index[part.rows] for name, part in parts.items() if few[name] is None}
    blocks: dict[str, list[dict[str, Floats]]] = {name: [] for name in patient_of}
    for counts in resample_counts(len(patients), len(index), bootstraps, seed) if patient_of else ():
        for name, of in patient_of.items():
            blocks[name].append(parts[name].score(np.take(counts, of, axis=1)))

    def interval(part: str, name: str) -> Score:
        value, why = float(values[part][name][0]), parts[part].why.get(name, "")
        if reason := few[part]:
            return _without(value, reason, why)
        return _interval(value, np.concatenate([block[name] for block in blocks[part]]), why)

    return {part: {name: interval(part, name) for name in scores} for part, scores in values.items()}


def too_few(group: NDArray[Any], strata: Mapping[str, Bools], unit: str = "patient") -> str | None:
    """Return why these rows allow no bootstrap interval, with the counts; None if they do."""
    index = np.unique(group, return_inverse=True)[1]  # the inverse makes numpy sort instead of hash, 100 times faster
    patients = int(index.max()) + 1
    if patients == 1:
        return f"too few: all rows are of one {unit}"
    counts = {name: int(np.count_nonzero(np.bincount(index[rows]))) for name, rows in strata.items()}
    lacking = [f"{_count(n, unit)} {name}" for name, n in counts.items() if n < FEW]
    if len(lacking) > NAMED:
        lacking[NAMED - 1 :] = [f"fewer than {FEW} {unit}s in {len(lacking) - NAMED + 1} others"]
    if not lacking and patients < FEW:
        lacking = [_count(patients, unit)]
    if not lacking:
        return None
    return f"too few: {' and '.join(lacking)}; an interval needs {FEW}{' of each' if len(strata) > 1 else ''}"


def _count(n: int, unit: str) -> str:
    return f"{n} {unit}{'' if n == 1 else 's'}"


def _without(value: float, reason: str, why: str) -> Score:
    if not isfinite(value):
        return undefined(why or "undefined on these data")
    return without_interval(value, reason)


def _interval(value: float, draws: Floats, why: str) -> Score:
    defined = draws[np.isfinite(draws)]
    lacking = len(draws) - len(defined)
    if not isfinite(value):
        return _without(value, "", why)
    if lacking > UNDEFINED * len(draws):
        return _without(value, f"no interval: undefined in {lacking} of {len(draws)} resamples", why)
    low, high = (float(q) for q in np.percentile(defined, [2.5, 97.5]))
    if high - low < FLAT:
        return _without(value, "no interval: all resamples score the same", why)
    return Score(value=value, low=low, high=high, undefined=lacking)
