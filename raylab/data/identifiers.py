"""Identifiers: text that is the same in every table, file format and column type.

    7 (any integer type), 7.0 (float), "7", " 7 ", "7.0"     one identifier, "7"
    "007", "7"            two, in a column of text; one where the column is numeric by its documentation (MIMIC-III)
    "p7", "P7"            two: letter case counts
    "é" as one or two code points                            one (NFC)
    NaN, "", "nan", "None", "NA", ...                        no identifier: missing
    7.5, "7.5", "1.2E+17", a float of 2^53 and more          no identifier: it cannot be told which one was meant

A number means a patient within one source only: `Person` is the pair. What is not an identifier becomes null, and who
reads the table counts it and refuses it or leaves it out; the table in docs/data.md says which.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote, unquote

import polars as pl

from raylab.errors import DataError

UNKNOWN = "unknown"  # the source of rows that name none
MISSING = ("", "nan", "none", "null", "na", "n/a", "<na>", "nat", "#n/a")
EXACT: dict[pl.DataType, float] = {pl.Float64(): 2.0**53, pl.Float32(): 2.0**24}
"""At and beyond this, a float stands for several whole numbers."""
PREFIX_IDS = 5  # messages show a prefix only if this many identifiers share it, never the text of a single patient
SHAPE_LENGTH = 40
FLOAT_WRITER = re.compile(r"^-?[0-9]+\.0*$")
FRACTION = re.compile(r"^-?(?:[0-9]*\.[0-9]*[1-9][0-9]*|[0-9](?:\.[0-9]+)?[eE]\+[0-9]+)$")


class Person(NamedTuple):
    """A patient: a number, and the source within which it means one person."""

    source: str
    number: str

    def __str__(self) -> str:
        """`source:number`, unique to this person."""
        return f"{quote(self.source, safe=' +()/,;')}:{self.number}"

    @classmethod
    def of(cls, source: str, number: str) -> "Person":
        """Compare sources without letter case and outer spaces."""
        return cls(source.strip().casefold() or UNKNOWN, number)

    @classmethod
    def parse(cls, text: str) -> "Person":
        source, _, number = text.partition(":")
        return cls(unquote(source), number)


class People:
    """A set of persons. A person without a source matches every person with that number."""

    def __init__(self, persons: Iterable[Person]) -> None:
        self.persons = set(persons)
        self.numbers = {person.number for person in self.persons}
        self.without_source = {person.number for person in self.persons if person.source == UNKNOWN}

    def __contains__(self, person: Person) -> bool:
        if person in self.persons or person.number in self.without_source:
            return True
        return person.source == UNKNOWN and person.number in self.numbers


def identifier(name: str, kind: pl.DataType, numeric: bool = False) -> pl.Expr:
    """The column `name` of type `kind` as identifiers (String); null where it has none.

    `numeric`: the column is documented to contain whole numbers, so leading zeros have no meaning and other text is not
    an identifier. Raises DataError for a type that cannot hold identifiers.
    """
    column = pl.col(name)
    if kind.is_integer():
        return column.cast(pl.String)
    if kind.is_float():
        limit = EXACT.get(kind, 2.0**11)
        exact = column.is_finite() & (column == column.floor()) & (column.abs() < limit)
        return pl.when(exact).then(column).cast(pl.Int64, strict=False).cast(pl.String).alias(name)
    if kind.is_temporal() or kind.is_nested() or kind == pl.Boolean:
        raise DataError(f"column {name} contains {kind}, not identifiers", do="write them as text or whole numbers")
    text = trimmed(column)
    bare = text.str.replace(r"\.0*$", "")
    float_writer = text.str.contains(FLOAT_WRITER.pattern)
    fraction = text.str.contains(FRACTION.pattern)
    inexact = fraction | (float_writer & (bare.cast(pl.Float64, strict=False).abs() >= EXACT[pl.Float64()]))
    text = pl.when(~is_missing(name, kind) & ~inexact).then(pl.when(float_writer).then(bare).otherwise(text))
    if numeric:
        text = pl.when(text.str.contains(r"^-?\d+$")).then(text.str.replace(r"^(-?)0+(\d)", "${1}${2}"))
    return text.alias(name)


def one_identifier(text: str) -> str | None:
    """The result of `identifier` for one text."""
    text = trim(text)
    if text.lower() in MISSING or FRACTION.match(text):
        return None
    if FLOAT_WRITER.match(text):
        text = text.partition(".")[0]
        return text if abs(int(text)) < EXACT[pl.Float64()] else None
    return text


def trim(text: str) -> str:
    """The result of `trimmed` for one text."""
    return unicodedata.normalize("NFC", text).strip().strip("\ufeff\u200b").strip()


def trimmed(column: pl.Expr) -> pl.Expr:
    """Text without outer white space, byte order marks and zero-width spaces, in Unicode's composed form."""
    text = column.cast(pl.String, strict=False).str.normalize("NFC")
    return text.str.strip_chars().str.strip_chars("\ufeff\u200b").str.strip_chars()


