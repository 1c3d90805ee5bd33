"""Values of raw events that are written as text: numbers, numbers with a unit, ages and sexes in words."""

import polars as pl

from raylab.data.icu import demographics
from raylab.data.icu.concepts import UNIT, read_quantities
from raylab.data.identifiers import is_missing


def read_text_values(events: pl.DataFrame) -> pl.DataFrame:
    """Return events (concept, value as text, unit if there is one) with numbers as values, and their units: `50%` is 50
    in `%`. No text, and a word for missing (`NA`), is null; other text that cannot be read becomes NaN, a record that
    cannot be used. Ages and sexes may be in words."""
    if UNIT not in events.columns:
        events = events.with_columns(pl.lit("").alias(UNIT))
    events = events.with_columns(
        pl.col(UNIT).cast(pl.String).fill_null(""), text=pl.when(~is_missing("value", pl.String())).then("value")
    ).drop("value")
    texts = read_quantities(events.select("concept", UNIT, "text").drop_nulls().unique())
    words = (
        pl.when(pl.col("concept") == "age")
        .then(demographics.age("text", pl.String()))
        .when(pl.col("concept") == "sex")
        .then(demographics.sex("text"))
    )
    texts = texts.with_columns(number=pl.coalesce("number", words).fill_null(float("nan")))
    read = events.join(texts, ["concept", UNIT, "text"], "left", maintain_order="left")
    return read.with_columns(pl.coalesce("unit_read", UNIT).alias(UNIT), value=pl.col("number"))
