"""Mean and deviation of each band over several sites. Those of a site are weighted with its training scenes, although
some of their pixels may have no data."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.images.scenes.dataset import own_spec
from raylab.data.images.scenes.meta import SceneMeta
from raylab.data.moments import pool_moments, sum_moments

LARGEST = 65535.0  # value of a pixel, of 8 bits as well


def sum_statistics(meta: SceneMeta, directory: Path) -> NDArray[np.float64]:
    """Return for each band the number of training scenes, and the sums over them of the mean of z and of z squared,
    [3 * bands], with z the value of a pixel scaled to 0 to 1."""
    mean, std = (np.array(values) / LARGEST for values in (meta.statistics.mean, meta.statistics.std))
    split = pl.read_parquet(directory / "index.parquet", columns=["split"])["split"]  # counts are of labels
    return sum_moments(np.full(len(meta.bands), float((split == "train").sum())), mean, std)


def pool_statistics(meta: SceneMeta, sums: NDArray[np.float64]) -> dict[str, Any]:
    """Return the spec of a model trained on all sites whose `sum_statistics` add up to `sums`; `meta` is that of one of
    them."""
    _, mean, std = pool_moments(sums)
    return own_spec(meta) | {"mean": (LARGEST * mean).tolist(), "std": (LARGEST * std).tolist()}
