"""Preparation of the ARDS task: events of any source -> cohort, label, splits, hourly grid, statistics.

    SOURCES[source]      raw files -> events            (one file a source, raylab/data/sources/)
    screen               implausible values to null     -> counted in meta
    pf_ratios, first_onset                              -> the label (raylab/data/onset.py)
    attrition            all stays -> stays at risk     -> counted after every exclusion
    splits.assign        patients -> train, val, test
    hourly_cells, grid   events before the landmark -> hours.parquet
    statistics           mean and deviation of train rows

Every step is a pure function over polars frames. Features see only events before the landmark, by the filter in
`prepare_ards` and nowhere else.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import polars as pl

import raylab
from raylab.data import prepared, splits
from raylab.data.concepts import CONCEPTS, SERIES, STATIC, SUMMED, Extract
from raylab.data.onset import Ahrf, first_onset, pf_ratios
from raylab.data.sources import meds, physionet2012, synthetic_icu
from raylab.errors import DataError, UsageError, unknown

# source -> (path, patients, seed) -> Extract; only the synthetic one has no files and uses the last two
SOURCES: dict[str, Callable[[Path, int, int], Extract]] = {
    "physionet2012": lambda path, patients, seed: physionet2012.read(path),
    "meds": lambda path, patients, seed: meds.read(path),
    "synthetic": lambda path, patients, seed: synthetic_icu.read(patients, seed),
}
FRACTIONS = {"train": 0.65, "val": 0.15, "test": 0.20}
NEEDED = ("pao2", "fio2", "mech_vent")
COHORTS = ("all", "ventilated_pf")


def prepare_ards(
    source: str,
    path: Path | None,
    out: Path,
    landmark: float = 12,
    horizon: float = 24,
    patients: int = 400,
    seed: int = 0,
    rule: Ahrf | None = None,
) -> dict[str, Any]:
    """Publish samples.parquet, hours.parquet and meta.json at `out` and return the meta.

    A row is a stay at risk at `landmark` (whole hours since its start); its label says whether `ahrf` begins in
    (landmark, landmark + horizon]. `path` is the raw data, not needed for source "synthetic"; `patients` is for that
    one alone; `seed` decides the splits and the virtual patients.
    """
    rule = rule or Ahrf()
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    if landmark < 1 or landmark != int(landmark) or horizon <= 0:
        raise UsageError(
            f"landmark {landmark:g} h and horizon {horizon:g} h cannot be used",
            "the grid is hourly: the landmark is a whole number of hours from 1, the horizon is above 0",
            "for example --landmark 12 --horizon 24",
        )
    if path is None and source != "synthetic":
        raise UsageError(f"source '{source}' needs the directory of its raw data", do="give --path")
    hours = int(landmark)

    def write(work: Path) -> dict[str, Any]:
        events = work / "events.parquet"  # so that the raw data is read once, however large it is
        try:
            extract = SOURCES[source](Path(path or "."), patients, seed)
            extract.events.sink_parquet(events)
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{path} could not be read as '{source}'",
                str(error).splitlines()[0],
                "check or copy the raw data again",
            ) from error
        present, unique = screen(pl.scan_parquet(events))
        measured = unique.drop_nulls("value")
        ratios = pf_ratios(measured, rule)
        before = measured.filter(pl.col("time") < landmark)
        counts, by_concept, onsets, last, cohort, cells, static = pl.collect_all(
            [
                present.select(
                    rows=pl.len(), negative_time=(pl.col("time") < 0).sum(), no_value=pl.col("value").is_null().sum()
                ),
                unique.group_by("concept").agg(rows=pl.len(), out_of_range=pl.col("value").is_null().sum()),
                first_onset(ratios, rule),
                unique.group_by("stay_id").agg(last=pl.col("time").max()),
                ventilated_with_pf(measured, ratios, landmark, rule),
                hourly_cells(before),
                first_values(before),
            ]
        )
        events.unlink()
        check_needed(by_concept, source)
        stays = extract.stays.join(onsets, "stay_id", "left").join(last, "stay_id", "left")
        at_risk, steps = attrition(stays, landmark)
        samples = at_risk.with_columns(
            label=(pl.col("onset_h") <= landmark + horizon).fill_null(False).cast(pl.Int8),
            ventilated_pf=pl.col("stay_id").is_in(cohort["stay_id"].to_list()),
        ).sort("stay_id")
        samples = samples.with_columns(
            split=pl.Series(
                splits.assign(samples["subject_id"].to_list(), samples["label"].to_list(), FRACTIONS, seed),
                dtype=pl.String,
            )
        )
        check_classes(samples, landmark, horizon)
        samples = (
            samples.join(static, "stay_id", "left")
            .with_row_index("row")
            .select(
                pl.col("row").cast(pl.Int64),
                "stay_id",
                "subject_id",
                "split",
                "label",
                "onset_h",
                "ventilated_pf",
                *(name for name in STATIC if static[name].count()),
                "source",
                "died",
            )
        )
        table = grid(cells, samples["stay_id"], hours)
        train = samples.filter(pl.col("split") == "train")
        stats = statistics(table.filter(pl.col("stay_id").is_in(train["stay_id"].to_list())), SERIES) | statistics(
            train, STATIC
        )
        died = samples["died"]
        samples.drop("died").write_parquet(work / "samples.parquet")
        table.write_parquet(work / "hours.parquet")
        rows = counts.row(0, named=True)
        return {
            "task": "ards",
            "source": source,
            "synthetic": source == "synthetic",
            "raylab": raylab.__version__,
            "label": rule.describe(landmark, horizon),
            "landmark_h": landmark,
            "horizon_h": horizon,
            "features": [name for name in SERIES if name in stats],
            "static": [name for name in STATIC if name in stats],
            "unmeasured": [name for name in (*SERIES, *STATIC) if name not in stats],
            "statistics": stats,
            "attrition": steps,
            "counts": split_counts(samples),
            "cohorts": cohort_counts(samples),
            "outcomes": {"known": len(died) - died.null_count(), "in_hospital_death": int(died.sum() or 0)},
            "out_of_range": {
                name: n for name, n in by_concept.sort("concept").select("concept", "out_of_range").iter_rows() if n
            },
            "dropped": {
                "negative time": rows["negative_time"],
                "exact duplicate": rows["rows"] - rows["negative_time"] - int(by_concept["rows"].sum()),
                **extract.counts,
            },
            "split_hash": prepared.split_hash(list(samples.select("subject_id", "split").iter_rows())),
            "seed": seed,
        }

    return prepared.publish(Path(out), write)


def screen(events: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
    """(all rows with a known concept, time and value; the same without negative times and exact duplicates, in which
    implausible values are null).

    FiO2 above 20 is a percentage and divided by 100. What then lies outside the range of its concept is null: among
    FiO2 that removes 1 to 20, which are litres a minute. A null still counts as a record of the stay.
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
        .with_columns(value=pl.when(pl.col("value").is_between("low", "high")).then("value"))
        .drop("low", "high")
    )
    return present, unique


