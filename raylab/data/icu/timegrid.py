"""Events -> the hourly grid, the static values, and their statistics."""

from collections.abc import Iterable

import polars as pl

from raylab.data.icu.concepts import SERIES, STATIC, SUMMED


def hourly_cells(events: pl.LazyFrame) -> pl.LazyFrame:
    """Return one row per stay, hour and recorded series concept: the last usable value (for urine the sum) and its
    time, both null if no record is usable; and `ended`, whether the last record of the hour is unusable.

    Of several values at the last time the largest is used, so that the order of the rows does not matter. The order of
    the cells is not defined.
    """
    hour = pl.col("time").floor().cast(pl.Int32)
    series = events.filter(pl.col("concept").is_in(SERIES)).select("stay_id", "concept", "time", "value", hour=hour)
    cell = ["stay_id", "concept", "hour"]
    usable = series.drop_nulls("value").sort("time", "value").group_by(cell)
    last, total = pl.col("value").last(), pl.col("value").sum()
    values = usable.agg(
        value=pl.when(pl.col("concept").first().is_in(SUMMED)).then(total).otherwise(last), time=pl.col("time").last()
    )
    unusable = series.filter(pl.col("value").is_null()).group_by(cell).agg(end=pl.col("time").max())
    cells = values.join(unusable, cell, "full", coalesce=True)
    ended = pl.col("end").is_not_null() & (pl.col("time").is_null() | (pl.col("end") > pl.col("time")))
    return cells.select(*cell, "value", "time", ended=ended)


def grid(cells: pl.DataFrame, stay_ids: pl.Series, hours: int) -> pl.DataFrame:
    """Return stay_id, hour, and `<name>`, `<name>__mask`, `<name>__since` for each concept measured in these stays.

    There are exactly `hours` rows per stay, in the order of `stay_ids`; hour h is [h, h + 1). `<name>` is null if not
    measured; `__since` is the time (h) from the last measurement to the end of hour h, null if no value is known:
    before the first one, and from an unusable record until the next usable one. A value counts for the hour in which
    it was measured even if an unusable record follows in the same hour.
    """
    cells = cells.filter(pl.col("stay_id").is_in(stay_ids.implode()))
    measured = set(cells.drop_nulls("value")["concept"].unique())
    names = [name for name in SERIES if name in measured]
    nothing = pl.lit(float("nan"))  # ends the carry of the previous time
    cells = cells.filter(pl.col("concept").is_in(names)).with_columns(
        carry=pl.when("ended").then(nothing).otherwise("time")
    )
    wide = cells.pivot("concept", on_columns=names, index=["stay_id", "hour"], values=["value", "time", "carry"])
    table = pl.DataFrame({"stay_id": stay_ids}).join(
        pl.DataFrame({"hour": pl.int_range(hours, dtype=pl.Int32, eager=True)}), how="cross"
    )
    table = table.join(wide, ["stay_id", "hour"], "left", maintain_order="left")

    def columns(name: str) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
        value, carry = pl.col(f"value_{name}"), pl.col(f"carry_{name}")
        # the first hour of a stay always has a carry, so that none crosses from the stay above
        carried = pl.when(pl.col("hour") == 0).then(carry.fill_null(nothing)).otherwise(carry).forward_fill()
        last_time = pl.coalesce(f"time_{name}", carried.fill_nan(None))
        return (
            value.cast(pl.Float32).alias(name),
            value.is_not_null().alias(f"{name}__mask"),
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
    """Return stay_id, and for each static concept its first usable value, `<name>`, and the time (h) of it,
    `<name>__time`."""
    first = events.filter(pl.col("concept").is_in(STATIC)).drop_nulls("value").sort("time", "value")

    def of(column: str, name: str) -> pl.Expr:
        return pl.col(column).filter(pl.col("concept") == name).first()

    return first.group_by("stay_id").agg(
        *(of("value", name).cast(pl.Float32).alias(name) for name in STATIC),
        *(of("time", name).alias(f"{name}__time") for name in STATIC),
    )


def with_static(rows: pl.DataFrame, first: pl.DataFrame) -> pl.DataFrame:
    """Return `rows` (stay_id, at_h), in their order, with the static values of their stays from `first_values`; null
    where the first one was recorded at the prediction or after it."""
    known = [pl.when(pl.col(f"{name}__time") < pl.col("at_h")).then(name).alias(name) for name in STATIC]
    rows = rows.join(first, "stay_id", "left", maintain_order="left").with_columns(known)
    return rows.drop(f"{name}__time" for name in STATIC)


def statistics(rows: pl.DataFrame, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return mean, std (population) and n of the measured values; a name never measured in `rows` is omitted."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = rows[name].drop_nulls().cast(pl.Float64) if name in rows.columns else pl.Series([], dtype=pl.Float64)
        mean, std = values.mean(), values.std(ddof=0)
        if isinstance(mean, float) and isinstance(std, float):
            result[name] = {"mean": mean, "std": std, "n": len(values)}
    return result
