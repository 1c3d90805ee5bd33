"""What a raw table must hold: its columns, and what each of their values must be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import polars as pl

TYPES = {pl.Datetime("us"): "a date", pl.Float64(): "a number", pl.Int64(): "a whole number"}
IDENTIFIERS = {"number": "a whole number", "text": "an identifier that can be matched exactly"}


@dataclass(frozen=True)
class Column:
    """`names` are other names that the column goes by; an `identifier` is text, of whole numbers where it says so
    (raylab/data/identifiers.py). A text column that `is_optional` is null where the table has none."""

    dtype: pl.DataType
    nullable: bool = True
    identifier: Literal["text", "number"] | None = None
    names: tuple[str, ...] = ()
    is_in: tuple[int, ...] = ()
    unique: bool = False
    is_optional: bool = False

    def describe(self) -> str:
        """What a value is, in words."""
        return IDENTIFIERS[self.identifier] if self.identifier else TYPES.get(self.dtype, str(self.dtype))

    def holds_whole_numbers(self) -> bool:
        return self.identifier == "number" or self.dtype.is_integer()


Schema = Mapping[str, Column]
"""Column name, in lower case -> column."""

TEXT, NUMBER, INTEGER, DATE = Column(pl.String()), Column(pl.Float64()), Column(pl.Int64()), Column(pl.Datetime("us"))


def empty_table(schema: Schema) -> pl.DataFrame:
    return pl.DataFrame(schema={name: column.dtype for name, column in schema.items()})
