"""The concept dictionary: every quantity under one name, with unit, plausible range and its ids in each source.

The dictionary itself is data, `concepts.toml`. Units are those of PhysioNet 2012 (US conventional); `to_own_units`
converts the events of every source that records the unit of a value.
"""

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from raylab.data.icu.units import NO_UNIT, conversion, parse, spelled
from raylab.data.text import as_number

_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("concepts.toml").read_text())
ID_SOURCES = ("physionet2012", "mimic3", "mimic4", "mimic4_lab", "yaib")


@dataclass(frozen=True)
class Concept:
    """A quantity. `low` and `high` (inclusive) are in `unit`; a static concept has one value per stay, a series many.

    precision   the step in which it is charted, a power of ten; bounds are compared with values rounded to it
    ids         source -> id -> the unit of all its rows, None if each row has its own or none
    molar_mass  g/mol, if masses and amounts of substance are both in use
    charge      equivalents per mole
    derived     how it is computed from other concepts; empty if it is measured
    title       what a page for clinicians calls it
    usual       (low, high) in adults, in `unit`: a reference for the eye, not a bound
    """

    name: str
    unit: str
    low: float
    high: float
    precision: float
    ids: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    molar_mass: float | None = None
    charge: int | None = None
    static: bool = False
    derived: str = ""
    title: str = ""
    usual: tuple[float, float] | None = None

    def decimals(self) -> int:
        """Return the number of decimals of `precision`."""
        return -round(math.log10(self.precision))


