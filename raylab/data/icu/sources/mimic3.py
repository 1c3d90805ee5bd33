"""MIMIC-III raw tables, `CHARTEVENTS.csv.gz` and so on: CSV, CSV.gz or parquet, names in any letter case.

Required: ICUSTAYS, PATIENTS, ADMISSIONS, CHARTEVENTS, LABEVENTS, PROCEDUREEVENTS_MV. A row is an ICU stay. Charted rows
belong to the stay that they name, laboratory rows to the stay at their time; rows that name a stay that the patient
does not have in ICUSTAYS are excluded and counted. Times are chart times, because LABEVENTS has no store time. Rows
marked as errors are excluded. Laboratory gases are used only if a specimen row (50800) of the same patient and time
says ART. Ages above 89 are recorded as about 300 years (demographics.py).

Ventilation. MetaVision has procedures: 225792 invasive, 225794 non-invasive. CareVue has none, so a rule applies:

    invasive (mech_vent 1)    at a time with a ventilator mode (720) other than `Other/Remarks`, or with a PEEP (505,
                              506), tidal volume (682, 683), plateau (543), peak (535) or mean airway pressure (444) or
                              minute volume (445, 448, 450) above 0
    non-invasive (niv 1)      at a time with the oxygen device (467) `Bipap Mask` or `CPAP Mask`; ventilator settings at
                              that time do not count as invasive
    neither (both 0)          at a time with another device without a tube (nasal cannula, tent, mask, nebuliser,
                              T-piece) and no ventilator setting

`None` as a device is ignored. The window of the label determines how long a 1 is valid.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import (
    CONCEPT,
    CONCEPTS,
    EVENTS,
    UNIT,
    SourceData,
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
    find_required,
    in_batches,
    piece_count,
    read_table,
    rows_of,
)
from raylab.data.identifiers import identifier, is_missing
from raylab.errors import DataError

WHAT = "the tables of MIMIC-III"
UNITS = {"CCU": 1.0, "CSRU": 2.0, "MICU": 3.0, "SICU": 4.0, "TSICU": 4.0}  # icu_type of PhysioNet 2012
PERIODS = {"carevue": "2001-2008", "metavision": "2008-2012"}

MODE, DEVICE = 720, 467
SETTINGS = (505, 506, 682, 683, 543, 535, 444, 445, 448, 450)
MASKS = ("bipap mask", "cpap mask")
NO_TUBE = (
    "nasal cannula", "face tent", "aerosol-cool", "non-rebreather", "hi flow neb", "medium conc mask", "venti mask",
    "trach mask", "t-piece", "hi flow nasal cannula", "ultrasonic neb",
)  # fmt: skip
COMA_SCALE = (220739, 223900, 223901)  # MetaVision's eye, verbal, motor: a score is their sum at one time
SPECIMEN = 50800
GASES = (50821, 50818, 50820, 50817, 50802)
VENTILATION = {225792: "mech_vent", 225794: "niv"}


ID = Column(pl.String(), nullable=False, identifier="number")
"""By MIMIC-III's documentation, identifiers are whole numbers."""
OPTIONAL_ID = replace(ID, nullable=True)
ITEM, TIME = replace(INTEGER, nullable=False), replace(DATE, nullable=False)

ICU_STAYS = {
    "subject_id": ID,
    "hadm_id": ID,
    "icustay_id": ID,
    "dbsource": TEXT,
    "first_careunit": TEXT,
    "intime": TIME,
    "outtime": DATE,
}
PATIENTS = {"subject_id": ID, "gender": TEXT, "dob": DATE}
ADMISSIONS = {"hadm_id": ID, "deathtime": DATE, "hospital_expire_flag": replace(INTEGER, is_in=(0, 1))}
LAB_EVENTS = {
    "subject_id": ID,
    "itemid": ITEM,
    "charttime": TIME,
    "value": TEXT,
    "valuenum": NUMBER,
    "valueuom": TEXT,
}
CHART_EVENTS = {"subject_id": ID, "icustay_id": OPTIONAL_ID, **LAB_EVENTS, "error": INTEGER}
PROCEDURES = {
    "subject_id": ID,
    "icustay_id": OPTIONAL_ID,
    "itemid": ITEM,
    "starttime": TIME,
    "endtime": DATE,
    "statusdescription": TEXT,
}


