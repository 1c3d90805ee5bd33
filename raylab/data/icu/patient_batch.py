"""Reduces the events of one batch of patients to rows and hourly grids, and sums the counts of all batches.

Only one batch is in memory at a time. Each patient is in exactly one batch, so counts of patients and stays add up.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from raylab.data.icu import cohorts
from raylab.data.icu.concepts import (
    CONCEPT,
    CONCEPTS,
    EVENTS,
    SERIES,
    UNIT,
    charted_steps,
    exact,
    to_own_units,
    with_coded_ids,
)
from raylab.data.icu.derive import derive_series
from raylab.data.icu.labels import GRADES, Framing, Label, first_onset, ratios, sensitivity, severity
from raylab.data.icu.timegrid import first_values, grid, hourly_cells, with_static
from raylab.errors import DataError

FEW = 20  # minimum values for a statement about their unit
MOST_UNKNOWN = 0.05  # maximum fraction of values in an unknown unit, for a concept that the label reads
# mmHg: arterial values this low are rare (0.1% of PaO2, 0.02% of PaCO2 of PhysioNet 2012), but most values in kPa are
# this low
AS_LOW_AS_KPA = {"pao2": 30.0, "paco2": 12.0}
ROOM_AIR, ROOM_AIR_STEPS = 0.21, (200, 210)  # FiO2 is charted in steps of 0.001
PERCENT = 19.95  # FiO2 of at least this (20 when rounded) is a percentage
PROBLEMS = ("out_of_range", "unreadable", "percent", "room_air")
COUNTS = (*PROBLEMS, "no_unit", "converted", "unknown_units")
"""Counts of values in meta.json, by concept; the last two by concept and unit as recorded."""
UNITS_SHOWN, UNIT_LENGTH = 10, 40  # limits per concept, because a column of units may contain anything
LOST = {"out_of_range": "out of range", "unreadable": "not numbers", "unknown_unit": "in an unknown unit"}
OUTSIDE, UNREADABLE, UNKNOWN_UNIT = "out of range", "unreadable", "unknown unit"
PROBLEM = pl.Enum([OUTSIDE, UNREADABLE, UNKNOWN_UNIT])
_LOW = {name: float(concept.low) for name, concept in CONCEPTS.items()}
_HIGH = {name: float(concept.high) for name, concept in CONCEPTS.items()}


def screen(events: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Return (all rows with a concept, time and value; the same rows in the concepts' units, without negative times and
    exact duplicates, with null for unusable values).

    FiO2 of 20 and above is a percentage and is divided by 100; 20% to 21% is room air, 0.21. A value is null if it is
    out of range after rounding to the precision of its concept (this removes FiO2 between 1 and 20, which is a flow in
    litres per minute), is not a number, or is in an unknown unit; `problem` gives the reason. A null is still a record
    of the stay, and ends the carry of the previous value (`labels.ratios`, `grid`). `strange` marks values that are out
    of range and not 0, which often stands for a missing value; `like_kpa` marks a partial pressure as low as in kPa.
    `unit` and `unit_is` come from `to_own_units`; `percent` and `room_air` mark FiO2 that was converted that way.
    """
    value, steps, fio2 = pl.col("value"), pl.col("steps"), pl.col("concept") == "fio2"
    per = {name: 10.0 ** concept.decimals() for name, concept in CONCEPTS.items()}
    low_steps, high_steps = (
        _by_concept({name: float(round(bound * per[name])) for name, bound in bounds.items()})
        for bounds in (_LOW, _HIGH)
    )
    present = events.drop_nulls(["time", "value", "concept"])
    unique = (
        to_own_units(present.with_columns(pl.col("concept").cast(CONCEPT, strict=False)))
        .filter(pl.col("time") >= 0, pl.col("concept").is_not_null())
        .with_columns(unknown=(pl.col("unit_is") == "unknown").fill_null(False))
        .unique([*EVENTS.names(), "unknown"], keep="first", maintain_order=True)
        .with_columns(exact=exact(value))
        .with_columns(percent=fio2 & (pl.col("exact") >= PERCENT))
        .with_columns(
            pl.when("percent").then(pl.col(name) / 100).otherwise(name).alias(name) for name in ("value", "exact")
        )
        .with_columns(steps=charted_steps(pl.col("exact"), _by_concept(per)))
        .with_columns(room=fio2 & steps.is_between(*ROOM_AIR_STEPS))
        .with_columns(
            value=pl.when("room").then(ROOM_AIR).otherwise(value),
            steps=pl.when("room").then(ROOM_AIR_STEPS[1]).otherwise(steps),
            room_air=pl.col("room") & (pl.col("exact") < ROOM_AIR),
        )
        .with_columns(
            problem=pl.when(value.is_nan())
            .then(pl.lit(UNREADABLE, PROBLEM))
            .when("unknown")
            .then(pl.lit(UNKNOWN_UNIT, PROBLEM))
            .when(~steps.is_between(low_steps, high_steps))
            .then(pl.lit(OUTSIDE, PROBLEM))
        )
        .with_columns(
            # values that are inside only after rounding are set to the bound
            value=pl.when(pl.col("problem").is_null()).then(value.clip(_by_concept(_LOW), _by_concept(_HIGH))),
            strange=(pl.col("problem") == OUTSIDE).fill_null(False) & (value != 0),
            like_kpa=(value > 0) & (value <= _by_concept(AS_LOW_AS_KPA)) & ~pl.col("unknown"),
        )
        .drop("exact", "steps", "room", "unknown")
    )
    return present, unique


