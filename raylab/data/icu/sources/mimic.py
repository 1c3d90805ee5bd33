"""What the raw tables of MIMIC-III and MIMIC-IV share; mimic3.py and mimic4.py say what is a release's own.

A row is an ICU stay. Charted rows belong to the stay that they name, laboratory rows to the stay at their time; rows
that name a stay that the patient does not have are excluded and counted. Times are chart times. Laboratory gases are
used only if a specimen row says that they are arterial. Large tables are read in portions, and the rows that are
selected are written by patient.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import (
    CONCEPT,
    EVENTS,
    UNIT,
    SourceData,
    by_id,
    read_quantities,
    stated_units,
    whole_stays,
    with_coded_ids,
)
from raylab.data.icu.demographics import age, count_unread, sex
from raylab.data.icu.sources.episodes import chart_episodes
from raylab.data.icu.sources.schema import DATE, INTEGER, NUMBER, TEXT, Column, Schema
from raylab.data.icu.sources.tables import (
    Conversions,
    Findings,
    Pieces,
    find,
    find_required,
    in_batches,
    piece_count,
    read_table,
    rows_of,
)
from raylab.data.identifiers import identifier, is_missing
from raylab.errors import DataError

COMA_SCALE = (220739, 223900, 223901)  # MetaVision's eye, verbal, motor: a score is their sum at one time
GASES = (50821, 50818, 50820, 50817, 50802)
VENTILATION = {225792: "mech_vent", 225794: "niv"}

ID = Column(pl.String(), nullable=False, identifier="number")
"""By MIMIC's documentation, identifiers are whole numbers."""
OPTIONAL_ID = replace(ID, nullable=True)
ITEM, TIME = replace(INTEGER, nullable=False), replace(DATE, nullable=False)

ADMISSIONS = {"hadm_id": ID, "deathtime": DATE, "hospital_expire_flag": replace(INTEGER, is_in=(0, 1))}
MEASUREMENTS = {
    "subject_id": ID,
    "itemid": ITEM,
    "charttime": TIME,
    "value": TEXT,
    "valuenum": NUMBER,
    "valueuom": TEXT,
}


@dataclass(frozen=True)
class Release:
    """What a release of MIMIC has of its own.

    ids         its columns in concepts.toml
    stay        the name of the column of stays
    folders     table -> the folder below the path that may hold it
    stays, patients, charts, labs, procedures   the schemas of ICUSTAYS, PATIENTS, CHARTEVENTS, LABEVENTS, `episodes`
    episodes    the name of the table of procedures
    outputs     the schema of OUTPUTEVENTS, which may be missing; None if urine is not read
    born        PATIENTS -> PATIENTS with `dob`, the date of birth
    of_birth    the columns that `born` reads, for a note; empty if it reads none
    period      (the column that decides the period, stays with the columns of PATIENTS -> the period)
    units       first_careunit -> icu_type of PhysioNet 2012
    specimen    the item whose text is the type of specimen, and the columns that a gas and its specimen share
    rule        rows -> ventilation, from the items `rule_items`, of which `rule_texts` are text
    """

    name: str
    source: str
    numbering: str
    ids: tuple[str, ...]
    stay: str
    stays: Schema
    patients: Schema
    charts: Schema
    labs: Schema
    episodes: str
    procedures: Schema
    born: Callable[[pl.DataFrame], pl.DataFrame]
    period: tuple[str, pl.Expr]
    units: Mapping[str, float]
    specimen: tuple[int, tuple[str, ...]]
    of_birth: str = ""
    outputs: Schema | None = None
    folders: Mapping[str, str] = field(default_factory=dict)
    rule: Callable[[pl.LazyFrame], pl.LazyFrame] | None = None
    rule_items: tuple[int, ...] = ()
    rule_texts: tuple[int, ...] = ()

    def what(self) -> str:
        return f"the tables of {self.name}"

    def folder(self, path: Path, table: str) -> Path:
        """Return the directory that has `table`: the release's folder if it is there, otherwise `path` itself."""
        inside = path / self.folders.get(table, "")
        return inside if inside.is_dir() else path


def rows_schema(stays: pl.DataFrame, release: Release) -> pl.Schema:
    """Return the columns of the selected rows; patients and stays are of the types of `stays`."""
    return pl.Schema(
        {
            "subject_id": stays.schema["subject_id"],
            "stay_id": stays.schema["stay_id"],
            "at": pl.Datetime("us"),
            "item": pl.Int64(),
            "concept": CONCEPT,
            "value": pl.Float64(),
            "text": pl.String(),
            UNIT: pl.String(),
            **({"specimen_id": pl.String()} if "specimen_id" in release.labs else {}),
        }
    )


