"""Statistics of the inputs over several sites, from sums that each site forms of its own train split.

Values are scaled by the plausible range of their concept (concepts.toml), which everybody knows, so that all sums have
the same known bound.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.data.icu.concepts import CONCEPTS, SERIES, STATIC
from raylab.data.icu.dataset import own_spec
from raylab.data.icu.meta import IcuMeta
from raylab.data.moments import pool_moments, sum_moments

NAMES = (*SERIES, *STATIC)


def sum_statistics(meta: IcuMeta) -> NDArray[np.float64]:
    """Return for each concept the number of measured values, and the sums of z and of z squared, [3 x concepts], with z
    the value scaled to 0 to 1 within the concept's range. None exceeds the number of values."""
    n, mean, std = np.zeros((3, len(NAMES)))
    for place, name in enumerate(NAMES):
        stats = meta.statistics.get(name)
        if stats is not None:
            low, width = _range(name)
            n[place] = float(stats["n"] or 0)
            mean[place] = (float(stats["mean"] or 0) - low) / width
            std[place] = float(stats["std"] or 0) / width
    return sum_moments(n, mean, std)


def pool_statistics(meta: IcuMeta, sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the spec of a model trained on all sites whose `sum_statistics` add up to `sums`; `meta` is that of one of
    them. It has the features that any site has measured."""
    means, stds = {}, {}
    for name, n, mean, std in zip(NAMES, *pool_moments(sums), strict=True):
        if n < 0.5:
            continue
        low, width = _range(name)
        means[name] = low + width * float(mean)
        stds[name] = width * float(std) or 1.0
    features, static = ([name for name in names if name in means] for names in (SERIES, STATIC))
    return own_spec(meta, False, Path()) | {
        "features": features,
        "static": static,
        "mean": [means[name] for name in features],
        "std": [stds[name] for name in features],
        "static_mean": [means[name] for name in static],
        "static_std": [stds[name] for name in static],
    }


def _range(name: str) -> tuple[float, float]:
    concept = CONCEPTS[name]
    return concept.low, concept.high - concept.low
