"""Who is scored: stays at risk, cohorts, and the attrition of each."""

import hashlib
from typing import Any

import polars as pl

from raylab.data.icu.labels import Framing, Label
from raylab.errors import DataError

COHORTS = ("all", "ventilated_pf", "ventilated", "gas", "matched")
CONTROLS = 4  # matched controls a case, at most
AGE_BAND = 10  # years


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
    for step, left in rule.exclude(stays, framing):
        stays = left
        note(step)
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


def flags(rows: pl.DataFrame, measured: pl.LazyFrame, found: pl.LazyFrame, rule: Label) -> pl.DataFrame:
    """`rows` with `ventilated` (the latest record at most `vent_back_h` back says so), `gas` (a P/F at or before the
    prediction) and `ventilated_pf` (both). `found` as from `ratios`."""
    seconds = (pl.col("time") * 3600).round().cast(pl.Int64)
    ventilation = measured.filter(pl.col("concept") == "mech_vent").with_columns(s=seconds).sort("s", "value")
    first = found.filter(pl.col("kind") == "pf").group_by("stay_id").agg(first_gas=pl.col("time").min())
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