def read(path: Path, work: Path, release: Release) -> SourceData:
    if not path.is_dir():
        raise DataError(f"no directory at {path}", do=f"give --path the directory with {release.what()}")
    conversions, counts = Conversions(), Counter[str]()
    stays = with_coded_ids(find_stays(path, release, conversions, counts))
    tables: dict[str, Schema | None] = {
        "CHARTEVENTS": release.charts,
        "LABEVENTS": release.labs,
        "OUTPUTEVENTS": release.outputs,
    }
    files = {
        name: find_required(release.folder(path, name), name, release.what()) for name in ("CHARTEVENTS", "LABEVENTS")
    }
    if release.outputs is not None:
        outputs = find(release.folder(path, "OUTPUTEVENTS"), "OUTPUTEVENTS")
        if outputs is None:
            conversions.notes.append("there is no table OUTPUTEVENTS, so urine is missing")
        else:
            files["OUTPUTEVENTS"] = outputs
    pieces = piece_count(*files.values())
    known = {int(item) for source in release.ids for item in by_id(source)}
    more = {"CHARTEVENTS": {*COMA_SCALE, *release.rule_items}, "LABEVENTS": {release.specimen[0]}}
    charts, labs, *others = (
        select_rows(file, tables[name] or {}, known | more.get(name, set()), Pieces(work, name.lower(), pieces), stays,
                    release, conversions, counts)
        for name, file in files.items()
    )  # fmt: skip
    charts = [pl.concat([chart, *(other[k] for other in others)]) for k, chart in enumerate(charts)]
    episodes = procedures(path, stays, release, conversions, counts)
    parts = tuple(
        events_of(chart, lab, episodes.lazy(), stays.lazy(), release) for chart, lab in zip(charts, labs, strict=True)
    )
    first = descriptors(stays)
    together = pl.concat([parts[0], first.lazy()], how="diagonal")
    parts = (together,) if len(parts) == 1 else _spread(parts, first)
    notes = (*NOTES, *conversions.close())
    warnings = tuple(conversions.warnings)
    return SourceData(
        pl.concat(parts), whole_stays(stays), dict(+counts), parts, notes, warnings, numbering=release.numbering
    )


NOTES = ("times are chart times: a laboratory value may have been known later than its time",)


def _spread(parts: tuple[pl.LazyFrame, ...], first: pl.DataFrame) -> tuple[pl.LazyFrame, ...]:
    """Add the descriptors of every stay to its patient's batch."""
    part = pl.col("subject_id").cast(pl.String).hash(seed=0) % len(parts)
    return tuple(pl.concat([piece, first.lazy().filter(part == k)], how="diagonal") for k, piece in enumerate(parts))


