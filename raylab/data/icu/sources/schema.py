"""Schemas of raw tables: their columns, and the constraints on the values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import polars as pl

TYPES = {pl.Datetime("us"): "a date", pl.Float64(): "a number", pl.Int64(): "a whole number"}
IDENTIFIERS = {"number": "a whole number", "text": "an identifier that can be matched exactly"}


@dataclass(frozen=True)
class Column:
    """A column of a raw table. `names` are alternative names; an `identifier` is read as text, or as text of whole
    numbers if it is "number" (raylab/data/identifiers.py). An optional text column is null if the table lacks it."""

    dtype: pl.DataType
    nullable: bool = True
    identifier: Literal["text", "number"] | None = None
    names: tuple[str, ...] = ()
    is_in: tuple[int, ...] = ()
    unique: bool = False
    is_optional: bool = False

    def describe(self) -> str:
        """Return a description of a valid value."""
        return IDENTIFIERS[self.identifier] if self.identifier else TYPES.get(self.dtype, str(self.dtype))

    def holds_whole_numbers(self) -> bool:
        return self.identifier == "number" or self.dtype.is_integer()


Schema = Mapping[str, Column]
"""Maps a column name in lower case to its column."""

TEXT, NUMBER, INTEGER, DATE = Column(pl.String()), Column(pl.Float64()), Column(pl.Int64()), Column(pl.Datetime("us"))


def empty_table(schema: Schema) -> pl.DataFrame:
    return pl.DataFrame(schema={name: column.dtype for name, column in schema.items()})