def ventilated_with_pf(events: pl.LazyFrame, ratios: pl.LazyFrame, landmark: float, rule: Ahrf) -> pl.LazyFrame:
    """stay_id of the harder cohort: ventilated at the landmark (the latest record, at most `vent_back_h` back, says so)
    and with at least one P/F at or before it."""
    ventilation = events.filter((pl.col("concept") == "mech_vent") & (pl.col("time") <= landmark))
    now = (
        ventilation.sort("time", "value")
        .group_by("stay_id", maintain_order=True)
        .agg(pl.col("time").last(), pl.col("value").last())
        .filter((pl.col("value") == 1) & (pl.col("time") >= landmark - rule.vent_back_h))
    )
    gas = ratios.filter(pl.col("time") <= landmark).select("stay_id").unique()
    return now.select("stay_id").join(gas, "stay_id")


def attrition(stays: pl.DataFrame, landmark: float) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """The stays at risk, and how many patients and stays were left after each exclusion.

    `stays` has onset_h (null = none) and last (time of the last record, null = no record at all).
    """
    steps: list[dict[str, Any]] = []

    def note(step: str) -> None:
        steps.append({"step": step, "patients": stays["subject_id"].n_unique(), "stays": stays.height})
        if stays.is_empty():
            raise DataError(
                f"the cohort is empty after '{step}'",
                "; ".join(f"{done['step']}: {done['stays']} stays" for done in steps),
                "check that the raw data is complete, or choose another --landmark",
            )

    note("all stays")
    stays = stays.filter(pl.col("last").is_not_null())
    note("at least one record")
    stays = stays.filter(pl.col("last") > landmark)
    note(f"at least one record beyond {landmark:g} h")
    stays = stays.filter(pl.col("onset_h").is_null() | (pl.col("onset_h") > landmark))
    note(f"no onset at or before {landmark:g} h")
    return stays, steps


def check_needed(by_concept: pl.DataFrame, source: str) -> None:
    """The label needs at least one plausible value of each of NEEDED."""
    usable = {name: rows - bad for name, rows, bad in by_concept.select("concept", "rows", "out_of_range").iter_rows()}
    missing = [name for name in NEEDED if not usable.get(name)]
    if missing:
        raise DataError(
            f"the label 'ahrf' cannot be made: no plausible value of {', '.join(missing)}",
            f"{sum(usable.values())} events of {len(usable)} concepts were read from source '{source}'",
            "check that the raw data holds blood gases, FiO2 and ventilation",
        )


