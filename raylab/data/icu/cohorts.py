"""Who is scored, when, and how it ended: rows at risk, competing ends, cohorts, and the attrition of each."""

import hashlib
from dataclasses import dataclass
from typing import Any

import polars as pl

from raylab.data.icu.labels import Death, Label
from raylab.errors import DataError

COHORTS = ("all", "ventilated_pf", "ventilated", "gas", "matched")
CONTROLS = 4  # matched controls a case, at most
AGE_BAND = 10  # years
SLACK_H = 2.0  # a stay whose last record lies so near the end of the horizon was seen to its end


@dataclass(frozen=True)
class Framing:
    """When is predicted, and what counts.

    `landmark`  h: prediction at it (framing "landmark"), or from it on every hour until onset or the last record, at
                most until `until` ("rolling"). The model looks back `landmark` hours in both.
    `gap`       h after the prediction that no onset may fall into: the row is then left out
    `horizon`   h after the gap in which onset counts
    """

    landmark: int = 12
    horizon: float = 24.0
    gap: float = 0.0
    kind: str = "landmark"
    until: int = 48

    def hours(self) -> int:
        """How many hours of features the rows together see."""
        return self.landmark if self.kind == "landmark" else self.until


def attrition(stays: pl.DataFrame, framing: Framing, rule: Label) -> tuple[pl.DataFrame, list[tuple[str, int, int]]]:
    """The stays at risk at the (first) prediction, and (step, patients, stays) after each exclusion.

    `stays` has onset_h (null = none), last (time of the last record, null = no record at all) and age (null = unknown).
    """
    steps: list[tuple[str, int, int]] = []

    def note(step: str) -> None:
        steps.append((step, stays["subject_id"].n_unique(), stays.height))

    landmark = framing.landmark
    note("all stays")
    if rule.min_age:
        stays = stays.filter(pl.col("age").is_null() | (pl.col("age") >= rule.min_age))
        note(f"{rule.min_age:g} years and older, or of unknown age")
    stays = stays.filter(pl.col("last").is_not_null())
    note("at least one record")
    stays = stays.filter(pl.col("last") > landmark)
    note(f"at least one record beyond {landmark:g} h")
    if isinstance(rule, Death):
        stays = stays.filter(pl.col("end_h").is_null() | (pl.col("end_h") > landmark))
        note(f"in hospital at {landmark:g} h")
        stays = stays.filter(pl.col("died").is_not_null())
        note("outcome in hospital known")
        return stays, steps
    if rule.prevalent_h:
        stays = stays.filter(pl.col("onset_h").is_null() | (pl.col("onset_h") >= rule.prevalent_h))
        note(f"no onset before {rule.prevalent_h:g} h, there at admission")
    stays = stays.filter(pl.col("onset_h").is_null() | (pl.col("onset_h") > landmark))
    note(f"no onset at or before {landmark:g} h")
    if framing.gap and framing.kind == "landmark":
        stays = stays.filter(pl.col("onset_h").is_null() | (pl.col("onset_h") > landmark + framing.gap))
        note(f"no onset in the gap of {framing.gap:g} h")
    return stays, steps


def summed(steps: list[list[tuple[str, int, int]]]) -> list[dict[str, Any]]:
    """The steps of all pieces (no patient is in two) as one table; DataError that names the step that left nobody."""
    table = [
        {"step": of[0][0], "patients": sum(p for _, p, _ in of), "stays": sum(s for _, _, s in of)}
        for of in zip(*steps, strict=True)
    ]
    for row in table:
        if row["stays"] == 0:
            raise DataError(
                f"the cohort is empty after '{row['step']}'",
                "; ".join(f"{done['step']}: {done['stays']} stays" for done in table[: table.index(row) + 1]),
                "check that the raw data is complete, or choose another --landmark",
            )
    return table