def find_stays(path: Path, release: Release, conversions: Conversions, counts: Counter[str]) -> pl.DataFrame:
    """Return one row per stay: STAYS, start and end (dates), death (date), age, sex, icu_type. Stays that were
    truncated because they overlap, and values missing in PATIENTS and ADMISSIONS, are counted."""

    def table_of(name: str, schema: Schema) -> pl.DataFrame:
        return read_table(release.folder(path, name), name, schema, release.what(), conversions)

    table = table_of("ICUSTAYS", release.stays).drop_nulls("intime").sort("subject_id", "intime")
    if table.is_empty():
        raise DataError(f"{path}: ICUSTAYS has no rows", do="copy it again")
    if n := int(table[release.stay].is_duplicated().sum()):
        raise DataError(f"{path}: {n} rows of ICUSTAYS share their {release.stay}", do="keep one row per stay")
    patients = release.born(table_of("PATIENTS", release.patients))
    admissions = table_of("ADMISSIONS", ADMISSIONS)
    for name, other, lost in (("PATIENTS", patients, "age and sex"), ("ADMISSIONS", admissions, "outcome")):
        key = other.columns[0]
        conversions.match(table[key], other[key], "ICUSTAYS", name)
        conversions.note("stays without a row in {} (no {})", table.join(other, key, "anti").height, name, lost)
    patients = patients.unique("subject_id", keep="first", maintain_order=True)
    admissions = admissions.unique("hadm_id", keep="first", maintain_order=True)
    following = pl.col("intime").shift(-1).over("subject_id")
    overlap = pl.col("outtime") > following
    table = table.join(patients, "subject_id", "left").join(admissions, "hadm_id", "left")
    counts["stays cut where they overlap"] = int(table.select(overlap.sum()).item() or 0)
    table = table.with_columns(end=pl.min_horizontal("outtime", following), sex=sex("gender"))
    conversions.note("stays with an unreadable sex, set missing", count_unread(table, "gender", "sex"))
    conversions.note("stays that end before they start", table.filter(pl.col("outtime") < pl.col("intime")).height)
    late = table.filter(pl.col("deathtime") < pl.col("intime")).height
    conversions.note("stays that start after the patient's death", late)
    hours = (pl.col("end") - pl.col("intime")).dt.total_seconds() / 3600
    table = table.with_columns(age=(pl.col("intime") - pl.col("dob")).dt.total_seconds() / (24 * 365.25 * 3600))
    if release.of_birth:
        born = table.join(patients, "subject_id", "semi").filter(pl.col("dob").is_null()).height
        what = "stays without a year of birth from {} (no age)"
        conversions.note(what, born, release.of_birth)
    of_period, period = release.period
    table = table.with_columns(
        period=period, icu_type=pl.col("first_careunit").replace_strict(release.units, default=None)
    )
    for column, read in ((of_period, "period"), ("first_careunit", "icu_type")):
        conversions.note("stays with an unknown {} (no {})", count_unread(table, column, read), column, read)
    dead = pl.col("deathtime") <= pl.col("end")
    return table.select(
        subject_id="subject_id",
        stay_id=release.stay,
        source=pl.lit(release.source),
        died=pl.col("hospital_expire_flag") == 1,
        end_h=hours,
        end=pl.when(dead).then(pl.lit("death")).when(pl.col("end").is_not_null()).then(pl.lit("discharge")),
        period="period",
        clock_h=pl.col("intime").dt.hour() + pl.col("intime").dt.minute() / 60,
        start="intime",
        stop="end",
        death=pl.col("deathtime").min().over("subject_id"),
        age=age("age", pl.Float64()).round(2),  # one decimal would turn 17.95 into an adult
        sex="sex",
        icu_type="icu_type",
    )


def select_rows(
    file: Path,
    schema: Schema,
    items: set[int],
    out: Pieces,
    stays: pl.DataFrame,
    release: Release,
    conversions: Conversions,
    counts: Counter[str],
) -> list[pl.LazyFrame]:
    """Return the rows of `items` for the patients of `stays`, with their units, written by patient. Only one portion of
    the table, and the selected rows of some portions, are in memory at a time."""
    findings, table = Findings(file, conversions), file.name.partition(".")[0].upper()
    from_text, after_death = 0, 0
    named: list[pl.DataFrame] = []
    kinds = rows_schema(stays, release)
    keys = {"subject_id": "subject_id", release.stay: "stay_id"}  # here -> in `stays`
    deaths = stays.select("subject_id", "death").drop_nulls().unique("subject_id")
    for rows in in_batches(of_items(findings, schema, table, [str(item) for item in sorted(items)])):
        rows = findings.check(rows.drop("place"), schema, rows["place"])
        if "error" in rows.columns:
            wrong = (pl.col("error") == 1).fill_null(False)
            counts["marked as an error"] += int(rows.select(wrong.sum()).item())
            rows = rows.filter(~wrong)
        named.append(rows.select(key for key in keys if key in rows.columns).unique())
        rows = of_stays(rows, stays, release.stay, table, counts).with_columns(pl.col("valuenum").fill_nan(None))
        nothing = pl.col("valuenum").is_null() & (pl.col("value").fill_null("").str.strip_chars() == "")
        counts["without a value"] += int(rows.select(nothing.sum()).item())
        rows = with_units(rows.filter(~nothing), release)
        from_text += int(rows["from_text"].sum())
        after_death += rows.join(deaths, "subject_id").filter(pl.col("at") > pl.col("death")).height
        out.add(rows.drop("from_text").cast(kinds))
    findings.close()
    conversions.note("{}: values read from text such as 50% or 7,4, where VALUENUM is empty", from_text, table)
    conversions.note("{}: rows after the patient's death, used until the stay ends", after_death, table)
    for key in named[0].columns if named else ():
        conversions.match(pl.concat(named)[key], stays[keys[key]].cast(pl.String), table, "ICUSTAYS")
    return out.close(kinds)


