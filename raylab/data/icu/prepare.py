"""Preparation of intensive-care data: events of any source -> cohort, label, splits, hourly grid, statistics.

    SOURCES[source]      raw files -> events, by patient   (one file a source, raylab/data/icu/sources/)
    summarise_patients   one piece of the patients:
      screen             units; what cannot be used to null -> counted in meta
      derived            P/F, S/F, driving pressure, compliance
      ratios, first_onset                                  -> the label (raylab/data/icu/labels.py)
      attrition, rows    all stays -> rows at risk         -> counted after every exclusion (raylab/data/icu/cohorts.py)
      hourly_cells, grid events before the prediction -> hours.parquet (raylab/data/icu/timegrid.py)
    splits.assign        patients -> train, val, test
    statistics           mean and deviation of train rows

Every step is a pure function over polars frames. Memory holds one piece of the patients at a time, and of all
patients the rows and the hourly grid. Features see only events before the prediction, by the filter in
`summarise_patients` and the window that the loader cuts.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import raylab
from raylab.data import prepared, splits
from raylab.data.icu import cohorts
from raylab.data.icu.cohorts import COHORTS
from raylab.data.icu.concepts import CONCEPTS, SERIES, STATIC, SourceData, whole_stays
from raylab.data.icu.labels import Framing, Label, label
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.patient_batch import (
    PatientBatch,
    Totals,
    check_needed,
    check_units,
    implausible,
    summarise_patients,
    unrecorded,
)
from raylab.data.icu.sources import events, meds, mimic3, mimic4, physionet2012, yaib
from raylab.data.icu.timegrid import joined, statistics
from raylab.data.identifiers import not_among
from raylab.errors import DataError, UsageError, unknown


@dataclass(frozen=True)
class Raw:
    """What a source may ask for: `path` of the raw data, `work`, a directory for files on the way, `mapping` of MEDS
    codes; `patients` and `seed` are for the synthetic one, which has no files."""

    path: Path
    work: Path
    patients: int = 400
    seed: int = 0
    mapping: Path | None = None


def synthetic(raw: Raw) -> SourceData:
    """The source that is a model: it alone loads torch, which is most of the time that a small table takes."""
    from raylab.data.icu.sources import synthetic

    return synthetic.read(raw.patients, raw.seed)


SOURCES: dict[str, Callable[[Raw], SourceData]] = {
    "events": lambda raw: events.read(raw.path, raw.work),
    "physionet2012": lambda raw: physionet2012.read(raw.path),
    "meds": lambda raw: meds.read(raw.path, raw.work, raw.mapping),
    "mimic3": lambda raw: mimic3.read(raw.path, raw.work),
    "mimic4": lambda raw: mimic4.read(raw.path, raw.work),
    "yaib": lambda raw: yaib.read(raw.path),
    "synthetic": synthetic,
}
VIRTUAL = "vp_"  # how the columns of raylab/data/icu/virtual_patient.py begin
FRACTIONS = {"train": 0.65, "val": 0.15, "test": 0.20}


def prepare_icu(
    task: str,
    source: str,
    path: Path | None,
    out: Path,
    landmark: float = 12,
    horizon: float = 24,
    patients: int = 400,
    seed: int = 0,
    rule: Label | None = None,
    gap: float = 0,
    framing: str = "landmark",
    until: float = 48,
    mapping: Path | None = None,
    grid_of_windows: bool = False,
    virtual: bool = False,
    replace: bool = False,
    plugins: Mapping[str, str] | None = None,
) -> IcuMeta:
    """Publish samples.parquet, hours.parquet and meta.json of `task` at `out` and return the meta.

    A row is a stay at risk at `landmark` (whole hours since its start), or with framing "rolling" at every hour from
    there until onset, the last record or `until`; its label says whether onset by `rule` (`ahrf` unless given) falls
    into (prediction + gap, prediction + gap + horizon]. `path` is the raw data, not needed for source "synthetic";
    `patients` is for that one alone; `seed` decides the splits and the virtual patients. With `grid_of_windows` the
    meta has the onset counts over windows of FiO2 and persistence. With `virtual` the rows have features of the lung
    model fitted to the stay's gases before the landmark (virtual_patient.py). `plugins`: for the meta, the own code
    that defines the source or the label.
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    chosen = checked(landmark, horizon, gap, framing, until)
    asked = rule or label("ahrf")
    if not asked.has_onset and (framing != "landmark" or gap or grid_of_windows):
        raise UsageError(f"the label '{asked.name}' is predicted once, at the landmark", do="--landmark alone")
    if path is None and source != "synthetic":
        raise UsageError(f"source '{source}' needs the directory of its raw data", do="give --path")
    if mapping is not None and source != "meds":
        raise UsageError(f"source '{source}' takes no mapping of codes", do="leave --mapping out, or use --source meds")

    def write(work: Path) -> IcuMeta:
        raw = work / "raw"
        raw.mkdir()
        try:
            source_data = SOURCES[source](Raw(Path(path or "."), raw, patients, seed, mapping))
            if not isinstance(source_data, SourceData):  # that of a plugin
                why = f"its function returned {type(source_data).__name__} instead of SourceData"
                raise UsageError(f"the source '{source}' cannot be used", why, "see docs/extend.md")
            stays = whole_stays(source_data.stays)
            notes = list(source_data.notes)
            used = asked
            if "mech_vent" in source_data.lacks and asked.ventilation:
                notes.append("ventilation is not recorded here, so the label does not ask for it")
                used = asked.without_ventilation()

            def summarise(left_out: Collection[str]) -> list[PatientBatch]:
                parts = source_data.parts()
                return [summarise_patients(part, stays, chosen, used, grid_of_windows, left_out) for part in parts]

            pieces = summarise(())
            totals = Totals.of(pieces)
            check_units(totals, used)
            unfit = implausible(totals.by_concept, used)
            if unfit:
                pieces = summarise(unfit)  # again, as only the values of all patients show a wrong unit
        except (pl.exceptions.PolarsError, FileNotFoundError) as error:
            raise DataError(
                f"{path} could not be read as '{source}'",
                str(error).splitlines()[0],
                "check or copy the raw data again",
            ) from error
        for file in raw.iterdir():
            file.unlink()
        raw.rmdir()
        seen = {stay for piece in pieces for stay in piece.seen}
        unlisted = pl.concat([piece.unlisted for piece in pieces])
        with_events = pl.concat([unlisted, pl.Series(sorted(seen), dtype=pl.String)])
        not_among(with_events, stays["stay_id"], "the events", "the stays")
        if len(unlisted):
            notes.append(f"stays with events that the source does not list, left out: {len(unlisted):,}")
        silent = stays.filter(~pl.col("stay_id").is_in(list(seen)))
        pieces.append(unrecorded(silent, chosen, used))
        of_unknown_age = sum(piece.of_unknown_age for piece in pieces)
        if of_unknown_age and used.min_age:
            notes.append(f"stays of unknown age, counted as {used.min_age:g} years and older: {of_unknown_age:,}")
        totals = Totals.of(pieces)
        check_needed(totals.by_concept, source, used)
        steps = cohorts.summed([piece.steps for piece in pieces])
        samples = pl.concat([piece.rows for piece in pieces if piece.rows.height], how="diagonal_relaxed")
        samples = samples.sort("stay_id", "at_h")
        samples = samples.with_columns(
            split=pl.Series(
                splits.assign(samples["subject_id"].to_list(), samples["label"].to_list(), FRACTIONS, seed),
                dtype=pl.String,
            )
        )
        check_classes(samples, chosen)
        samples = samples.with_columns(clock_h=(pl.col("clock_h") + pl.col("at_h")) % 24)
        samples = samples.with_columns(matched=cohorts.matched(samples)).with_row_index("row")
        outcomes = stays.join(samples.select("stay_id").unique(), "stay_id", "semi")["died"]
        columns = [*(name for name in STATIC if name in samples.columns and samples[name].count()), "source", "period"]
        samples = samples.select(
            pl.col("row").cast(pl.Int64),
            "stay_id",
            "subject_id",
            "split",
            "label",
            "at_h",
            "onset_h",
            *COHORTS[1:],
            *columns,
            "clock_h",
            "outcome",
        )
        names = [name for name in SERIES if name in totals.found]
        table = joined([piece.table for piece in pieces if piece.table.height], names).sort("stay_id", "hour")
        if virtual:
            from raylab.data.icu.virtual_patient import virtual_patients  # as `synthetic`: it loads torch

            samples = virtual_patients(samples, table, chosen.landmark)
        train = samples.filter(pl.col("split") == "train")
        stats = train_statistics(train, table)
        samples.write_parquet(work / "samples.parquet")
        table.write_parquet(work / "hours.parquet")
        return IcuMeta(
            task=task,
            source=source,
            numbering=[f"synthetic seed {seed}" if source == "synthetic" else source_data.numbering or source],
            synthetic=source == "synthetic" or source_data.synthetic,
            raylab=raylab.__version__,
            **({"plugins": dict(plugins)} if plugins else {}),
            label=used.describe(chosen.landmark, chosen.horizon, chosen.gap),
            framing=chosen.kind,
            landmark_h=chosen.landmark,
            horizon_h=chosen.horizon if asked.has_onset else None,
            gap_h=chosen.gap,
            until_h=chosen.until if chosen.kind == "rolling" else None,
            notes=notes,
            warnings=[*source_data.warnings, *(f"{name} is left out: {why}" for name, why in unfit.items())],
            **described(samples, stats),
            classes=list(asked.classes),
            attrition=steps,
            **({"onsets": totals.onsets} if asked.has_onset else {}),
            **({"sensitivity": totals.sensitivity} if grid_of_windows else {}),
            outcomes={"known": len(outcomes) - outcomes.null_count(), "in_hospital_death": int(outcomes.sum() or 0)},
            **totals.by_problem(),
            **totals.units(),
            left_out=list(unfit),
            coverage={name: int(totals.covered.get(name, 0)) for name in CONCEPTS},
            stays=stays.height,
            dropped={**totals.dropped(), **source_data.counts},
            split_hash=prepared.split_hash(list(samples.select("subject_id", "split").iter_rows())),
            seed=seed,
        )

    return prepared.publish(Path(out), write, task, replace, [] if path is None else [Path(path)])