def _by_concept(values: Mapping[str, float]) -> pl.Expr:
    """Return the value of each row's concept (of type CONCEPT); null for one that is not in `values`."""
    return pl.lit(pl.Series([values.get(name) for name in CONCEPTS], dtype=pl.Float64)).gather(
        pl.col("concept").to_physical()
    )


@dataclass(frozen=True)
class PatientBatch:
    """The rows, hourly grids and counts of one batch of patients."""

    seen: list[str]  # stays with any event
    unlisted: pl.Series  # stays with events but without a row in the source's table of stays
    of_unknown_age: int  # number of stays
    rows: pl.DataFrame  # rows at risk
    table: pl.DataFrame  # their hourly grid
    steps: list[tuple[str, int, int]]
    counts: pl.DataFrame
    by_concept: pl.DataFrame
    by_unit: pl.DataFrame  # concept, unit, unit_is, n: of values whose unit the source records
    onsets: dict[str, int]
    sensitivity: list[dict[str, Any]]


def summarise_patients(
    events: pl.LazyFrame,
    stays: pl.DataFrame,
    framing: Framing,
    rule: Label,
    windows: bool,
    left_out: Collection[str] = (),
) -> PatientBatch:
    """Reduce one batch: the `events` of some patients, with all of their stays. Values of the concepts `left_out` are
    counted, but nothing is made of them: no series, and no series or cohort derived from them."""
    events = with_coded_ids(events.collect()).lazy()
    present, unique = screen(events)
    counts, screened = pl.collect_all(
        [
            present.select(
                rows=pl.len(), negative_time=(pl.col("time") < 0).sum(), no_value=pl.col("value").is_null().sum()
            ),
            unique,
        ]
    )
    ages = ages_of(screened)
    too_young = ages.filter(pl.col("age") < rule.min_age)["stay_id"]
    adults = screened.filter(~pl.col("stay_id").is_in(too_young.implode())) if len(too_young) else screened
    values = adults.lazy().select(EVENTS.names())
    if left_out:
        values = values.filter(~pl.col("concept").cast(pl.String).is_in(list(left_out)))
    by_concept, by_unit, last, cells, static, found = pl.collect_all(
        [
            count_by_concept(screened.lazy()),
            count_by_unit(screened.lazy()),
            screened.lazy().group_by("stay_id").agg(last=pl.col("time").max()),
            *read_features(values, framing.hours()),
            ratios(values, rule),
        ]
    )
    onsets = first_onset(found.lazy(), rule).collect()
    here = stays.join(with_text_ids(last), "stay_id")
    for table in (onsets, ages):
        here = here.join(with_text_ids(table), "stay_id", "left")
    at_risk, steps = cohorts.attrition(here, framing, rule)
    rows = rule.rows(at_risk.drop("age"), framing).with_columns(pl.col("stay_id").cast(screened.schema["stay_id"]))
    rows = with_static(cohorts.flags(rows, values, found.lazy(), rule), static)
    rows = with_text_ids(rows).sort("stay_id", "at_h")
    cells = with_text_ids(cells)
    table = grid(cells, rows["stay_id"].unique(maintain_order=True), framing.hours())
    grades = dict(severity(found.lazy(), onsets.lazy()).collect()["severity"].value_counts().iter_rows())
    all_onsets = {
        "stays": onsets.height,
        "after_6_h": onsets.filter(pl.col("onset_h") > 6).height,
        "after_12_h": onsets.filter(pl.col("onset_h") > 12).height,
        **{grade: grades[grade] for grade in GRADES if grade in grades},
    }
    windows_table = [count_onsets(values, other) for other in sensitivity(rule)] if windows else []
    return PatientBatch(
        seen=here["stay_id"].to_list(),
        unlisted=with_text_ids(last).join(stays, "stay_id", "anti")["stay_id"],
        of_unknown_age=here["age"].null_count(),
        rows=rows,
        table=table,
        steps=steps,
        counts=counts,
        by_concept=by_concept,
        by_unit=by_unit,
        onsets=all_onsets,
        sensitivity=windows_table,
    )


