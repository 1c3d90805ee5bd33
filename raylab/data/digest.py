"""One piece of the patients: events -> what is kept of them; and the counts of all pieces together.

Memory holds one piece at a time. No patient is in two pieces, so that patients and stays add up.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from raylab.data import cohorts
from raylab.data.cohorts import Framing
from raylab.data.concepts import CONCEPTS, SERIES
from raylab.data.derive import derived
from raylab.data.grid import first_values, grid, hourly_cells
from raylab.data.onset import Label, first_onset, pf_ratios, ratios, sensitivity, severity
from raylab.errors import DataError

FEW = 20  # values, under which nothing is said about their unit


def screen(events: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """(all rows with a known concept, time and value; the same without negative times and exact duplicates, in which
    implausible values are null).

    FiO2 above 20 is a percentage and divided by 100. What then lies outside the range of its concept is null: among
    FiO2 that removes 1 to 20, which are litres a minute. A null still counts as a record of the stay. `strange` marks
    what lies outside and is not 0, which is how a missing value is often written.
    """
    ranges = pl.LazyFrame(
        [(concept.name, concept.low, concept.high) for concept in CONCEPTS.values()],
        schema=["concept", "low", "high"],
        orient="row",
    )
    value = (
        pl.when((pl.col("concept") == "fio2") & (pl.col("value") > 20))
        .then(pl.col("value") / 100)
        .otherwise(pl.col("value"))
    )
    present = events.drop_nulls(["time", "value", "concept"])
    unique = (
        present.filter(pl.col("time") >= 0)
        .unique()
        .join(ranges, "concept")
        .with_columns(value=value)
        .with_columns(inside=pl.col("value").is_between("low", "high"))
        .with_columns(value=pl.when("inside").then("value"), strange=~pl.col("inside") & (pl.col("value") != 0))
        .drop("low", "high", "inside")
    )
    return present, unique


@dataclass(frozen=True)
class Digest:
    """What is kept of one piece of the patients."""

    seen: list[str]  # stays with any event
    unlisted: pl.Series  # stays with events that are not among the stays of the source
    of_unknown_age: int  # stays
    rows: pl.DataFrame  # rows at risk
    table: pl.DataFrame  # their hourly grid
    steps: list[tuple[str, int, int]]
    counts: pl.DataFrame
    by_concept: pl.DataFrame
    onsets: dict[str, int]
    sensitivity: list[dict[str, Any]]


def digest(events: pl.LazyFrame, stays: pl.DataFrame, framing: Framing, rule: Label, windows: bool) -> Digest:
    """One piece: `events` of some patients with all of their stays."""
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
    defined = screened.lazy().filter(~pl.col("stay_id").is_in(too_young.implode()))
    measured = defined.filter(pl.col("value").is_not_null()).drop("strange")
    found, gases = ratios(measured, rule), pf_ratios(measured, rule)
    before = pl.concat([measured, derived(measured)]).filter(pl.col("time") < framing.hours())
    outside = pl.col("value").is_null()
    by_concept, onsets, last, cells, static, all_ratios, all_gases = pl.collect_all(
        [
            screened.lazy()
            .group_by("concept")
            .agg(
                rows=pl.len(),
                out_of_range=outside.sum(),
                strange=pl.col("strange").sum(),
                stays=pl.col("stay_id").filter(~outside).n_unique(),
            ),
            first_onset(found, rule),
            screened.lazy().group_by("stay_id").agg(last=pl.col("time").max()),
            hourly_cells(before),
            first_values(before),
            found,
            gases,
        ]
    )
    here = stays.join(last, "stay_id").join(onsets, "stay_id", "left").join(ages, "stay_id", "left")
    at_risk, steps = cohorts.attrition(here, framing, rule)
    rows = cohorts.flags(cohorts.rows_at(at_risk.drop("age"), framing), measured, all_gases.lazy(), rule)
    rows = rows.join(static, "stay_id", "left").sort("stay_id", "at_h")
    table = grid(cells, rows["stay_id"].unique(maintain_order=True), framing.hours())
    grades = severity(all_ratios.lazy(), onsets.lazy()).collect()["severity"].value_counts()
    all_onsets = {
        "stays": onsets.height,
        "after_6_h": onsets.filter(pl.col("onset_h") > 6).height,
        "after_12_h": onsets.filter(pl.col("onset_h") > 12).height,
        **dict(grades.iter_rows()),
    }
    moved = [moves(measured, other) for other in sensitivity(rule)] if windows else []
    unlisted = last.join(stays, "stay_id", "anti")["stay_id"]
    of_unknown_age = here["age"].null_count()
    return Digest(
        here["stay_id"].to_list(), unlisted, of_unknown_age, rows, table, steps, counts, by_concept, all_onsets, moved
    )


def ages_of(screened: pl.DataFrame) -> pl.DataFrame:
    """stay_id, age (years): the first plausible one of each stay that has one."""
    ages = screened.filter(pl.col("concept") == "age", pl.col("value").is_not_null()).sort("time", "value")
    return ages.group_by("stay_id").agg(age=pl.col("value").first())


def moves(measured: pl.LazyFrame, rule: Label) -> dict[str, Any]:
    """Onsets under one choice of windows: of all stays, and those after 6 and 12 h."""
    onset = first_onset(ratios(measured, rule), rule).collect()["onset_h"]
    return {
        "fio2_back_h": rule.fio2_back_h,
        "persist_h": rule.persist_h,
        "stays": len(onset),
        "after_6_h": int((onset > 6).sum()),
        "after_12_h": int((onset > 12).sum()),
    }


def unrecorded(stays: pl.DataFrame, framing: Framing, rule: Label) -> Digest:
    """Stays of which nothing is recorded: they count in the attrition and nowhere else."""
    none = stays.with_columns(pl.lit(None, pl.Float64).alias(name) for name in ("last", "onset_h", "age"))
    _, steps = cohorts.attrition(none, framing, rule)
    empty = pl.DataFrame()
    return Digest([], pl.Series(dtype=pl.String), 0, empty, empty, steps, empty, empty, {}, [])


@dataclass(frozen=True)
class Whole:
    """The counts of all pieces together."""

    counts: dict[str, int]
    by_concept: pl.DataFrame
    onsets: dict[str, int]
    sensitivity: list[dict[str, Any]]
    found: set[str]  # concepts with a column in any piece's grid
    covered: dict[str, int]  # concept -> stays with a plausible value

    @classmethod
    def of(cls, pieces: list[Digest]) -> "Whole":
        """Sums over pieces; those without events add nothing."""
        full = [piece for piece in pieces if piece.counts.height]
        by_concept = pl.concat([piece.by_concept for piece in full]).group_by("concept").sum().sort("concept")
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
            onsets,
            windows,
            {name for piece in full for name in SERIES if name in piece.table.columns},
            dict(by_concept.select("concept", "stays").iter_rows()),
        )

    def out_of_range(self) -> dict[str, int]:
        return {name: n for name, n in self.by_concept.select("concept", "out_of_range").iter_rows() if n}

    def dropped(self) -> dict[str, int]:
        kept = int(self.by_concept["rows"].sum())
        return {
            "negative time": self.counts["negative_time"],
            "exact duplicate": self.counts["rows"] - self.counts["negative_time"] - kept,
        }


def implausible(by_concept: pl.DataFrame, rule: Label) -> list[str]:
    """Concepts of whose values (FEW at least, zeros aside) more than half lie outside the plausible range: they are
    recorded in another unit. They are left out; DataError where the label needs one."""
    strange = [
        name
        for name, rows, n in by_concept.select("concept", "rows", "strange").iter_rows()
        if rows >= FEW and 2 * n > rows
    ]
    needed = [name for name in strange if name in {*rule.needs(), *(("spo2",) if rule.sf else ())}]
    if needed:
        ranges = "; ".join(
            f"{CONCEPTS[name].low:g} to {CONCEPTS[name].high:g} {CONCEPTS[name].unit} for {name}" for name in needed
        )
        raise DataError(
            f"most values of {', '.join(needed)} cannot be in the concept's unit",
            f"the label needs them; plausible are {ranges}",
            "convert the values to these units",
        )
    return strange


def check_needed(by_concept: pl.DataFrame, source: str, rule: Label) -> None:
    """The label needs at least one plausible value of each concept that it asks for."""
    usable = {name: rows - bad for name, rows, bad in by_concept.select("concept", "rows", "out_of_range").iter_rows()}
    needed = (*rule.needs(), *(("spo2",) if rule.sf is not None and not usable.get("pao2") else ()))
    missing = [name for name in needed if not usable.get(name)]
    if missing:
        raise DataError(
            f"the label '{rule.name}' cannot be made: no plausible value of {', '.join(missing)}",
            f"{sum(usable.values())} events of {len(usable)} concepts were read from source '{source}'",
            "check that the raw data holds gases, FiO2 and what else the label asks for, or choose another --label",
        )