def checked(landmark: float, horizon: float, gap: float, framing: str, until: float) -> Framing:
    """The framing, or UsageError for one that cannot be used."""
    if framing not in ("landmark", "rolling"):
        raise unknown("framing", framing, ("landmark", "rolling"))
    is_whole = landmark == int(landmark) and until == int(until)
    if landmark < 1 or not is_whole or horizon <= 0 or gap < 0 or (framing == "rolling" and until <= landmark):
        raise UsageError(
            f"landmark {landmark:g} h, horizon {horizon:g} h, gap {gap:g} h, until {until:g} h cannot be used",
            "the grid is hourly: the landmark is a whole number of hours from 1, the horizon is above 0, the gap from "
            "0, and a rolling prediction ends after its landmark",
            "for example --landmark 12 --horizon 24",
        )
    return Framing(int(landmark), horizon, gap, framing, int(until))


def described(samples: pl.DataFrame, stats: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What meta.json says that depends on the split: features, statistics, and counts by split and cohort."""
    return {
        "features": [name for name in SERIES if name in stats],
        "static": [name for name in STATIC if name in stats],
        "virtual_patient": [name for name in stats if name.startswith(VIRTUAL)],
        "unmeasured": [name for name in (*SERIES, *STATIC) if name not in stats],
        "statistics": stats,
        "counts": split_counts(samples),
        "cohorts": cohort_counts(samples),
        "cohort_attrition": cohorts.cohort_attrition(samples),
        "ends": dict(sorted(samples.group_by("outcome").len().iter_rows())),
    }


def train_statistics(train: pl.DataFrame, table: pl.DataFrame) -> dict[str, dict[str, float]]:
    """Mean and deviation of every feature over the stays of the train rows, before each stay's last prediction."""
    last = train.sort("at_h", maintain_order=True).unique("stay_id", keep="last", maintain_order=True)
    until = train.group_by("stay_id").agg(until=pl.col("at_h").max())
    seen = table.join(until, "stay_id").filter(pl.col("hour") < pl.col("until"))
    virtual = [name for name in train.columns if name.startswith(VIRTUAL)]
    return statistics(seen, SERIES) | statistics(last, (*STATIC, *virtual))


def check_classes(samples: pl.DataFrame, framing: Framing) -> None:
    train = samples.filter(pl.col("split") == "train")
    positive = int(train["label"].sum() or 0)
    if positive in (0, train.height):
        raise DataError(
            f"the train split holds one class only: {positive} of {train.height} rows are positive",
            f"landmark {framing.landmark:g} h, gap {framing.gap:g} h, horizon {framing.horizon:g} h; in all splits "
            f"{samples['label'].sum()} of {samples.height}",
            "use more data, or another --landmark or --horizon",
        )


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
    parts = {name: samples if name == "all" else samples.filter(pl.col(name)) for name in COHORTS}
    return {name: {"n": rows.height, "positive": int(rows["label"].sum() or 0)} for name, rows in parts.items()}
