"""New patients: a frame of raw events, without labels, becomes the rows and inputs of a trained model.

    check_events    the caller's frame -> events, or an error that names what is wrong
    screen          units; what cannot be used to null   (patient_batch.py, as in `prepare`)
    read_features   derived series, hourly cells         (patient_batch.py, as in `prepare`)
    grid            the hours before the prediction      (timegrid.py, as in `prepare`)
    build_inputs    the model's own features, statistics and hours (dataset.py, as for a prepared directory)

A stay is predicted if the model is meant for it and it has a minimum of input; the other stays get a reason instead of
a probability. A stay needs no record beyond its landmark: the caller says, by asking, that it has got there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from raylab.data.icu import cohorts
from raylab.data.icu.concepts import (
    CONCEPTS,
    EVENTS,
    UNIT,
    with_coded_ids,
)
from raylab.data.icu.dataset import IcuInputs, build_inputs
from raylab.data.icu.labels import WITHIN, Framing, Label, first_onset, ratios
from raylab.data.icu.patient_batch import (
    AS_LOW_AS_KPA,
    FEW,
    Totals,
    ages_of,
    check_units,
    count_by_concept,
    count_by_unit,
    implausible,
    read_features,
    screen,
    with_text_ids,
)
from raylab.data.icu.prepare import VIRTUAL
from raylab.data.icu.text_values import read_text_values
from raylab.data.icu.timegrid import grid, with_static
from raylab.errors import DataError

REQUIRED = ("stay_id", "time", "concept", "value")
OPTIONAL = (UNIT, "subject_id")
OXYGENATION = ("pao2", "sao2", "spo2")
VITAL_SIGNS = ("hr", "map", "sysabp", "diasabp", "nimap", "nisysabp", "nidiasabp", "resp_rate", "temp")
"""A stay without a usable value of any of OXYGENATION and VITAL_SIGNS is not predicted."""
FLAGS = ("ventilated_pf", "ventilated", "gas")  # cohorts that are known at the prediction; `matched` needs the label


@dataclass(frozen=True)
class NewPatients:
    """What a model reads of new patients.

    rows      stay_id (as in the caller's frame), at_h (h, when is predicted), last_h (h, the latest record before it),
              reason (null, or why there is no prediction), absent (the model's inputs without a usable value)
    inputs    of the rows without a reason, in their order; None if there are none
    totals    counts of values by concept
    incomplete  rows without a time, concept or value
    missing   inputs of the model that no stay has a usable value of
    left_out  concept -> why none of its values is used
    unknown_concepts  name in the frame -> rows
    of_unknown_age    stays
    doubts    sentences about values that were used
    """

    rows: pl.DataFrame
    inputs: IcuInputs | None
    totals: Totals
    incomplete: int
    missing: list[str]
    left_out: dict[str, str]
    unknown_concepts: dict[str, int]
    of_unknown_age: int
    doubts: list[str]


def read_new_patients(frame: Any, spec: Mapping[str, Any], rule: Label, cohort: str, fill: str) -> NewPatients:
    """Read a frame of raw events (`check_events`) for a model with the inputs `spec`.

    `rule`: the label that it was trained on; a stay that already meets its criteria is not predicted, and neither is
    one outside of `cohort`, the one that it was trained on. `fill` as in `load_icu`. Raises DataError for a frame that
    is not of events, and if values of a concept that the label reads are not in its unit.
    """
    events, dtype, unknown_concepts = check_events(frame)
    framing = framing_of(spec)
    present, unique = screen(with_coded_ids(events).lazy())
    counts, screened = pl.collect_all(
        [present.select(rows=pl.len(), negative_time=(pl.col("time") < 0).sum()), unique],
    )
    by_concept, by_unit = pl.collect_all([count_by_concept(screened.lazy()), count_by_unit(screened.lazy())])
    totals = Totals(counts.row(0, named=True), by_concept.sort("concept"), by_unit.sort("concept", UNIT), {}, [],
                    set(), {})  # fmt: skip
    check_units(totals, rule)
    left_out = implausible(by_concept, rule)
    screened = screened.filter(~pl.col("concept").cast(pl.String).is_in(list(left_out)))
    values = screened.lazy().select(EVENTS.names())
    cells, static, found = pl.collect_all([*read_features(values, framing.hours()), ratios(values, rule)])

    stays = events.select("stay_id").unique(maintain_order=True)
    table = pl.DataFrame()
    if cells["value"].count():
        table = grid(with_text_ids(cells), stays["stay_id"], framing.hours())
    rows = with_risk(rows_to_predict(stays, screened, framing), screened, found, rule, cohort)
    rows = with_static(rows, with_text_ids(static))
    series = list(spec["features"])
    measured = find_measured(rows, table, spec)
    minimum = [name for name in (*OXYGENATION, *VITAL_SIGNS) if name in series] or series
    rows = rows.with_columns(
        absent=pl.Series([[name for name, there in row.items() if not there] for row in measured.iter_rows(named=True)],
                         dtype=pl.List(pl.String)),
        has_minimum=measured.select(pl.any_horizontal(minimum)).to_series(),
    ).with_columns(reason=reason(rule, cohort, minimum))  # fmt: skip
    return NewPatients(
        rows.select(pl.col("stay_id").cast(dtype), "at_h", "last_h", "reason", "absent"),
        make_inputs(rows.filter(pl.col("reason").is_null()), table, dict(spec), fill),
        totals,
        events.height - totals.counts["rows"],
        [name for name in measured.columns if not measured[name].any()],
        left_out,
        unknown_concepts,
        rows.filter(pl.col("age_known").is_null())["stay_id"].n_unique() if rule.min_age else 0,
        doubts(by_concept, rule),
    )


def make_inputs(rows: pl.DataFrame, table: pl.DataFrame, spec: dict[str, Any], fill: str) -> IcuInputs | None:
    """Return the inputs of `rows`, of whose stays `table` is the hourly grid; None if there are no rows."""
    if rows.is_empty():
        return None
    if any(name.startswith(VIRTUAL) for name in spec["static"]):
        from raylab.data.icu.virtual_patient import virtual_patients  # as in `prepare`

        rows = virtual_patients(rows, table, int(spec["landmark_h"]))
    x, _ = build_inputs(rows, table, spec, fill)
    return IcuInputs(x, rows, spec)


def check_events(frame: Any) -> tuple[pl.DataFrame, pl.DataType, dict[str, int]]:
    """Return (events, the caller's type of stay_id, unknown concept -> rows) of a polars or pandas frame.

    Columns: stay_id; time, hours since the start of the stay; concept, a name of `raylab concepts`; value, a number or
    text such as `50%`; and, if there are, unit, in which the value was recorded, and subject_id. The events have EVENTS
    and UNIT, if the frame has units or text. Raises DataError for any other frame, and for a column that is not used: a
    misspelt `units` would otherwise be ignored.
    """
    events = as_polars(frame)
    wrong = [name for name in events.columns if name not in (*REQUIRED, *OPTIONAL)]
    missing = [name for name in REQUIRED if name not in events.columns]
    shape = f"the columns are {', '.join(REQUIRED)}, and optionally {' and '.join(OPTIONAL)}"
    if missing:
        raise DataError(f"the events have no column {', '.join(missing)}", shape, "rename the columns")
    if wrong:
        raise DataError(f"the events have columns that are not used: {', '.join(wrong)}", shape, "rename or drop them")
    for name, text in (("time", "hours since the start of the stay"), ("value", "numbers, or text such as 50%")):
        kind = events.schema[name]
        if not (kind.is_numeric() or kind == pl.Null or (name == "value" and kind == pl.String)):
            raise DataError(f"column {name} of the events has type {kind}", f"it takes {text}", "convert it")
    if events.schema["stay_id"].is_float() or events["stay_id"].null_count():
        raise DataError("the events have rows without a stay_id", do="give each row the id of its stay")
    hours = events["time"].cast(pl.Float64)
    if endless := int((~hours.is_finite()).sum()):
        raise DataError(
            f"{endless:,} of {events.height:,} events have a time that is not finite", do="correct the time"
        )
    if "subject_id" in events.columns:
        patients = events.group_by("stay_id").agg(pl.col("subject_id").n_unique())
        if two := patients.filter(pl.col("subject_id") > 1).height:
            raise DataError(f"{two:,} stays have events of several patients", do="give each stay an id of its own")
    dtype = events.schema["stay_id"]
    events = events.with_columns(
        pl.col("stay_id", "concept").cast(pl.String), subject_id=pl.col("stay_id").cast(pl.String), time=hours
    )
    if events.is_empty():
        raise DataError("the events have no rows", do="give them a row for each record")
    named = events["concept"].drop_nulls()
    unknown_concepts = dict(named.filter(~named.is_in(list(CONCEPTS))).value_counts().sort("concept").iter_rows())
    if named.len() == sum(unknown_concepts.values()):
        raise DataError(
            "the events have no concept that raylab knows",
            f"in column concept: {', '.join(list(unknown_concepts)[:5]) or 'nothing'}",
            "use the names that `raylab concepts` prints",
        )
    events = events.filter(pl.col("concept").is_in(list(CONCEPTS)) | pl.col("concept").is_null())
    if events.schema["value"] == pl.String:
        events = read_text_values(events)
    columns = [*EVENTS.names(), *([UNIT] if UNIT in events.columns else [])]
    return events.select(columns).with_columns(pl.col("value").cast(pl.Float64)), dtype, unknown_concepts


def as_polars(frame: Any) -> pl.DataFrame:
    """Return a polars or pandas frame as a polars frame; DataError for anything else."""
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if isinstance(frame, pl.DataFrame):
        return frame
    try:
        made = pl.from_pandas(frame)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:  # ValueError: pyarrow's, of mixed columns
        why = str(error).partition("\n")[0]
        do = "give a polars or pandas frame with one type in each column"
        raise DataError(f"events cannot be read from a {type(frame).__name__}", why, do) from error
    if not isinstance(made, pl.DataFrame):
        raise DataError(f"events cannot be read from a {type(frame).__name__}", do="give a polars or pandas frame")
    return made


def framing_of(spec: Mapping[str, Any]) -> Framing:
    """Return when a model with these inputs predicts."""
    usual = Framing()
    return Framing(
        int(spec["landmark_h"]),
        spec["horizon_h"] or usual.horizon,
        spec["gap_h"],
        spec["framing"],
        int(spec.get("until_h", usual.until)),  # models trained before it was recorded
    )


def rows_to_predict(stays: pl.DataFrame, screened: pl.DataFrame, framing: Framing) -> pl.DataFrame:
    """Return stay_id, at_h and last_h of each prediction of `stays`, and end, when its records end: at the landmark, or
    at every hour from there to the one in which they end."""
    last = with_text_ids(screened.group_by("stay_id").agg(end=pl.col("time").max()))
    rows = stays.join(last, "stay_id", "left", maintain_order="left")
    if framing.kind == "landmark":
        rows = rows.with_columns(at_h=pl.lit(float(framing.landmark)))
    else:
        until = pl.col("end").fill_null(0).ceil().clip(framing.landmark, framing.until).cast(pl.Int64)
        rows = rows.with_columns(at_h=pl.int_ranges(framing.landmark, until + 1)).explode("at_h")
        rows = rows.with_columns(pl.col("at_h").cast(pl.Float64))
    records = with_text_ids(screened.select("stay_id", last_h="time")).sort("last_h")
    rows = rows.with_row_index("number").sort("at_h").join_asof(
        records, left_on="at_h", right_on="last_h", by="stay_id", allow_exact_matches=False, check_sortedness=False,
        coalesce=False,
    )  # fmt: skip
    return rows.sort("number").select("stay_id", "at_h", "last_h", "end")


def with_risk(
    rows: pl.DataFrame, screened: pl.DataFrame, found: pl.DataFrame, rule: Label, cohort: str
) -> pl.DataFrame:
    """Return `rows` with age_known (years, null: unknown), is_met and is_open (whether the label's criteria are met by
    then; whether a ratio met them of which it is not known yet whether it persists) and is_outside (of the cohort)."""
    ages = with_text_ids(ages_of(screened).rename({"age": "age_known"}))
    rows = rows.join(ages, "stay_id", "left", maintain_order="left")
    never = pl.DataFrame(schema={"stay_id": pl.String, "onset_h": pl.Float64})
    onsets, first = never, never
    if rule.has_onset:
        onsets = with_text_ids(first_onset(found.lazy(), rule).collect())
        first = with_text_ids(first_onset(found.lazy(), replace(rule, persist_h=0.0)).collect())
    rows = rows.join(onsets, "stay_id", "left", maintain_order="left")
    rows = rows.join(first.rename({"onset_h": "first_h"}), "stay_id", "left", maintain_order="left")
    is_decided = pl.col("end") >= pl.col("first_h") + rule.persist_h + WITHIN if rule.persist_h else pl.lit(True)
    rows = rows.with_columns(
        is_met=(pl.col("onset_h") <= pl.col("at_h")).fill_null(False),
        is_open=((pl.col("first_h") <= pl.col("at_h")) & ~is_decided).fill_null(False),
        is_outside=pl.lit(False),
    )
    if cohort in FLAGS:
        coded = rows.select("stay_id", "at_h").with_columns(
            pl.col("stay_id").cast(screened.schema["stay_id"], strict=False)
        )
        flags = with_text_ids(cohorts.flags(coded, screened.lazy().select(EVENTS.names()), found.lazy(), rule))
        inside = flags.select("stay_id", "at_h", pl.col(cohort).alias("inside"))
        rows = rows.join(inside, ["stay_id", "at_h"], "left", maintain_order="left").with_columns(
            is_outside=~pl.col("inside").fill_null(False)
        )
    return rows


def find_measured(rows: pl.DataFrame, table: pl.DataFrame, spec: Mapping[str, Any]) -> pl.DataFrame:
    """Return, for each of `rows`, whether each input of the model has a usable value: a series in the hours before the
    prediction, measured there or carried into them, a static one at all. `vp_` inputs are made from these."""
    series, static = spec["features"], [name for name in spec["static"] if not name.startswith(VIRTUAL)]
    there = [name for name in series if name in table.columns]
    at = rows.select("stay_id", "at_h", *static)
    if there:
        window = at.join(table, "stay_id").filter(
            pl.col("hour") < pl.col("at_h"), pl.col("hour") >= pl.col("at_h") - spec["hours"]
        )
        known = window.sort("hour").group_by("stay_id", "at_h").agg(
            (pl.col(f"{name}__mask").any() | pl.col(f"{name}__since").last().is_not_null()).alias(name)
            for name in there
        )  # fmt: skip
        at = at.join(known, ["stay_id", "at_h"], "left", maintain_order="left")
    return at.select(
        *(pl.col(name).fill_null(False) if name in there else pl.lit(False).alias(name) for name in series),
        *(pl.col(name).is_not_null() for name in static),
    )


def reason(rule: Label, cohort: str, minimum: list[str]) -> pl.Expr:
    """Return why a row is not predicted; null if it is."""
    return (
        pl.when(pl.col("age_known") < rule.min_age)
        .then(pl.lit(f"younger than {rule.min_age:g} years, and the label '{rule.name}' is for older patients"))
        .when("is_met")
        .then(pl.lit(f"the criteria of the label '{rule.name}' are met already"))
        .when("is_open")
        .then(
            pl.lit(
                f"a ratio meets the criteria of the label '{rule.name}', and whether that persists is known only "
                f"{rule.persist_h + WITHIN:g} h later"
            )
        )
        .when("is_outside")
        .then(pl.lit(f"outside of the cohort '{cohort}', on which the model was trained"))
        .when(~pl.col("has_minimum"))
        .then(pl.lit(f"too little input: no usable value of {', '.join(minimum)} before the prediction"))
    )


def doubts(by_concept: pl.DataFrame, rule: Label) -> list[str]:
    """Return sentences about values that were used: too few for `implausible` to judge their unit, or concepts that the
    label reads and that are not there."""
    said = [
        f"{name}: {low:,} of {rows:,} values are {AS_LOW_AS_KPA[name]:g} {CONCEPTS[name].unit} or less, as values in "
        "kPa are; they were used"
        for name, rows, low in by_concept.select("concept", "rows", "like_kpa").sort("concept").iter_rows()
        if low and rows < FEW
    ]
    there = set(by_concept["concept"])
    if lacking := [name for name in rule.needs() if name not in there]:
        said.append(
            f"without {', '.join(lacking)} it cannot be checked whether a stay already meets the criteria of the label "
            f"'{rule.name}', for whom the model is not meant"
        )
    return said