def of_items(findings: Findings, schema: Schema, table: str, wanted: list[str]) -> Iterator[pl.DataFrame]:
    """Yield the rows of each portion whose item is in `wanted` or not valid, with their `place`; count the others."""
    for part, places in rows_of(findings, schema, table):
        asked = part["itemid"].is_in(asked_items(part, wanted).implode()).fill_null(False)
        rows = part.with_columns(place=places).filter(asked)
        findings.rows += part.height - rows.height
        if rows.height:
            yield rows


def asked_items(part: pl.DataFrame, wanted: list[str]) -> pl.Series:
    """Return the values of itemid that are in `wanted`, and those that are not valid items, which the row check then
    rejects. Each distinct value of a portion is checked once."""
    values, kind = part.select(pl.col("itemid").unique()), part.schema["itemid"]
    item = identifier("itemid", kind, numeric=True)
    return values.filter(item.is_in(wanted) | (item.is_null() & ~is_missing("itemid", kind)))["itemid"]


def of_stays(rows: pl.DataFrame, stays: pl.DataFrame, named: str, table: str, counts: Counter[str]) -> pl.DataFrame:
    """Return the rows of patients in `stays`, without rows that name a stay which the patient does not have, in the
    column `named`; subject_id and `named` have the types of `stays`."""
    mine = rows.with_columns(pl.col("subject_id").cast(stays.schema["subject_id"], strict=False))
    mine = mine.filter(pl.col("subject_id").is_not_null())
    counts[f"{table}: rows of patients without a stay"] += rows.height - mine.height
    if named not in mine.columns:
        return mine
    mine = mine.with_columns(stay=pl.col(named).cast(stays.schema["stay_id"], strict=False))
    patients = stays.select(stay="stay_id", patient="subject_id")
    mine = mine.join(patients, "stay", "left", maintain_order="left")
    placed = mine.filter(pl.col(named).is_null() | (pl.col("patient") == pl.col("subject_id")))
    counts[f"{table}: rows that name a stay which the patient does not have"] += mine.height - placed.height
    return placed.with_columns(pl.col("stay").alias(named)).drop("stay", "patient")


def with_units(rows: pl.DataFrame, release: Release) -> pl.DataFrame:
    """Return the columns of `rows_schema` of charted or laboratory rows that have a value; a value that is not a number
    is NaN. `from_text`: VALUENUM is empty, and VALUE has a number written with a unit or a decimal comma."""
    pairs = [(str(item), unit) for item, unit in rows.select("itemid", "valueuom").unique().iter_rows()]
    stated = pl.concat([stated_units(source, pairs) for source in release.ids]).select(
        pl.col("item").cast(pl.Int64), "recorded", pl.col("concept").cast(CONCEPT), UNIT
    )
    rows = rows.join(
        stated, left_on=["itemid", "valueuom"], right_on=["item", "recorded"], how="left", nulls_equal=True,
        maintain_order="left",
    ).with_row_index("row")  # fmt: skip
    texts = rows.filter(pl.col("valuenum").is_null()).select("row", "concept", UNIT, text="value")
    read = texts.drop_nulls("concept").with_columns(pl.col("concept").cast(pl.String))
    read = read.join(
        read_quantities(read.select("concept", UNIT, "text").unique()), ["concept", UNIT, "text"], nulls_equal=True
    )
    read = texts.select("row", plain=pl.col("text").cast(pl.Float64, strict=False)).join(
        read.select("row", "number", "unit_read"), "row", "left"
    )
    rows = rows.join(read, "row", "left", maintain_order="left")
    stay = pl.col(release.stay) if release.stay in rows.columns else pl.lit(None)
    specimen = pl.col("specimen_id") if "specimen_id" in rows.columns else pl.lit(None)
    texts_of = [release.specimen[0], *release.rule_texts]
    has_concept = pl.col("concept").is_not_null()
    return rows.select(
        subject_id="subject_id",
        stay_id=stay,
        at="charttime",
        item="itemid",
        concept="concept",
        value=pl.coalesce(
            "valuenum", pl.when(has_concept).then(pl.col("number").fill_null(float("nan"))).otherwise("plain")
        ),
        text=pl.when(pl.col("itemid").is_in(texts_of)).then("value"),
        unit=pl.coalesce("unit_read", UNIT),
        **({"specimen_id": specimen} if "specimen_id" in release.labs else {}),
        from_text=pl.col("number").is_not_null() & pl.col("plain").is_null(),
    )