def check_classes(samples: pl.DataFrame, landmark: float, horizon: float) -> None:
    train = samples.filter(pl.col("split") == "train")
    positive = int(train["label"].sum() or 0)
    if positive in (0, train.height):
        raise DataError(
            f"the train split holds one class only: {positive} of {train.height} stays with onset",
            f"onset after {landmark:g} h and at most {landmark + horizon:g} h; {samples['label'].sum()} of "
            f"{samples.height} in all splits",
            "use more data, or another --landmark or --horizon",
        )


def hourly_cells(events: pl.LazyFrame) -> pl.LazyFrame:
    """One row for every stay, hour and series concept measured in it: value (the last; urine: the sum) and time.

    Of several values at the last time the largest counts: the order of the rows must not matter.
    """
    ordered = events.filter(pl.col("concept").is_in(SERIES)).sort("time", "value")
    value = pl.when(pl.col("concept").first().is_in(SUMMED)).then(pl.col("value").sum())
    return ordered.group_by(
        "stay_id", "concept", pl.col("time").floor().cast(pl.Int32).alias("hour"), maintain_order=True
    ).agg(value=value.otherwise(pl.col("value").last()), time=pl.col("time").last())


def grid(cells: pl.DataFrame, stay_ids: pl.Series, hours: int) -> pl.DataFrame:
    """stay_id, hour, and for each concept measured in any of these stays: `<name>`, `<name>__mask`, `<name>__since`.

    Exactly `hours` rows a stay, hour h = [h, h + 1), in the order of `stay_ids`. `<name>` is null where not measured;
    `__since` is hours from the last measurement to the end of hour h, null before the first one.
    """
    cells = cells.filter(pl.col("stay_id").is_in(stay_ids.to_list()))
    found = set(cells["concept"].unique())
    names = [name for name in SERIES if name in found]
    table = pl.DataFrame({"stay_id": stay_ids}).join(
        pl.DataFrame({"hour": pl.int_range(hours, dtype=pl.Int32, eager=True)}), how="cross"
    )
    for column, suffix in (("value", ""), ("time", "__time")):
        wide = cells.pivot("concept", index=["stay_id", "hour"], values=column)
        wide = wide.select("stay_id", "hour", *(pl.col(name).alias(name + suffix) for name in names))
        table = table.join(wide, ["stay_id", "hour"], "left", maintain_order="left")

    def columns(name: str) -> tuple[pl.Expr, pl.Expr, pl.Expr]:
        last_time = pl.col(f"{name}__time").forward_fill().over("stay_id")
        return (
            pl.col(name).cast(pl.Float32),
            pl.col(name).is_not_null().alias(f"{name}__mask"),
            (pl.col("hour") + 1 - last_time).cast(pl.Float32).alias(f"{name}__since"),
        )

    return table.select("stay_id", "hour", *(column for name in names for column in columns(name)))


def first_values(events: pl.LazyFrame) -> pl.LazyFrame:
    """stay_id and one column for each static concept: its first value."""
    first = events.filter(pl.col("concept").is_in(STATIC)).sort("time", "value")
    return first.group_by("stay_id").agg(
        pl.col("value").filter(pl.col("concept") == name).first().cast(pl.Float32).alias(name) for name in STATIC
    )


def statistics(rows: pl.DataFrame, names: Iterable[str]) -> dict[str, dict[str, float]]:
    """mean, std (population) and n of the measured values; a name never measured in `rows` is left out."""
    result: dict[str, dict[str, float]] = {}
    for name in names:
        values = rows[name].drop_nulls().cast(pl.Float64) if name in rows.columns else pl.Series([], dtype=pl.Float64)
        mean, std = values.mean(), values.std(ddof=0)
        if isinstance(mean, float) and isinstance(std, float):
            result[name] = {"mean": mean, "std": std, "n": len(values)}
    return result


def split_counts(samples: pl.DataFrame) -> dict[str, dict[str, int]]:
    result = {}
    for split in FRACTIONS:
        rows = samples.filter(pl.col("split") == split)
        result[split] = {
            "n": rows.height,
            "positive": int(rows["label"].sum() or 0),
            "patients": rows["subject_id"].n_unique(),
        }
    return result


def cohort_counts(samples: pl.DataFrame) -> dict[str, dict[str, int]]:
    subset = samples.filter(pl.col("ventilated_pf"))
    return {
        name: {"n": rows.height, "positive": int(rows["label"].sum() or 0)}
        for name, rows in zip(COHORTS, (samples, subset), strict=True)
    }