def read_features(values: pl.LazyFrame, hours: int) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """Return the hourly cells and the first static values (timegrid.py) of screened events before `hours`, with the
    series that are derived from them."""
    before = values.filter(pl.col("time") < hours)
    before = pl.concat([before, derive_series(before)])
    return hourly_cells(before), first_values(before)


def with_text_ids(table: pl.DataFrame) -> pl.DataFrame:
    """Return `table` with stay_id as text."""
    return table.with_columns(pl.col("stay_id").cast(pl.String))


def count_by_concept(screened: pl.LazyFrame) -> pl.LazyFrame:
    """Return the counts of values of each concept, and the number of stays with a usable one."""
    problem, concept = pl.col("problem"), pl.col("concept").cast(pl.String)
    usable = problem.is_null()
    counts = screened.group_by("concept").agg(
        rows=pl.len(),
        out_of_range=(problem == OUTSIDE).sum(),
        unreadable=(problem == UNREADABLE).sum(),
        unknown_unit=(problem == UNKNOWN_UNIT).sum(),
        strange=pl.col("strange").sum(),
        like_kpa=pl.col("like_kpa").sum(),
        percent=(pl.col("percent") & usable).sum(),
        room_air=pl.col("room_air").sum(),
    )
    stays = screened.filter(usable).select("concept", "stay_id").unique().group_by("concept").agg(stays=pl.len())
    stays = counts.join(stays, "concept", "left").with_columns(pl.col("stays").fill_null(0))
    return stays.with_columns(concept)


def count_by_unit(screened: pl.LazyFrame) -> pl.LazyFrame:
    """Return concept, unit, unit_is and n, the number of values whose unit the source records."""
    counts = screened.drop_nulls("unit_is").group_by("concept", UNIT, "unit_is").agg(n=pl.len())
    return counts.with_columns(pl.col("concept").cast(pl.String))


def ages_of(screened: pl.DataFrame) -> pl.DataFrame:
    """Return stay_id and age (years): the first plausible age of each stay that has one."""
    ages = screened.filter(pl.col("concept") == "age", pl.col("value").is_not_null()).sort("time", "value")
    return ages.group_by("stay_id").agg(age=pl.col("value").first())


