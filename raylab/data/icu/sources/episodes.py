"""Converts ventilation recorded as episodes (from, to) to hourly events as in a chart."""

import polars as pl

EPISODES = pl.Schema(
    {"subject_id": pl.String, "stay_id": pl.String, "concept": pl.String, "from_h": pl.Float64, "to_h": pl.Float64}
)


def chart_episodes(episodes: pl.LazyFrame) -> pl.LazyFrame:
    """Return EVENTS of episodes: 1 at the start and every hour, 0 at the end, all within the stay.

    `episodes` has EPISODES and end_h, the length of the stay in hours (null: unknown); times count from the start of
    the stay and may be outside it. An episode without an end continues to the end of the stay; an episode that ends
    during another one adds no 0.
    """
    inside = episodes.filter(
        (pl.col("end_h").is_null() | (pl.col("from_h") <= pl.col("end_h")))
        & (pl.col("to_h").is_null() | (pl.col("to_h") >= 0))
    ).with_columns(first=pl.max_horizontal("from_h", 0.0), last=pl.min_horizontal("to_h", "end_h"))
    steps = ((pl.col("last") - pl.col("first")).ceil()).clip(0).cast(pl.Int64)
    columns = ("subject_id", "stay_id", "time", "concept", "value")
    on = (
        inside.with_columns(k=pl.int_ranges(0, steps))
        .explode("k")
        .drop_nulls("k")
        .with_columns(time=pl.col("first") + pl.col("k"), value=pl.lit(1.0))
    )
    within = pl.col("end_h").is_null() | (pl.col("to_h") <= pl.col("end_h"))
    off = inside.filter(within & pl.col("to_h").is_not_null()).with_columns(time=pl.col("to_h"), value=pl.lit(0.0))
    other = inside.select("stay_id", "concept", other_from="from_h", other_to="to_h")
    going_on = (
        off.select("stay_id", "concept", "time")
        .join(other, ["stay_id", "concept"])
        .filter(
            (pl.col("other_from") <= pl.col("time"))
            & ((pl.col("other_to") > pl.col("time")) | pl.col("other_to").is_null())
        )
    )
    off = off.join(going_on, ["stay_id", "concept", "time"], "anti")
    return pl.concat([on.select(columns), off.select(columns)]).unique()
