"""MIMIC-III raw tables, `CHARTEVENTS.csv.gz` and so on: CSV, CSV.gz or parquet, names in any letter case.

Required: ICUSTAYS, PATIENTS, ADMISSIONS, CHARTEVENTS, LABEVENTS, PROCEDUREEVENTS_MV. Rows marked as errors are
excluded. Laboratory gases are used only if a specimen row (50800) of the same patient and time says ART; LABEVENTS has
no store time. Ages above 89 are recorded as about 300 years (demographics.py).

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

from pathlib import Path

import polars as pl

from raylab.data.icu.concepts import CONCEPT, EVENTS, SourceData
from raylab.data.icu.sources import mimic
from raylab.data.icu.sources.mimic import ID, ITEM, MEASUREMENTS, OPTIONAL_ID, TIME, Release
from raylab.data.icu.sources.schema import DATE, INTEGER, TEXT

UNITS = {"CCU": 1.0, "CSRU": 2.0, "MICU": 3.0, "SICU": 4.0, "TSICU": 4.0}  # icu_type of PhysioNet 2012
PERIODS = {"carevue": "2001-2008", "metavision": "2008-2012"}

MODE, DEVICE = 720, 467
SETTINGS = (505, 506, 682, 683, 543, 535, 444, 445, 448, 450)
MASKS = ("bipap mask", "cpap mask")
NO_TUBE = (
    "nasal cannula", "face tent", "aerosol-cool", "non-rebreather", "hi flow neb", "medium conc mask", "venti mask",
    "trach mask", "t-piece", "hi flow nasal cannula", "ultrasonic neb",
)  # fmt: skip
SPECIMEN = 50800


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


MIMIC_III = Release(
    name="MIMIC-III",
    source="mimic-iii",
    numbering="mimic3",
    ids=("mimic3",),
    stay="icustay_id",
    stays={
        "subject_id": ID,
        "hadm_id": ID,
        "icustay_id": ID,
        "dbsource": TEXT,
        "first_careunit": TEXT,
        "intime": TIME,
        "outtime": DATE,
    },
    patients={"subject_id": ID, "gender": TEXT, "dob": DATE},
    charts={"icustay_id": OPTIONAL_ID, **MEASUREMENTS, "error": INTEGER},
    labs=MEASUREMENTS,
    episodes="PROCEDUREEVENTS_MV",
    procedures={
        "subject_id": ID,
        "icustay_id": OPTIONAL_ID,
        "itemid": ITEM,
        "starttime": TIME,
        "endtime": DATE,
        "statusdescription": TEXT,
    },
    born=lambda patients: patients,
    period=("dbsource", pl.col("dbsource").str.to_lowercase().replace_strict(PERIODS, default=None)),
    units=UNITS,
    specimen=(SPECIMEN, ("subject_id", "at")),
    rule=carevue_ventilation,
    rule_items=(MODE, DEVICE),
    rule_texts=(MODE, DEVICE),
)


def read(path: Path, work: Path) -> SourceData:
    return mimic.read(path, work, MIMIC_III)