def rows_schema(stays: pl.DataFrame) -> pl.Schema:
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
        }
    )


def read(path: Path, work: Path) -> SourceData:
    if not path.is_dir():
        raise DataError(f"no directory at {path}", do=f"give --path the directory with {WHAT}")
    conversions, counts = Conversions(), Counter[str]()
    stays = with_coded_ids(find_stays(path, conversions, counts))
    files = {name: find_required(path, name, WHAT) for name in ("CHARTEVENTS", "LABEVENTS")}
    pieces = piece_count(*files.values())
    known = {int(item): concept.name for concept in CONCEPTS.values() for item in concept.ids["mimic3"]}
    rule = (MODE, DEVICE, *COMA_SCALE)
    tell = (conversions, counts)
    charts = select_rows(
        files["CHARTEVENTS"], CHART_EVENTS, {*known, *rule}, Pieces(work, "charts", pieces), stays, *tell
    )
    labs = select_rows(files["LABEVENTS"], LAB_EVENTS, {*known, SPECIMEN}, Pieces(work, "labs", pieces), stays, *tell)
    episodes = procedures(path, stays, *tell)
    parts = tuple(events_of(chart, lab, episodes.lazy(), stays.lazy()) for chart, lab in zip(charts, labs, strict=True))
    first = descriptors(stays)
    together = pl.concat([parts[0], first.lazy()], how="diagonal")
    parts = (together,) if len(parts) == 1 else _spread(parts, first)
    notes = (*NOTES, *conversions.close())
    warnings = tuple(conversions.warnings)
    return SourceData(pl.concat(parts), whole_stays(stays), dict(+counts), parts, notes, warnings, numbering="mimic3")


NOTES = ("times are chart times: a laboratory value may have been known later than its time",)


def _spread(parts: tuple[pl.LazyFrame, ...], first: pl.DataFrame) -> tuple[pl.LazyFrame, ...]:
    """Add the descriptors of every stay to its patient's batch."""
    part = pl.col("subject_id").cast(pl.String).hash(seed=0) % len(parts)
    return tuple(pl.concat([piece, first.lazy().filter(part == k)], how="diagonal") for k, piece in enumerate(parts))


