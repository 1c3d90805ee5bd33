"""Mean and deviation of the pixels over several sites. Those of a site are weighted with its training images, which all
have the same size."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.data.images.dataset import own_spec
from raylab.data.images.meta import ImageMeta
from raylab.data.moments import pool_moments, sum_moments
from raylab.errors import DataError


def sum_statistics(meta: ImageMeta) -> NDArray[np.float64]:
    """Return the number of training images, and the sums over them of the mean of the pixels, 0 to 1, and of that of
    their squares, [3]. Raises DataError if there are none."""
    if meta.statistics is None:
        raise DataError("a site's data has no train split to take pixel statistics from", do="prepare it with one")
    n, mean, std = sum(meta.counts["train"].values()), meta.statistics["mean"], meta.statistics["std"]
    return sum_moments(np.array([float(n)]), np.array([mean]), np.array([std]))


def pool_statistics(meta: ImageMeta, sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the spec of a model trained on all sites whose `sum_statistics` add up to `sums`; `meta` is that of one of
    them. All must have been prepared at one size."""
    _, mean, std = pool_moments(sums)
    return own_spec(meta) | {"prepared_size": meta.size, "mean": float(mean[0]), "std": float(std[0])}
