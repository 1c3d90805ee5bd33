"""MIMIC-IV raw tables as published, `icu/chartevents.csv.gz` and so on: CSV, CSV.gz or parquet, names in any letter
case, in folders `hosp` and `icu` or all in one.

Required: icustays, patients, admissions, chartevents, labevents, procedureevents; outputevents for urine. Items are
those of d_items and d_labitems, as MIMIC's own concepts use them (github.com/MIT-LCP/mimic-code, mimic-iv/concepts).
Laboratory gases are used only if a row of the same specimen (specimen_id) has the specimen type (52033) `ART.`.

Age counts from 1 January of anchor_year - anchor_age, as in MIMIC-IV's MEDS form; patients over 89 have an anchor_age
of 91. The period of a stay is the three years that anchor_year_group says for its year, known to within a year.
Ventilation is that of the procedures 225792 (invasive) and 225794 (non-invasive).
"""

from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import SourceData
from raylab.data.icu.sources import mimic
from raylab.data.icu.sources.mimic import ID, ITEM, MEASUREMENTS, OPTIONAL_ID, TIME, Release
from raylab.data.icu.sources.schema import DATE, INTEGER, NUMBER, TEXT, Column

UNITS = {
    "Coronary Care Unit (CCU)": 1.0,
    "Cardiac Vascular Intensive Care Unit (CVICU)": 2.0,
    "Medical Intensive Care Unit (MICU)": 3.0,
    "Medical/Surgical Intensive Care Unit (MICU/SICU)": 3.0,
    "Neuro Surgical Intensive Care Unit (Neuro SICU)": 4.0,
    "Surgical Intensive Care Unit (SICU)": 4.0,
    "Trauma SICU (TSICU)": 4.0,
}  # icu_type of PhysioNet 2012; a mixed unit counts as medical
SPECIMEN = 52033
FIRST_YEAR, LAST_YEAR, YEARS = 2008, 2100, 3  # anchor_year_group: 2008 - 2010, 2011 - 2013, ...


def with_birth(patients: pl.DataFrame) -> pl.DataFrame:
    """Return PATIENTS with `dob`; null where anchor_year or anchor_age is missing or gives no year."""
    year = pl.col("anchor_year") - pl.col("anchor_age")
    return patients.with_columns(dob=pl.datetime(pl.when(year.is_between(1, 9999)).then(year), 1, 1))


def real_period() -> pl.Expr:
    """Return the three years in which a stay was, such as `2011-2013`, from the columns of ICUSTAYS and PATIENTS; null
    if they give none from FIRST_YEAR on."""
    group = pl.col("anchor_year_group").str.extract(r"^\s*(\d{4})\s*-\s*\d{4}\s*$", 1).cast(pl.Int64)
    middle = group + 1 + pl.col("intime").dt.year() - pl.col("anchor_year")
    first = FIRST_YEAR + YEARS * ((middle - FIRST_YEAR) // YEARS)
    return pl.when(first.is_between(FIRST_YEAR, LAST_YEAR)).then(pl.format("{}-{}", first, first + YEARS - 1))


MIMIC_IV = Release(
    name="MIMIC-IV",
    source="mimic-iv",
    numbering="mimic-iv-meds",  # patients have the same numbers in the MEDS form, which was read first
    ids=("mimic4", "mimic4_lab"),
    stay="stay_id",
    stays={
        "subject_id": ID,
        "hadm_id": ID,
        "stay_id": ID,
        "first_careunit": TEXT,
        "intime": TIME,
        "outtime": DATE,
    },
    patients={
        "subject_id": ID,
        "gender": TEXT,
        "anchor_age": INTEGER,
        "anchor_year": INTEGER,
        "anchor_year_group": TEXT,
    },
    charts={"stay_id": OPTIONAL_ID, **MEASUREMENTS},
    labs={**MEASUREMENTS, "specimen_id": OPTIONAL_ID},
    outputs={"stay_id": OPTIONAL_ID, **MEASUREMENTS, "valuenum": Column(NUMBER.dtype, is_optional=True)},
    episodes="PROCEDUREEVENTS",
    procedures={
        "subject_id": ID,
        "stay_id": OPTIONAL_ID,
        "itemid": ITEM,
        "starttime": TIME,
        "endtime": DATE,
        "statusdescription": TEXT,
    },
    born=with_birth,
    of_birth="anchor_year and anchor_age",
    period=("anchor_year_group", real_period()),
    units=UNITS,
    specimen=(SPECIMEN, ("subject_id", "specimen_id")),
    folders={
        **dict.fromkeys(("ICUSTAYS", "CHARTEVENTS", "PROCEDUREEVENTS", "OUTPUTEVENTS"), "icu"),
        **dict.fromkeys(("PATIENTS", "ADMISSIONS", "LABEVENTS"), "hosp"),
    },
)


def read(path: Path, work: Path) -> SourceData:
    return mimic.read(path, work, MIMIC_IV)