def events_of(
    charts: pl.LazyFrame, labs: pl.LazyFrame, episodes: pl.LazyFrame, stays: pl.LazyFrame, release: Release
) -> pl.LazyFrame:
    """Return EVENTS of one batch: `charts` and `labs` are its ROWS; `episodes` and `stays` of all patients."""
    window = stays.select("subject_id", "stay_id", "start", "stop")
    named = charts.filter(pl.col("stay_id").is_not_null()).join(window.drop("subject_id"), "stay_id")
    unnamed = assign_stays(
        pl.concat([charts.filter(pl.col("stay_id").is_null()), keep_arterial(labs, release)]), window
    )
    rows = pl.concat([named, unnamed], how="diagonal").filter(
        pl.col("stop").is_null() | (pl.col("at") <= pl.col("stop"))
    )
    rows = rows.with_columns(time=(pl.col("at") - pl.col("start")).dt.total_seconds() / 3600)
    columns = EVENTS.names()
    measured = rows.filter(pl.col("concept").is_not_null()).select(*columns, UNIT)
    patients = pl.concat([charts.select("subject_id"), labs.select("subject_id")]).unique()
    here = episodes.join(patients, "subject_id", "semi")
    going = here.join(stays.select("stay_id", "start", "end_h"), "stay_id").with_columns(
        from_h=(pl.col("starttime") - pl.col("start")).dt.total_seconds() / 3600,
        to_h=(pl.col("endtime") - pl.col("start")).dt.total_seconds() / 3600,
    )
    made = [sum_coma_scores(rows), *([] if release.rule is None else [release.rule(rows)])]
    return pl.concat([measured, *made, chart_episodes(going).select(columns)], how="diagonal")


def assign_stays(rows: pl.LazyFrame, window: pl.LazyFrame) -> pl.LazyFrame:
    """Assign rows without a stay to the patient's latest stay that starts at or before them; rows before every stay are
    dropped."""
    of = window.sort("start")
    return (
        rows.drop("stay_id")
        .sort("at")
        .join_asof(of, left_on="at", right_on="start", by="subject_id", check_sortedness=False)
        .filter(pl.col("stay_id").is_not_null())
    )


def keep_arterial(labs: pl.LazyFrame, release: Release) -> pl.LazyFrame:
    """Return the laboratory rows without gases whose specimen is not arterial."""
    item, shared = release.specimen
    text = pl.col("text").str.to_uppercase().str.strip_chars(" .")
    arterial = labs.filter((pl.col("item") == item) & (text == "ART")).select(shared).drop_nulls().unique()
    gas = pl.col("item").is_in(GASES)
    return pl.concat(
        [labs.filter(~gas & (pl.col("item") != item)), labs.filter(gas).join(arterial, list(shared), "semi")]
    )


def sum_coma_scores(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Return the coma score at times with all three parts, each charted once."""
    return (
        rows.filter(pl.col("item").is_in(COMA_SCALE) & pl.col("value").is_not_null())
        .group_by("subject_id", "stay_id", "time")
        .agg(pl.col("value").sum(), parts=pl.col("item").n_unique(), n=pl.len())
        .filter((pl.col("parts") == len(COMA_SCALE)) & (pl.col("n") == len(COMA_SCALE)))
        .select("subject_id", "stay_id", "time", concept=pl.lit("gcs", CONCEPT), value="value")
    )


def procedures(
    path: Path, stays: pl.DataFrame, release: Release, conversions: Conversions, counts: Counter[str]
) -> pl.DataFrame:
    """Return subject_id, stay_id, concept, starttime and endtime of MetaVision ventilation, except rewritten orders."""
    name, schema = release.episodes, release.procedures
    table = read_table(release.folder(path, name), name, schema, release.what(), conversions).filter(
        pl.col("itemid").is_in(list(VENTILATION)) & (pl.col("statusdescription").fill_null("") != "Rewritten")
    )
    conversions.match(table[release.stay], stays["stay_id"].cast(pl.String), name, "ICUSTAYS")
    return of_stays(table, stays, release.stay, name, counts).select(
        subject_id="subject_id",
        stay_id=release.stay,
        concept=pl.col("itemid").replace_strict(VENTILATION, return_dtype=CONCEPT),
        starttime="starttime",
        endtime="endtime",
    )


def descriptors(stays: pl.DataFrame) -> pl.DataFrame:
    """Return age, sex and icu_type of every stay as events at its start."""
    wide = stays.select("subject_id", "stay_id", "age", "sex", "icu_type", time=pl.lit(0.0))
    return (
        wide.unpivot(index=["subject_id", "stay_id", "time"], variable_name="concept")
        .drop_nulls("value")
        .select(EVENTS.names())
        .with_columns(pl.col("concept").cast(CONCEPT))
    )