@dataclass(frozen=True)
class SourceData:
    """The data read from a source.

    events  EVENTS: time in hours since the start of the stay, and UNIT if the source has it. A value is NaN if the
            record is not a number, and null if nothing was recorded
    stays   STAYS, one row per stay, and those columns of ENDS that the source has
    counts  rows that did not become events, by reason
    pieces  the same events split by patient, for data that does not fit in memory
    notes   what readers of a score should know about this source
    warnings  possible problems of this data
    lacks   concepts that this source never records, which labels must not require
    numbering  the scope of the patient numbers: within it a number means one person (identifiers.py); if empty, the
            source's name
    synthetic  whether the tables themselves say that their patients are synthetic
    """

    events: pl.LazyFrame
    stays: pl.DataFrame
    counts: dict[str, int] = field(default_factory=dict)
    pieces: tuple[pl.LazyFrame, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    numbering: str = ""
    synthetic: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError for tables of another type, which a plugin's source may give."""
        for name, tables, kind in (
            ("events", (self.events,), pl.LazyFrame),
            ("stays", (self.stays,), pl.DataFrame),
            ("pieces", self.pieces, pl.LazyFrame),
        ):
            if wrong := [table for table in tables if not isinstance(table, kind)]:
                raise TypeError(f"`{name}` must be a polars {kind.__name__}, not {type(wrong[0]).__name__}")

    def parts(self) -> tuple[pl.LazyFrame, ...]:
        return self.pieces or (self.events,)


EVENTS = pl.Schema(
    {"subject_id": pl.String, "stay_id": pl.String, "time": pl.Float64, "concept": pl.String, "value": pl.Float64}
)
"""The three columns of text may also be an Enum: `with_coded_ids`, CONCEPT."""
UNIT = "unit"
"""An optional text column of EVENTS: the unit in which the value was recorded, empty if the row names none. If it is
null or the column is missing, the value is in the concept's unit."""
STAYS = pl.Schema({"subject_id": pl.String, "stay_id": pl.String, "source": pl.String, "died": pl.Boolean})
"""`source` is the set or hospital; `died` means in hospital, null if unknown."""
ENDS = pl.Schema({"end_h": pl.Float64, "end": pl.String, "period": pl.String, "clock_h": pl.Float64})
"""Optional columns of STAYS: when the stay ended (hours since its start) and how (death or discharge), the period for a
temporal split, and the time of day (h) at which the stay started; null if unknown or if dates are shifted or absent."""


def whole_stays(stays: pl.DataFrame) -> pl.DataFrame:
    """Return `stays` with every column of STAYS and ENDS, null where the source has none."""
    wanted = pl.Schema({**STAYS, **ENDS})
    missing = [pl.lit(None, kind).alias(name) for name, kind in wanted.items() if name not in stays.columns]
    return stays.with_columns(missing).select(wanted.names()).cast(wanted)


def with_coded_ids(table: pl.DataFrame) -> pl.DataFrame:
    """Return `table` with subject_id and stay_id as numbers (Enum of all that occur in it, sorted), on which joins and
    groups take a fraction of the time."""
    texts = [table[name] for name in ("subject_id", "stay_id") if not isinstance(table.schema[name], pl.Enum)]
    return table.with_columns(text.cast(pl.Enum(text.cast(pl.String).drop_nulls().unique().sort())) for text in texts)


def _concept(name: str, entry: Mapping[str, Any]) -> Concept:
    ids: dict[str, dict[str, str | None]] = {}
    for source in ID_SOURCES:
        pairs = (text.partition("=") for text in entry.get(source, "").split())
        ids[source] = {item: unit or None for item, _, unit in pairs}
    return Concept(
        name,
        entry["unit"],
        entry["low"],
        entry["high"],
        entry["precision"],
        ids,
        entry.get("molar_mass"),
        entry.get("charge"),
        entry.get("static", False),
        entry.get("derived", ""),
        entry["title"],
        tuple(entry["usual"]) if "usual" in entry else None,
    )


CONCEPTS: dict[str, Concept] = {name: _concept(name, entry) for name, entry in _DATA["concepts"].items()}
SERIES = tuple(name for name, concept in CONCEPTS.items() if not concept.static)
STATIC = tuple(name for name, concept in CONCEPTS.items() if concept.static)
DERIVED = tuple(name for name, concept in CONCEPTS.items() if concept.derived)
CONCEPT = pl.Enum(list(CONCEPTS))
"""Names of concepts as numbers, on which joins and groups take a fraction of the time."""
SUMMED = ("urine",)  # amounts are summed over an hour; all other series use the last value


def by_id(source: str) -> dict[str, str]:
    """Return {id in the source: concept name}."""
    return {item: concept.name for concept in CONCEPTS.values() for item in concept.ids.get(source, {})}


def exact(value: pl.Expr) -> pl.Expr:
    """Return `value` rounded to the six significant digits of float32: the same float64 whether it was stored as
    float32, float64 or decimal text."""
    return value.round_sig_figs(6)


def charted_steps(exact_value: pl.Expr, per_unit: pl.Expr) -> pl.Expr:
    """Return an exact value in steps of its precision, `per_unit` steps per unit; halves are rounded away from zero.

    The product may differ from a half in its last digit, which is therefore rounded first.
    """
    return (exact_value * per_unit).round_sig_figs(12).round(mode="half_away_from_zero")


def charted(value: pl.Expr, concept: str) -> pl.Expr:
    """Return `value` rounded to the precision of `concept`, as the float64 nearest to that decimal."""
    decimals = CONCEPTS[concept].decimals()
    return (charted_steps(exact(value), pl.lit(10.0**decimals)) / 10.0**decimals).round(decimals)


def charted_ratio(above: pl.Expr, below: pl.Expr, concept: str) -> pl.Expr:
    """Return `above` / `below` of two recorded values, rounded to the precision of `concept`: float32(210) /
    float32(0.7) is 300."""
    return charted(exact(above) / exact(below), concept)


_OWN = {unit: {spelled(name) for name in names} for unit, names in _DATA["units"].items()}


def factor(concept: Concept, said: str) -> tuple[float, float] | None:
    """Return (scale, offset) from values recorded in the unit `said` to the concept's own; None if that unit is not
    understood or measures something else."""
    if spelled(said) in {spelled(concept.unit), *_OWN.get(concept.unit, ())}:
        return 1.0, 0.0
    return conversion(said, concept.unit, concept.molar_mass, concept.charge)


def names_no_unit(said: str) -> bool:
    return said.strip().lower() in NO_UNIT


def stated_units(source: str, pairs: Iterable[tuple[str, str | None]]) -> pl.DataFrame:
    """Return item, recorded, concept and unit (as in EVENTS) for each (id, unit as recorded) with a known id.

    The unit of an id applies to all of its rows. If a row names another unit, its `unit` describes the contradiction in
    words that do not parse as a unit, so that the value cannot be used.
    """
    names = by_id(source)
    rows = []
    for item, recorded in pairs:
        if item in names:
            concept = CONCEPTS[names[item]]
            rows.append((item, recorded, concept.name, stated_unit(concept, concept.ids[source][item], recorded or "")))
    schema = {"item": pl.String, "recorded": pl.String, "concept": pl.String, UNIT: pl.String}
    return pl.DataFrame(rows, schema=schema, orient="row")


def stated_unit(concept: Concept, of_id: str | None, recorded: str) -> str:
    """Return the unit of a row: that of its id, which `recorded` must not contradict, or else `recorded`."""
    if of_id is None:
        return recorded
    contradicts = parse(recorded) is not None and factor(concept, recorded) != factor(concept, of_id)
    return f"{recorded} where all is {of_id}" if contradicts and not names_no_unit(recorded) else of_id


QUANTITY = r"^\s*([+-]?(?:\d[\d.,]*|\.\d+)(?:[eE][+-]?\d+)?)\s*([%°\pL].*?)?\s*$"
"""A number in text, and the unit after it, if there is one."""


def read_quantities(texts: pl.DataFrame) -> pl.DataFrame:
    """Return `texts` (concept, unit as in EVENTS, text) with `number` and `unit_read`: `50%` is 50, and `%` if the row
    itself names no unit. Both are null if the meaning is ambiguous: `<0.5`, `1,234`, a unit that does not measure the
    concept, or another unit than the row names."""
    parts = texts.with_columns(
        number=pl.col("text").str.extract(QUANTITY, 1), in_text=pl.col("text").str.extract(QUANTITY, 2)
    ).with_columns(as_number("number", pl.String()))
    pairs = parts.select("concept", UNIT, "in_text").unique()
    read = [(*pair, unit) for pair in pairs.iter_rows() if (unit := _unit_with_text(*pair)) is not None]
    units = pl.DataFrame(read, schema={**pairs.schema, "unit_read": pl.String}, orient="row")
    parts = parts.join(units, ["concept", UNIT, "in_text"], "left", nulls_equal=True, maintain_order="left")
    number = pl.when(pl.col("unit_read").is_not_null()).then("number")
    return parts.select(*texts.columns, number=number, unit_read="unit_read")


def _unit_with_text(name: str, stated: str, in_text: str | None) -> str | None:
    """Return the unit of a value whose row names the unit `stated` and whose text names `in_text`; None if they differ
    or do not measure the concept."""
    if in_text is None:
        return stated
    found = factor(CONCEPTS[name], in_text)
    if found is None:
        return None
    if names_no_unit(stated):
        return in_text
    return stated if factor(CONCEPTS[name], stated) == found else None


def to_own_units(events: pl.LazyFrame) -> pl.LazyFrame:
    """Return `events` with values in their concepts' units, `unit` and `unit_is`: null if the source records no units,
    "own", "none" (assumed to be the concept's own), "converted", or "unknown" (the value stays as recorded)."""
    events = events.with_columns(pl.col("value").cast(pl.Float64))
    if UNIT not in events.collect_schema().names():
        return events.with_columns(pl.lit(None, pl.String).alias(UNIT), unit_is=pl.lit(None, pl.String))
    pair = pl.struct("concept", pl.col(UNIT).cast(pl.String))
    # a column of its own, because polars calls a function once for each expression that it is part of
    events = events.with_columns(pl.col(UNIT).cast(pl.String), found=pair.map_batches(_conversions, _CONVERSION))
    found = pl.col("found").struct
    # rounded, so that 98.6 F and 37 C at the same time are one record
    value = (pl.col("value") * found.field("scale") + found.field("offset")).round_sig_figs(12)
    value = pl.when(found.field("unit_is") == "converted").then(value).otherwise("value")
    return events.with_columns(value=value, unit_is=found.field("unit_is")).drop("found")


_CONVERSION = pl.Struct({"scale": pl.Float64, "offset": pl.Float64, "unit_is": pl.String})


def _conversions(pairs: pl.Series) -> pl.Series:
    """Return (scale, offset, unit_is) of each (concept, unit); each distinct pair is looked up once."""
    table = pairs.struct.unnest()
    rows = [(name, said, *_conversion(name, said)) for name, said in table.unique().iter_rows()]
    schema = {**table.schema, **{field.name: field.dtype for field in _CONVERSION.fields}}
    known = pl.DataFrame(rows, schema=schema, orient="row")
    joined = table.join(known, ["concept", UNIT], "left", nulls_equal=True, maintain_order="left")
    return joined.select("scale", "offset", "unit_is").to_struct(pairs.name)


def _conversion(name: str | None, said: str | None) -> tuple[float, float, str | None]:
    if name not in CONCEPTS or said is None:
        return 1.0, 0.0, None
    if names_no_unit(said):
        return 1.0, 0.0, "none"
    found = factor(CONCEPTS[name], said)
    if found is None:
        return 1.0, 0.0, "unknown"
    return *found, "own" if found == (1.0, 0.0) else "converted"