def rows_at(stays: pl.DataFrame, framing: Framing, rule: Label) -> pl.DataFrame:
    """One row a stay at risk and time of prediction: `at_h`, `label`, `outcome`."""
    if isinstance(rule, Death):
        outcome = pl.when("died").then(pl.lit("death in hospital")).otherwise(pl.lit("discharge alive"))
        at = pl.lit(float(framing.landmark))
        return stays.with_columns(at_h=at, label=pl.col("died").cast(pl.Int8), outcome=outcome)
    if framing.kind == "landmark":
        rows = stays.with_columns(at_h=pl.lit(float(framing.landmark)))
    else:
        last = pl.min_horizontal(pl.col("last"), pl.col("onset_h"), pl.lit(float(framing.until) + 1e-9))
        count = (last - framing.landmark).ceil().clip(0).cast(pl.Int64)  # times strictly before `last`
        rows = stays.with_columns(at_h=pl.int_ranges(framing.landmark, framing.landmark + count)).explode("at_h")
        rows = rows.drop_nulls("at_h").with_columns(pl.col("at_h").cast(pl.Float64))
    begin, end = pl.col("at_h") + framing.gap, pl.col("at_h") + framing.gap + framing.horizon
    onset = pl.col("onset_h")
    rows = rows.filter(onset.is_null() | (onset > begin))
    ended = pl.col("end_h") <= end
    outcome = (
        pl.when((onset <= end).fill_null(False))
        .then(pl.lit("onset"))
        .when((ended & (pl.col("end") == "death")).fill_null(False))
        .then(pl.lit("death before onset"))
        .when((ended & (pl.col("end") == "discharge")).fill_null(False))
        .then(pl.lit("discharge before onset"))
        .when(onset.is_null() & (pl.col("last") < end - SLACK_H))
        .then(pl.lit("records end before the horizon does"))
        .otherwise(pl.lit("no onset within the horizon"))
    )
    return rows.with_columns(outcome=outcome, label=(outcome == "onset").cast(pl.Int8))


def flags(rows: pl.DataFrame, measured: pl.LazyFrame, gases: pl.LazyFrame, rule: Label) -> pl.DataFrame:
    """`rows` with `ventilated` (the latest record at most `vent_back_h` back says so), `gas` (a P/F at or before the
    prediction) and `ventilated_pf` (both). `gases` as from `pf_ratios`."""
    seconds = (pl.col("time") * 3600).round().cast(pl.Int64)
    ventilation = measured.filter(pl.col("concept") == "mech_vent").with_columns(s=seconds).sort("s", "value")
    first = gases.group_by("stay_id").agg(first_gas=pl.col("time").min())
    at = (
        rows.lazy()
        .with_columns(s=(pl.col("at_h") * 3600).round().cast(pl.Int64))
        .sort("s")
        .join_asof(
            ventilation.select("stay_id", "s", going="value"),
            on="s",
            by="stay_id",
            tolerance=round(rule.vent_back_h * 3600),
            check_sortedness=False,
        )
        .join(first, "stay_id", "left")
        .with_columns(
            ventilated=(pl.col("going") == 1).fill_null(False),
            gas=(pl.col("first_gas") <= pl.col("at_h")).fill_null(False),
        )
        .with_columns(ventilated_pf=pl.col("ventilated") & pl.col("gas"))
    )
    return at.drop("s", "going", "first_gas").collect()


def matched(rows: pl.DataFrame) -> pl.Series:
    """True for every case with a control like it, and for at most CONTROLS controls a case.

    A control is a row without onset of the same split, decade of age, sex, unit type, ventilation and hour of
    prediction: cases and controls are looked at at the same time of their stay. Which controls is decided by
    SHA-256(stay), not by the order of the rows; a row is taken once.
    """
    keys = [
        pl.col("split"),
        (pl.col("age") // AGE_BAND) if "age" in rows.columns else pl.lit(None).alias("age"),
        *(pl.col(name) for name in ("sex", "icu_type") if name in rows.columns),
        pl.col("ventilated"),
        pl.col("at_h"),
    ]
    draw = [hashlib.sha256(stay.encode()).hexdigest() for stay in rows["stay_id"]]
    case = pl.col("label") == 1
    place = pl.col("draw").rank("ordinal").over(*keys, "label")
    table = rows.with_columns(draw=pl.Series(draw, dtype=pl.String)).select(
        cases=case.sum().over(keys),
        controls=(~case).sum().over(keys),
        place=place,
        case=case,
    )
    return table.select(
        pl.when("case").then(pl.col("controls") > 0).otherwise(pl.col("place") <= CONTROLS * pl.col("cases"))
    ).to_series()


def cohort_attrition(rows: pl.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """For every cohort the rows, stays, patients and onsets left after each exclusion from the rows at risk."""
    steps = {
        "ventilated": [("ventilated at the prediction", "ventilated")],
        "gas": [("a P/F at or before the prediction", "gas")],
        "ventilated_pf": [("ventilated at the prediction", "ventilated"), ("a P/F at or before it", "gas")],
        "matched": [(f"cases with up to {CONTROLS} controls like them", "matched")],
    }

    def count(step: str, left: pl.DataFrame) -> dict[str, Any]:
        return {
            "step": step,
            "patients": left["subject_id"].n_unique(),
            "stays": left["stay_id"].n_unique(),
            "rows": left.height,
            "positive": int(left["label"].sum() or 0),
        }

    table = {"all": [count("at risk", rows)]}
    for name, exclusions in steps.items():
        left, table[name] = rows, [count("at risk", rows)]
        for step, column in exclusions:
            left = left.filter(pl.col(column))
            table[name].append(count(step, left))
    return table
