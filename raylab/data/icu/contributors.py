"""How many patients are behind each train statistic of a prepared directory: a mean over few may tell one of them."""

from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import SERIES, STATIC


def count_contributors(directory: Path) -> dict[str, int]:
    """Return {feature: patients of the train split with a value that its mean and deviation are computed from}, for all
    features of `directory` but those of virtual patients, which every patient has."""
    train = pl.read_parquet(directory / "samples.parquet").filter(pl.col("split") == "train")
    stays = train.group_by("stay_id").agg(pl.col("subject_id").first(), until=pl.col("at_h").max())
    table = pl.scan_parquet(directory / "hours.parquet")
    series = [name for name in SERIES if name in table.collect_schema().names()]
    seen = table.join(stays.lazy(), "stay_id").filter(pl.col("hour") < pl.col("until"))
    counted = seen.select(_patients_with(name) for name in series).collect().row(0, named=True)
    static = train.select(_patients_with(name) for name in STATIC if name in train.columns).row(0, named=True)
    return {**counted, **static}


def _patients_with(name: str) -> pl.Expr:
    return pl.col("subject_id").filter(pl.col(name).is_not_null()).n_unique().alias(name)
