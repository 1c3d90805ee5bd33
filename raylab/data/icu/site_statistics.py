"""Statistics of the inputs over several sites, from sums that each site forms of its own train split.

Values are scaled by the plausible range of their concept (concepts.toml), which everybody knows, so that all sums have
the same known bound.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
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


def add_up_patients(directory: Path) -> NDArray[np.float64]:
    """Return for each patient of the train split, and each concept, 1 if it was measured, and the means of z and of z
    squared over the patient's values, [patients, 3 x concepts], with z as in `sum_statistics` and cut to 0 to 1. The
    sums over patients are statistics in which each patient counts once."""
    rows = pl.read_parquet(directory / "samples.parquet").filter(pl.col("split") == "train")
    hours = pl.read_parquet(directory / "hours.parquet")
    owners = rows.select("stay_id", "subject_id").unique()
    patients = owners.select("subject_id").unique().sort("subject_id")
    found = np.zeros((patients.height, 3, len(NAMES)))
    for names, table in ((SERIES, hours.join(owners, "stay_id")), (STATIC, rows)):
        present = [name for name in names if name in table.columns]
        scaled = [((pl.col(name).cast(pl.Float64) - low) / width).clip(0, 1) for name in present
                  for low, width in [_range(name)]]  # fmt: skip
        means = [value.mean().alias(f"{name} 1") for name, value in zip(present, scaled, strict=True)]
        squares = [(value**2).mean().alias(f"{name} 2") for name, value in zip(present, scaled, strict=True)]
        by_patient = patients.join(table.group_by("subject_id").agg(*means, *squares), "subject_id", "left")
        for name in present:
            first, second = (by_patient[f"{name} {power}"] for power in (1, 2))
            place = NAMES.index(name)
            found[:, 0, place] = first.is_not_null().to_numpy()
            found[:, 1, place] = first.fill_null(0).to_numpy()
            found[:, 2, place] = second.fill_null(0).to_numpy()
    return found.reshape(patients.height, -1)


def _range(name: str) -> tuple[float, float]:
    concept = CONCEPTS[name]
    return concept.low, concept.high - concept.low