def find_stays(path: Path, conversions: Conversions, counts: Counter[str]) -> pl.DataFrame:
    """Return one row per stay: STAYS, start and end (dates), age, sex, icu_type. Stays that were truncated because they
    overlap, and values missing in PATIENTS and ADMISSIONS, are counted."""
    table = read_table(path, "ICUSTAYS", ICU_STAYS, WHAT, conversions).drop_nulls("intime").sort("subject_id", "intime")
    if table.is_empty():
        raise DataError(f"{path}: ICUSTAYS has no rows", do="copy it again")
    if table["icustay_id"].is_duplicated().any():
        n = int(table["icustay_id"].is_duplicated().sum())
        raise DataError(f"{path}: {n} rows of ICUSTAYS share their icustay_id", do="keep one row per stay")
    patients = read_table(path, "PATIENTS", PATIENTS, WHAT, conversions)
    admissions = read_table(path, "ADMISSIONS", ADMISSIONS, WHAT, conversions)
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
    hours = (pl.col("end") - pl.col("intime")).dt.total_seconds() / 3600
    table = table.with_columns(age=(pl.col("intime") - pl.col("dob")).dt.total_seconds() / (24 * 365.25 * 3600))
    table = table.with_columns(
        period=pl.col("dbsource").str.to_lowercase().replace_strict(PERIODS, default=None),
        icu_type=pl.col("first_careunit").replace_strict(UNITS, default=None),
    )
    for column, read in (("dbsource", "period"), ("first_careunit", "icu_type")):
        conversions.note("stays with an unknown {} (no {})", count_unread(table, column, read), column, read)
    dead = pl.col("deathtime") <= pl.col("end")
    return table.select(
        subject_id="subject_id",
        stay_id="icustay_id",
        source=pl.lit("mimic-iii"),
        died=pl.col("hospital_expire_flag") == 1,
        end_h=hours,
        end=pl.when(dead).then(pl.lit("death")).when(pl.col("end").is_not_null()).then(pl.lit("discharge")),
        period="period",
        clock_h=pl.col("intime").dt.hour() + pl.col("intime").dt.minute() / 60,
        start="intime",
        stop="end",
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
    conversions: Conversions,
    counts: Counter[str],
) -> list[pl.LazyFrame]:
    """Return the rows of `items` for the patients of `stays`, with their units, written by patient. Only one portion of
    the table, and the selected rows of some portions, are in memory at a time."""
    findings, table, from_text = Findings(file, conversions), file.name.partition(".")[0].upper(), 0
    named: list[pl.DataFrame] = []
    kinds = rows_schema(stays)
    keys = {"subject_id": "subject_id", "icustay_id": "stay_id"}  # here -> in `stays`
    for rows in in_batches(of_items(findings, schema, table, [str(item) for item in sorted(items)])):
        rows = findings.check(rows.drop("place"), schema, rows["place"])
        if "error" in rows.columns:
            wrong = (pl.col("error") == 1).fill_null(False)
            counts["marked as an error"] += int(rows.select(wrong.sum()).item())
            rows = rows.filter(~wrong)
        named.append(rows.select(key for key in keys if key in rows.columns).unique())
        rows = of_stays(rows, stays, table, counts).with_columns(pl.col("valuenum").fill_nan(None))
        nothing = pl.col("valuenum").is_null() & (pl.col("value").fill_null("").str.strip_chars() == "")
        counts["without a value"] += int(rows.select(nothing.sum()).item())
        rows = with_units(rows.filter(~nothing))
        from_text += int(rows["from_text"].sum())
        out.add(rows.drop("from_text").cast(kinds))
    findings.close()
    conversions.note("{}: values read from text such as 50% or 7,4, where VALUENUM is empty", from_text, table)
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


def of_stays(rows: pl.DataFrame, stays: pl.DataFrame, table: str, counts: Counter[str]) -> pl.DataFrame:
    """Return the rows of patients in `stays`, without rows that name a stay which the patient does not have;
    subject_id and icustay_id have the types of `stays`."""
    mine = rows.with_columns(pl.col("subject_id").cast(stays.schema["subject_id"], strict=False))
    mine = mine.filter(pl.col("subject_id").is_not_null())
    counts[f"{table}: rows of patients without a stay"] += rows.height - mine.height
    if "icustay_id" not in mine.columns:
        return mine
    mine = mine.with_columns(stay=pl.col("icustay_id").cast(stays.schema["stay_id"], strict=False))
    patients = stays.select(stay="stay_id", patient="subject_id")
    mine = mine.join(patients, "stay", "left", maintain_order="left")
    placed = mine.filter(pl.col("icustay_id").is_null() | (pl.col("patient") == pl.col("subject_id")))
    counts[f"{table}: rows that name a stay which the patient does not have"] += mine.height - placed.height
    return placed.with_columns(icustay_id="stay").drop("stay", "patient")


