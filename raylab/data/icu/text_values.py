"""Values of raw events that are written as text: numbers, numbers with a unit, ages and sexes in words."""

import polars as pl

from raylab.data.icu import demographics
from raylab.data.icu.concepts import UNIT, read_quantities


def read_text_values(events: pl.DataFrame) -> pl.DataFrame:
    """Return events (concept, value as text, unit if there is one) with numbers as values, and their units.

    `50%` is 50 in `%`. Text that cannot be read becomes NaN, a record that cannot be used; no text stays null. Ages and
    sexes may be in words. Without a column of units, values without one in their text are in their concept's unit."""
    unnamed = "" if UNIT in events.columns else None
    if unnamed is None:
        events = events.with_columns(pl.lit("").alias(UNIT))
    events = events.rename({"value": "text"}).with_columns(pl.col(UNIT).cast(pl.String).fill_null(""))
    texts = read_quantities(events.select("concept", UNIT, "text").drop_nulls().unique())
    words = (
        pl.when(pl.col("concept") == "age")
        .then(demographics.age("text", pl.String()))
        .when(pl.col("concept") == "sex")
        .then(demographics.sex("text"))
    )
    texts = texts.with_columns(number=pl.coalesce("number", words).fill_null(float("nan")))
    read = events.join(texts, ["concept", UNIT, "text"], "left", maintain_order="left")
    unit = pl.coalesce("unit_read", UNIT)
    return read.with_columns(
        pl.when(unit == "").then(pl.lit(unnamed)).otherwise(unit).alias(UNIT), value=pl.col("number")
    )