def is_missing(name: str, kind: pl.DataType) -> pl.Expr:
    """Whether the column `name` has no value: null, NaN, empty, or a word for missing."""
    column = pl.col(name)
    if kind.is_float():
        return column.is_null() | column.is_nan()
    if kind in (pl.String, pl.Categorical, pl.Binary) or isinstance(kind, pl.Enum):
        return (column.is_null() | trimmed(column).str.to_lowercase().is_in(MISSING)).fill_null(True)
    return column.is_null()


def not_among(ids: pl.Series, others: pl.Series, table: str, other: str) -> int:
    """The number of `ids` (distinct identifiers of `table`) that are not among those of `other`.

    Raises DataError, with the form of both, if none is: the tables then belong to two data sets, or write identifiers
    differently.
    """
    ids, others = ids.drop_nulls().unique(), others.drop_nulls().unique()
    strange = int((~ids.is_in(others.implode())).sum()) if len(ids) else 0
    if strange and strange == len(ids):
        raise DataError(
            f"no identifier of {table} is in {other}: 0 of {len(ids):,} are among its {len(others):,}",
            f"in {table} they are {form(ids)}, in {other} {form(others)}",
            "use tables of one data set, with the same identifiers in each",
        )
    return strange


def form(ids: pl.Series) -> str:
    """A description of the form of identifiers that reveals no patient."""
    ids = ids.drop_nulls().unique().sort()
    if ids.is_empty():
        return "none"
    digits = ids.filter(ids.str.contains(r"^-?\d+$"))
    if len(digits) == len(ids):
        short, long = int(ids.str.len_chars().min()), int(ids.str.len_chars().max())  # type: ignore[arg-type]
        zeros = " with leading zeros" if ids.str.contains(r"^-?0\d").any() else ""
        return f"whole numbers of {short if short == long else f'{short} to {long}'} digits{zeros}"
    if len(digits):
        return f"partly whole numbers ({len(digits):,}) and partly text ({len(ids) - len(digits):,})"
    prefix = "".join(_common(ids[0], ids[-1]))
    if prefix and len(ids) >= PREFIX_IDS:
        return f"text that begins with '{prefix}'"
    shapes = ids.str.replace_all(r"\p{L}", "a").str.replace_all(r"\d", "0")
    return f"text such as '{shapes.mode().sort()[0][:SHAPE_LENGTH]}' (a for letters, 0 for digits)"


def _common(first: str, last: str) -> Iterable[str]:
    """The common characters before the first digit of two texts, the first and the last in order."""
    for a, b in zip(first, last, strict=False):
        if a != b or a.isdigit():
            return
        yield a


def look_alike(ids: Iterable[str]) -> int:
    """The number of identifiers that differ from another one only in letter case or leading zeros."""
    table = pl.DataFrame({"id": pl.Series(sorted(set(ids)), dtype=pl.String)})
    key = pl.col("id").str.to_lowercase().str.replace(r"^0+(\d)", "${1}")
    return int(table.select((pl.len().over(key) > 1).sum()).item())