def with_units(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the columns of `rows_schema` of charted or laboratory rows that have a value; a value that is not a number
    is NaN. `from_text`: VALUENUM is empty, and VALUE has a number written with a unit or a decimal comma."""
    pairs = rows.select("itemid", "valueuom").unique()
    stated = stated_units("mimic3", ((str(item), unit) for item, unit in pairs.iter_rows()))
    stated = stated.select(pl.col("item").cast(pl.Int64), "recorded", pl.col("concept").cast(CONCEPT), UNIT)
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
    stay = pl.col("icustay_id") if "icustay_id" in rows.columns else pl.lit(None)
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
        text=pl.when(pl.col("itemid").is_in([MODE, DEVICE, SPECIMEN])).then("value"),
        unit=pl.coalesce("unit_read", UNIT),
        from_text=pl.col("number").is_not_null() & pl.col("plain").is_null(),
    )


def events_of(charts: pl.LazyFrame, labs: pl.LazyFrame, episodes: pl.LazyFrame, stays: pl.LazyFrame) -> pl.LazyFrame:
    """Return EVENTS of one batch: `charts` and `labs` are its ROWS; `episodes` and `stays` of all patients."""
    window = stays.select("subject_id", "stay_id", "start", "stop")
    named = charts.filter(pl.col("stay_id").is_not_null()).join(window.drop("subject_id"), "stay_id")
    unnamed = assign_stays(pl.concat([charts.filter(pl.col("stay_id").is_null()), keep_arterial(labs)]), window)
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
    return pl.concat(
        [measured, sum_coma_scores(rows), carevue_ventilation(rows), chart_episodes(going).select(columns)],
        how="diagonal",
    )


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


def keep_arterial(labs: pl.LazyFrame) -> pl.LazyFrame:
    """Return the laboratory rows without gases whose specimen is not arterial."""
    specimen = labs.filter((pl.col("item") == SPECIMEN) & (pl.col("text").str.to_uppercase() == "ART"))
    gas = pl.col("item").is_in(GASES)
    arterial_gas = labs.filter(gas).join(specimen.select("subject_id", "at").unique(), ["subject_id", "at"], "semi")
    return pl.concat([labs.filter(~gas & (pl.col("item") != SPECIMEN)), arterial_gas])


def sum_coma_scores(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Return the coma score at times with all three parts, each charted once."""
    return (
        rows.filter(pl.col("item").is_in(COMA_SCALE) & pl.col("value").is_not_null())
        .group_by("subject_id", "stay_id", "time")
        .agg(pl.col("value").sum(), parts=pl.col("item").n_unique(), n=pl.len())
        .filter((pl.col("parts") == len(COMA_SCALE)) & (pl.col("n") == len(COMA_SCALE)))
        .select("subject_id", "stay_id", "time", concept=pl.lit("gcs", CONCEPT), value="value")
    )


def carevue_ventilation(rows: pl.LazyFrame) -> pl.LazyFrame:
    """Return mech_vent and niv by the rule at the top of the file; `rows` has subject_id, stay_id, time, item, value,
    text."""
    text = pl.col("text").str.to_lowercase().str.strip_chars()
    device = pl.col("item") == DEVICE
    setting = (pl.col("item").is_in(SETTINGS) & (pl.col("value") > 0) & pl.col("value").is_not_nan()) | (
        (pl.col("item") == MODE) & text.is_not_null() & ~text.is_in(["", "other/remarks"])
    )
    at = (
        rows.filter(pl.col("item").is_in([MODE, DEVICE, *SETTINGS]))
        .group_by("subject_id", "stay_id", "time")
        .agg(setting=setting.any(), mask=(device & text.is_in(MASKS)).any(), free=(device & text.is_in(NO_TUBE)).any())
    )
    mask, on, free = pl.col("mask"), pl.col("setting"), pl.col("free")
    wide = at.select(
        "subject_id",
        "stay_id",
        "time",
        mech_vent=pl.when(mask).then(0.0).when(on).then(1.0).when(free).then(0.0),
        niv=pl.when(mask).then(1.0).when(on | free).then(0.0),
    )
    return (
        wide.unpivot(index=["subject_id", "stay_id", "time"], variable_name="concept")
        .drop_nulls("value")
        .select(EVENTS.names())
        .with_columns(pl.col("concept").cast(CONCEPT))
    )


def procedures(path: Path, stays: pl.DataFrame, conversions: Conversions, counts: Counter[str]) -> pl.DataFrame:
    """Return subject_id, stay_id, concept, starttime and endtime of MetaVision ventilation, except rewritten orders."""
    table = read_table(path, "PROCEDUREEVENTS_MV", PROCEDURES, WHAT, conversions).filter(
        pl.col("itemid").is_in(list(VENTILATION)) & (pl.col("statusdescription").fill_null("") != "Rewritten")
    )
    conversions.match(table["icustay_id"], stays["stay_id"].cast(pl.String), "PROCEDUREEVENTS_MV", "ICUSTAYS")
    return of_stays(table, stays, "PROCEDUREEVENTS_MV", counts).select(
        subject_id="subject_id",
        stay_id="icustay_id",
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