def count_onsets(values: pl.LazyFrame, rule: Label) -> dict[str, Any]:
    """Count the onsets for one choice of windows: of all stays, and those after 6 and 12 h."""
    onset = first_onset(ratios(values, rule), rule).collect()["onset_h"]
    return {
        "fio2_back_h": rule.fio2_back_h,
        "persist_h": rule.persist_h,
        "stays": len(onset),
        "after_6_h": int((onset > 6).sum()),
        "after_12_h": int((onset > 12).sum()),
    }


def unrecorded(stays: pl.DataFrame, framing: Framing, rule: Label) -> PatientBatch:
    """Return a batch of stays without records, which only count in the attrition."""
    none = stays.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ("last", "onset_h", "age"))
    _, steps = cohorts.attrition(none, framing, rule)
    empty = pl.DataFrame()
    return PatientBatch([], pl.Series(dtype=pl.String), 0, empty, empty, steps, empty, empty, empty, {}, [])


@dataclass(frozen=True)
class Totals:
    """The summed counts of all batches."""

    counts: dict[str, int]
    by_concept: pl.DataFrame
    by_unit: pl.DataFrame
    onsets: dict[str, int]
    sensitivity: list[dict[str, Any]]
    found: set[str]  # concepts with a column in the grid of any batch
    covered: dict[str, int]  # concept -> stays with a plausible value

    @classmethod
    def of(cls, pieces: list[PatientBatch]) -> "Totals":
        """Sum the counts of all batches; those without events add nothing."""
        full = [piece for piece in pieces if piece.counts.height]
        by_concept = pl.concat([piece.by_concept for piece in full]).group_by("concept").sum().sort("concept")
        units = pl.concat([piece.by_unit for piece in full]).group_by("concept", UNIT, "unit_is").sum()
        onsets: dict[str, int] = {}
        for piece in full:
            onsets |= {key: onsets.get(key, 0) + n for key, n in piece.onsets.items()}
        windows = [
            {key: value if key.endswith("_h") and "after" not in key else sum(cell[key] for cell in cells)
             for key, value in cells[0].items()}
            for cells in zip(*(piece.sensitivity for piece in full), strict=True)
        ]  # fmt: skip
        return cls(
            pl.concat([piece.counts for piece in full]).sum().row(0, named=True),
            by_concept,
            units.sort("concept", "n", UNIT, descending=[False, True, False]),
            onsets,
            windows,
            {name for piece in full for name in SERIES if name in piece.table.columns},
            dict(by_concept.select("concept", "stays").iter_rows()),
        )

    def by_problem(self) -> dict[str, dict[str, int]]:
        """Return out_of_range, unreadable, no_unit, percent, room_air -> concept -> number of values."""
        table = {
            what: {name: n for name, n in self.by_concept.select("concept", what).iter_rows() if n} for what in PROBLEMS
        }
        rows = self.by_unit.filter(pl.col("unit_is") == "none").group_by("concept").agg(pl.col("n").sum())
        return {**table, "no_unit": dict(rows.sort("concept").iter_rows())}

    def units(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return converted, unknown_units -> concept -> unit as recorded -> number of values."""
        return {name: units_of(self.by_unit, what) for name, what in
                (("converted", "converted"), ("unknown_units", "unknown"))}  # fmt: skip

    def dropped(self) -> dict[str, int]:
        kept = int(self.by_concept["rows"].sum())
        return {
            "negative time": self.counts["negative_time"],
            "exact duplicate": self.counts["rows"] - self.counts["negative_time"] - kept,
        }


def units_of(by_unit: pl.DataFrame, unit_is: str) -> dict[str, dict[str, int]]:
    """Return concept -> unit as recorded -> number of values with this `unit_is`, the most frequent unit first."""
    table: dict[str, dict[str, int]] = {}
    for name, unit, n in by_unit.filter(pl.col("unit_is") == unit_is).select("concept", UNIT, "n").iter_rows():
        units = table.setdefault(name, {})
        shown = unit[:UNIT_LENGTH] if len(units) < UNITS_SHOWN else "others"
        units[shown] = units.get(shown, 0) + n
    return table


def check_units(totals: Totals, rule: Label) -> None:
    """Raise DataError if more than MOST_UNKNOWN of the values of a concept that the label reads are in an unknown unit,
    because too many stays would be labelled on the remaining values."""
    counts = {name: (n, rows) for name, n, rows in
              totals.by_concept.select("concept", "unknown_unit", "rows").iter_rows()}  # fmt: skip
    units = totals.units()["unknown_units"]
    wrong = []
    for name in rule.reads():
        n, rows = counts.get(name, (0, 0))
        if n > MOST_UNKNOWN * rows:
            named = ", ".join(f"'{unit}' ({count:,})" for unit, count in list(units[name].items())[:5])
            wrong.append(f"{name}, which should be in {CONCEPTS[name].unit}: {n:,} of {rows:,} values in {named}")
    if wrong:
        raise DataError(
            f"more than {MOST_UNKNOWN:.0%} of the values of concepts that the label needs are in unknown units",
            "; ".join(wrong),
            "correct the unit, convert the values, or name the unit of a MEDS code in a mapping (code=unit)",
        )


def implausible(by_concept: pl.DataFrame, rule: Label) -> dict[str, str]:
    """Return {concept: why} for concepts whose values are apparently not in the stated unit.

    With at least FEW values, more than half of them (except zeros) are out of range, or more than MOST_UNKNOWN of a
    partial pressure are as low as in kPa. Such concepts are excluded; DataError if the label needs one.
    """
    reasons = {}
    for name, rows, strange, low in by_concept.select("concept", "rows", "strange", "like_kpa").iter_rows():
        concept = CONCEPTS[name]
        if rows >= FEW and low > MOST_UNKNOWN * rows:
            bound = f"{AS_LOW_AS_KPA[name]:g} {concept.unit}"
            reasons[name] = f"{low:,} of {rows:,} values are {bound} or less, as values in kPa are"
        elif rows >= FEW and 2 * strange > rows:
            plausible = f"{concept.low:g} to {concept.high:g} {concept.unit}"
            reasons[name] = f"{strange:,} of {rows:,} values are outside {plausible}"
    needed = [name for name in reasons if name in {*rule.needs(), *(("spo2",) if rule.sf else ())}]
    if needed:
        raise DataError(
            f"values of {', '.join(needed)} cannot be in the concept's unit, which the label needs",
            "; ".join(f"{name}: {reasons[name]}" for name in needed),
            "convert the values (1 kPa is 7.50062 mmHg), or name their unit in the data: see docs/data.md, Units",
        )
    return reasons


def check_needed(by_concept: pl.DataFrame, source: str, rule: Label) -> None:
    """Raise DataError unless there is at least one plausible value of each concept that the label needs."""
    bad = pl.sum_horizontal("out_of_range", "unreadable", "unknown_unit")
    usable = dict(by_concept.select("concept", pl.col("rows") - bad).iter_rows())
    needed = (*rule.needs(), *(("spo2",) if rule.sf is not None and not usable.get("pao2") else ()))
    missing = [name for name in needed if not usable.get(name)]
    if missing:
        lost = by_concept.filter(pl.col("concept").is_in(missing))
        why = [
            f"{row[what]:,} values of {row['concept']} are {words}"
            for row in lost.iter_rows(named=True)
            for what, words in LOST.items()
            if row[what]
        ]
        read = f"{sum(usable.values())} events of {len(usable)} concepts were read from source '{source}'"
        raise DataError(
            f"the label '{rule.name}' cannot be made: no plausible value of {', '.join(missing)}",
            "; ".join([*why, read]),
            "check that the raw data has gases, FiO2 and what else the label needs, or choose another --label",
        )
