"""Events -> the hourly grid, the static values, and their statistics."""

from collections.abc import Iterable

import polars as pl

from raylab.data.icu.concepts import SERIES, STATIC, SUMMED


def hourly_cells(events: pl.LazyFrame) -> pl.LazyFrame:
    """Return one row per stay, hour and recorded series concept: the last usable value (for urine the sum) and its
    time, both null if no record is usable; and `ended`, whether the last record of the hour is unusable.

    Of several values at the last time the largest is used, so that the order of the rows does not matter.
    """
    ordered = events.filter(pl.col("concept").is_in(SERIES)).sort("time", "value")  # nulls first
    usable = pl.col("value").is_not_null()
    last = pl.col("value").filter(usable).last()
    total = pl.when(usable.any()).then(pl.col("value").sum())
    return ordered.group_by(
        "stay_id", "concept", pl.col("time").floor().cast(pl.Int32).alias("hour"), maintain_order=True
    ).agg(
        value=pl.when(pl.col("concept").first().is_in(SUMMED)).then(total).otherwise(last),
        time=pl.col("time").filter(usable).last(),
        ended=pl.col("value").last().is_null(),
    )


def grid(cells: pl.DataFrame, stay_ids: pl.Series, hours: int) -> pl.DataFrame:
    """Return stay_id, hour, and `<name>`, `<name>__mask`, `<name>__since` for each concept measured in these stays.

    There are exactly `hours` rows per stay, in the order of `stay_ids`; hour h is [h, h + 1). `<name>` is null if not
    measured; `__since` is the time (h) from the last measurement to the end of hour h, null if no value is known:
    before the first one, and from an unusable record until the next usable one. A value counts for the hour in which
    it was measured even if an unusable record follows in the same hour.
    """
    cells = cells.filter(pl.col("stay_id").is_in(stay_ids.to_list()))
    measured = set(cells.drop_nulls("value")["concept"].unique())
    nowhere = pl.lit(float("nan"))  # ends the carry of the previous time
    cells = cells.with_columns(carry=pl.when("ended").then(nowhere).otherwise("time"))
    names = [name for name in SERIES if name in measured]
    table = pl.DataFrame({"stay_id": stay_ids}).join(
        pl.DataFrame({"hour": pl.int_range(hours, dtype=pl.Int32, eager=True)}), how="cross"
    )
    for column, suffix in (("value", ""), ("time", "__time"), ("carry", "__carry")):
        wide = cells.pivot("concept", index=["stay_id", "hour"], values=column)
        wide = wide.select("stay_id", "hour", *(pl.col(name).alias(name + suffix) for name in names))
        table = table.join(wide, ["stay_id", "hour"], "left", maintain_order="left")

    def columns(name: str) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
        carried = pl.col(f"{name}__carry").forward_fill().over("stay_id").fill_nan(None)
        last_time = pl.coalesce(f"{name}__time", carried)
        return (
            pl.col(name).cast(pl.Float32),
            pl.col(name).is_not_null().alias(f"{name}__mask"),
            (pl.col("hour") + 1 - last_time).cast(pl.Float32).alias(f"{name}__since"),
        )

    return table.select("stay_id", "hour", *(column for name in names for column in columns(name)))


def joined(tables: list[pl.DataFrame], names: Iterable[str]) -> pl.DataFrame:
    """Return the grids of several batches as one, with the concepts `names` in that order; a concept that a batch lacks
    is unmeasured in it."""
    table = pl.concat(tables, how="diagonal")
    masks = [pl.col(f"{name}__mask").fill_null(False) for name in names]
    columns = [f"{name}{suffix}" for name in names for suffix in ("", "__mask", "__since")]
    return table.with_columns(masks).select("stay_id", "hour", *columns)


def first_values(events: pl.LazyFrame) -> pl.LazyFrame:
    """Return stay_id and one column per static concept, with its first usable value."""
    first = events.filter(pl.col("concept").is_in(STATIC)).drop_nulls("value").sort("time", "value")
    return first.group_by("stay_id").agg(
        pl.col("value").filter(pl.col("concept") == name).first().cast(pl.Float32).alias(name) for name in STATIC
    )


def statistics(rows: pl.DataFrame, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return mean, std (population) and n of the measured values; a name never measured in `rows` is omitted."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = rows[name].drop_nulls().cast(pl.Float64) if name in rows.columns else pl.Series([], dtype=pl.Float64)
        mean, std = values.mean(), values.std(ddof=0)
        if isinstance(mean, float) and isinstance(std, float):
            result[name] = {"mean": mean, "std": std, "n": len(values)}
    return result
