"""The concept dictionary: every quantity by one name, with unit, plausible range and its ids in each source.

The dictionary itself is data, `concepts.toml`. Units are those of PhysioNet 2012 (US conventional); a source converts
to them with `units_of`.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from raylab.errors import DataError

_DATA: dict[str, Any] = tomllib.loads(Path(__file__).with_name("concepts.toml").read_text())
ID_SOURCES = ("physionet2012", "mimic3", "mimic4", "yaib")


@dataclass(frozen=True)
class Concept:
    """`low` and `high` (inclusive) are in `unit`; a static concept has one value a stay, a series many.

    ids      source -> id -> the unit it is recorded in, None where that is the row's or the concept's own
    other    spelling of a convertible unit -> (scale, offset)
    derived  how it is made of other concepts; empty where it is measured
    """

    name: str
    unit: str
    low: float
    high: float
    ids: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    other: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    static: bool = False
    derived: str = ""


@dataclass(frozen=True)
class Extract:
    """What a source yields.

    events  EVENTS: time in hours since the start of the stay, value in the concept's unit
    stays   STAYS, one row a stay, and what the source knows of ENDS
    counts  rows that did not become events, by reason
    pieces  the same events cut by patient, for what does not fit in memory as a whole
    notes   what the reader of a score should know of this source, in words
    lacks   concepts that this source records of nobody, so that no label may ask for them
    numbering  whose patient numbers these are: within one numbering a number means one person (identifiers.py); the
            source's name where it is empty
    """

    events: pl.LazyFrame
    stays: pl.DataFrame
    counts: dict[str, int] = field(default_factory=dict)
    pieces: tuple[pl.LazyFrame, ...] = ()
    notes: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    numbering: str = ""

    def parts(self) -> tuple[pl.LazyFrame, ...]:
        return self.pieces or (self.events,)


EVENTS = pl.Schema(
    {"subject_id": pl.String, "stay_id": pl.String, "time": pl.Float64, "concept": pl.String, "value": pl.Float64}
)
STAYS = pl.Schema({"subject_id": pl.String, "stay_id": pl.String, "source": pl.String, "died": pl.Boolean})
"""`source` is the set or hospital; `died` in hospital, null where not known."""
ENDS = pl.Schema({"end_h": pl.Float64, "end": pl.String, "period": pl.String, "clock_h": pl.Float64})
"""What a source may add to STAYS: when the stay ended (hours since it began) and how (death or discharge), what a
temporal split orders by, and the time of day (h) at which the stay began; null where not known, dates shifted or
absent."""


def whole_stays(stays: pl.DataFrame) -> pl.DataFrame:
    """`stays` with every column of STAYS and ENDS, null where the source does not say."""
    wanted = pl.Schema({**STAYS, **ENDS})
    missing = [pl.lit(None, kind).alias(name) for name, kind in wanted.items() if name not in stays.columns]
    return stays.with_columns(missing).select(wanted.names()).cast(wanted)


def _concept(name: str, entry: Mapping[str, Any]) -> Concept:
    ids: dict[str, dict[str, str | None]] = {}
    for source in ID_SOURCES:
        pairs = (text.partition("=") for text in entry.get(source, "").split())
        ids[source] = {item: unit or None for item, _, unit in pairs}
    other = {spelled: (float(scale), float(offset)) for spelled, (scale, offset) in entry.get("other", {}).items()}
    return Concept(
        name,
        entry["unit"],
        entry["low"],
        entry["high"],
        ids,
        other,
        entry.get("static", False),
        entry.get("derived", ""),
    )


CONCEPTS: dict[str, Concept] = {name: _concept(name, entry) for name, entry in _DATA["concepts"].items()}
SERIES = tuple(name for name, concept in CONCEPTS.items() if not concept.static)
STATIC = tuple(name for name, concept in CONCEPTS.items() if concept.static)
DERIVED = tuple(name for name, concept in CONCEPTS.items() if concept.derived)
SUMMED = ("urine",)  # amounts add up over an hour; of everything else the last value counts


def by_id(source: str) -> dict[str, str]:
    """Source id -> concept name."""
    return {item: concept.name for concept in CONCEPTS.values() for item in concept.ids.get(source, {})}


def spelled(unit: str) -> str:
    """A unit as it is compared: lower case, single spaces."""
    return " ".join(unit.lower().split())


_SAME = {unit: {spelled(unit), *map(spelled, others)} for unit, others in _DATA["units"].items()}
_KNOWN = set().union(*_SAME.values(), *(c.other for c in CONCEPTS.values()), _DATA["foreign"]["units"])


def factor(concept: Concept, said: str | None) -> tuple[float, float] | None:
    """(scale, offset) from values recorded in the unit `said` to the concept's own; None where that unit is of
    something else. A unit that nothing here knows is taken for the concept's own."""
    unit = spelled(said or "")
    if unit in concept.other:
        return concept.other[unit]
    own = _SAME.get(concept.unit, set()) | {spelled(concept.unit)}
    return None if unit in _KNOWN and unit not in own else (1.0, 0.0)


def contradicting(where: str, wrong: list[str]) -> DataError:
    """The error for units that say something else than the concept; `wrong` in words."""
    return DataError(
        f"{where}: units contradict the concept: {'; '.join(wrong[:5])}",
        f"{len(wrong)} ids with such a unit",
        "correct the unit, or convert the values",
    )


def units_of(source: str, pairs: Iterable[tuple[str, str | None]], where: str) -> pl.DataFrame:
    """item, unit, concept, scale, offset for each (id, unit as recorded) of a source: value * scale + offset is in the
    concept's unit.

    Raises DataError for a unit that is of something else (a PaO2 in mg/dL); `where` is the table.
    """
    names = by_id(source)
    rows, wrong = [], []
    for item, recorded in pairs:
        if item not in names:
            continue
        concept = CONCEPTS[names[item]]
        said = concept.ids[source][item] or recorded
        found = factor(concept, said)
        if found is None:
            wrong.append(f"{concept.name} ({item}) in '{said}', which should be in {concept.unit}")
        else:
            rows.append((item, recorded, concept.name, *found))
    if wrong:
        raise contradicting(where, wrong)
    schema = {"item": pl.String, "unit": pl.String, "concept": pl.String, "scale": pl.Float64, "offset": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")
