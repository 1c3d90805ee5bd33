"""Raw MIMIC-IV tables. What MIMIC-III and MIMIC-IV share is tested in test_mimic3.py."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from raylab.data.icu.concepts import SourceData, to_own_units
from raylab.data.icu.labels import label
from raylab.data.icu.patient_batch import screen
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import meds, mimic4, tables
from raylab.errors import DataError

DAY = "2150-01-01"
COLUMNS = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,hospital_expire_flag",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,charttime,storetime,value,valuenum,valueuom",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom",
    "icu/outputevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valueuom",
    "icu/procedureevents": "subject_id,hadm_id,stay_id,starttime,endtime,itemid,value,valueuom,statusdescription",
}
MICU = "Medical Intensive Care Unit (MICU)"
ROWS = {
    "hosp/patients": ["1,M,52,2149,2014 - 2016,", "2,F,91,2150,2008 - 2010,"],
    "hosp/admissions": [f"1,10,{DAY} 00:00:00,,{DAY} 20:00:00,1", f"2,20,{DAY} 00:00:00,,,0"],
    "icu/icustays": [
        f"1,10,100,{MICU},{MICU},{DAY} 00:00:00,{DAY} 20:00:00,0.8",
        f"2,20,200,Neuro Stepdown,Neuro Stepdown,{DAY} 00:00:00,,",
    ],
}


def write(folder: Path, flat: bool = False, packed: tuple[str, ...] = (), **more: list[str]) -> Path:
    for name, head in COLUMNS.items():
        file = folder / (name.split("/")[1] if flat else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join([head, *ROWS.get(name, []), *more.get(file.name, [])]) + "\n"
        if file.name in packed:
            file.with_name(file.name + ".csv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            file.with_name(file.name + ".csv").write_text(text)
    return folder


def at(hour: float) -> str:
    return f"{DAY} {int(hour):02}:{round(hour % 1 * 60):02}:00"


def number(value: object) -> object:
    return value if isinstance(value, int | float) else ""


def chart(item: int, hour: float, value: object, unit: str = "", stay: object = 100, subject: object = 1) -> str:
    return f"{subject},10,{stay},7,{at(hour)},{at(hour)},{item},{value},{number(value)},{unit}"


def lab(item: int, hour: float, value: object, unit: str = "", specimen: object = 1, subject: int = 1) -> str:
    return f"1,{subject},10,{specimen},{item},{at(hour)},{at(hour)},{value},{number(value)},{unit}"


def read(tmp_path: Path, **more: list[str]) -> tuple[SourceData, pl.DataFrame]:
    data = mimic4.read(write(tmp_path / "raw", **more), tmp_path / "work")
    return data, data.events.collect()


def values(events: pl.DataFrame, concept: str) -> list[tuple]:
    return events.filter(pl.col("concept") == concept).sort("stay_id", "time").select("stay_id", "time", "value").rows()


@pytest.mark.parametrize(
    ("flat", "packed"),
    [
        pytest.param(False, (), id="as published"),
        pytest.param(True, (), id="in one folder"),
        pytest.param(False, ("chartevents", "patients"), id="gz and plain mixed"),
    ],
)
def test_folders_and_compression_do_not_matter(tmp_path, flat, packed):
    folder = write(tmp_path / "raw", flat, packed, chartevents=[chart(220045, 1, 80, "bpm")])
    data = mimic4.read(folder, tmp_path / "work")
    events = data.events.collect()
    assert values(events, "hr") == [("100", 1, 80)]
    assert values(events, "age") == [("100", 0, 53), ("200", 0, 91)]  # over 89: anchor_age is 91
    assert values(events, "icu_type") == [("100", 0, 3)] and [v for *_, v in values(events, "sex")] == [1, 0]
    columns = ("subject_id", "stay_id", "source", "died", "end_h", "end", "period")
    assert data.stays.select(columns).rows() == [
        ("1", "100", "mimic-iv", True, 20, "death", "2014-2016"),
        ("2", "200", "mimic-iv", False, None, None, "2008-2010"),
    ]
    assert "stays with an unknown first_careunit (no icu_type): 1" in data.notes
    assert data.numbering == meds.read_mapping(meds.SHIPPED).source  # the same numbers mean the same patients


def test_a_stay_years_after_the_anchor_year_is_in_a_later_period(tmp_path):
    stays = [f"3,30,{300 + years},{MICU},{MICU},{2100 + years}-06-01 00:00:00,,1" for years in (0, 2, 5)]
    data, _ = read(tmp_path, patients=["3,F,40,2100,2008 - 2010,"], icustays=stays)
    assert data.stays.filter(pl.col("subject_id") == "3")["period"].to_list() == ["2008-2010", "2011-2013", "2014-2016"]


def test_gases_count_by_their_own_specimen(tmp_path):
    _, events = read(
        tmp_path,
        labevents=[
            lab(52033, 1, "ART.", specimen=11), lab(50821, 1, 90, "mm Hg", 11), lab(50820, 1, 7.4, "units", 11),
            lab(52033, 1, "VEN.", specimen=12), lab(50821, 1, 40, "mm Hg", 12),  # drawn in the same minute
            lab(50821, 3, 60, "mm Hg", 13),  # of no named specimen
            lab(50821, 4, 61, "mm Hg", ""),
            lab(50816, 3, 50, "%", 13), lab(50912, 3, 1.1, "mg/dL", 14), lab(50819, 1, 8, "", 11),
        ],
    )  # fmt: skip
    assert values(events, "pao2") == [("100", 1, 90)] and values(events, "ph") == [("100", 1, 7.4)]
    assert values(events, "fio2") == [("100", 3, 50)] and values(events, "creatinine") == [("100", 3, 1.1)]
    assert values(events, "peep") == [("100", 1, 8)]


def test_urine_ventilation_scores_and_units(tmp_path):
    data, events = read(
        tmp_path,
        chartevents=[
            chart(223761, 3, 98.6, "?F"), chart(223762, 4, 38, "?F"),  # the item is in degrees Celsius
            *(chart(item, 4, v) for item, v in ((220739, 4), (223900, 5), (223901, 6))),
            chart(226512, 0, 80, "kg"), chart(220045, 21, 90, "bpm"),  # after the stay
            chart(220277, 1, 97, "%", 200, 2),
        ],
        outputevents=[f"1,10,100,7,{at(2)},{at(2)},226559,120,mL", f"1,10,,7,{at(3)},{at(3)},226560,0.1,L",
                      f"1,10,100,7,{at(4)},{at(4)},226559,much,mL"],
        procedureevents=[f"1,10,100,{at(2)},{at(3.5)},225792,90,min,FinishedRunning",
                         f"1,10,100,{at(8)},{at(9)},225792,60,min,Rewritten",
                         f"2,20,200,{at(5)},{at(6)},225794,60,min,Stopped"],
    )  # fmt: skip
    assert values(events, "gcs") == [("100", 4, 15)] and values(events, "weight_admission") == [("100", 0, 80)]
    assert values(events, "mech_vent") == [("100", 2, 1), ("100", 3, 1), ("100", 3.5, 0)]
    assert values(events, "niv") == [("200", 5, 1), ("200", 6, 0)]
    assert values(events, "hr") == []
    _, screened = screen(events.lazy())
    rows = screened.filter(pl.col("concept").is_in(["temp", "urine"])).sort("concept", "time").collect()
    assert rows.select("time", "value", "problem").rows() == [
        (3, 37, None), (4, None, "unknown unit"),
        (2, 120, None), (3, 100, None), (4, None, "unreadable"),
    ]  # fmt: skip
    assert to_own_units(events.lazy()).filter(pl.col("unit_is") == "converted").collect().height == 2
    assert "CHARTEVENTS: rows after the patient's death, used until the stay ends: 1" in data.notes


def test_extremes_are_counted(tmp_path):
    late = f"6,60,600,{MICU},{MICU},{DAY} 05:00:00,{DAY} 04:00:00,0"
    data, events = read(
        tmp_path,
        patients=["3,F,-5,2150,2008 - 2010,", "4,M,,2150,some time,", "5,M,70,99999,2008 - 2010,", "6,?,40,2150,,"],
        icustays=[late, *(f"{n},{n}0,{n}00,{MICU},{MICU},{DAY} 05:00:00,,1" for n in (3, 4, 5, 7))],
        admissions=[f"6,60,{DAY} 00:00:00,,{DAY} 03:00:00,1"],
        chartevents=[
            chart(220045, 2, 90, "bpm"), chart(220045, 1, 80, "bpm"), chart(220045, 1, 80, "bpm"),  # unordered, twice
            chart(220045, 3, 95, stay=999), chart(220045, 3, 95, stay=999, subject=9),
        ],
    )  # fmt: skip
    _, screened = screen(events.lazy())
    used = screened.sort("time").collect()
    assert [v for _, _, v in values(used, "hr")] == [80, 90]
    assert used.filter((pl.col("concept") == "age") & pl.col("value").is_null())["stay_id"].to_list() == ["300"]  # -5
    assert {s for s, _, _ in values(events, "age")} == {"100", "200", "300", "600"}  # 400, 500, 700: no birth year
    assert data.counts == {
        "CHARTEVENTS: rows of patients without a stay": 1,
        "CHARTEVENTS: rows that name a stay which the patient does not have": 1,
    }
    assert {
        "stays without a row in PATIENTS (no age and sex): 1",
        "stays without a row in ADMISSIONS (no outcome): 4",
        "stays with an unreadable sex, set missing: 1",
        "stays that end before they start: 1",
        "stays that start after the patient's death: 1",
        "stays with an unknown anchor_year_group (no period): 2",
        "stays without a year of birth from anchor_year and anchor_age (no age): 2",
    } <= set(data.notes)


@pytest.mark.parametrize(
    ("table", "change", "text"),
    [
        ("icu/chartevents", None, "has no table CHARTEVENTS"),
        ("hosp/patients", "subject_id,gender,dob\n", "no column anchor_age, anchor_year, anchor_year_group"),
        ("hosp/labevents", "subject_id,itemid,charttime,value,valuenum,valueuom\n", "no column specimen_id"),
        ("icu/icustays", "subject_id,hadm_id,icustay_id,first_careunit,intime,outtime\n", "no column stay_id"),
        ("icu/icustays", COLUMNS["icu/icustays"] + "\n", "ICUSTAYS has no rows"),
        ("icu/chartevents", COLUMNS["icu/chartevents"] + f"\n1,10,100,7,{at(1)},,220045,80,high,bpm\n", "not a number"),
        ("icu/chartevents", COLUMNS["icu/chartevents"] + f"\n8,10,800,7,{at(1)},,220045,80,80,bpm\n", "no identifier"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused(tmp_path, table, change, text):
    folder = write(tmp_path / "raw")
    file = folder / f"{table}.csv"
    file.unlink() if change is None else file.write_text(change)
    with pytest.raises(DataError, match=text):
        mimic4.read(folder, tmp_path / "work")


def test_without_outputevents_urine_is_missing_and_noted(tmp_path):
    folder = write(tmp_path / "raw", chartevents=[chart(220045, 1, 80, "bpm")])
    (folder / "icu" / "outputevents.csv").unlink()
    data = mimic4.read(folder, tmp_path / "work")
    assert "there is no table OUTPUTEVENTS, so urine is missing" in data.notes
    assert values(data.events.collect(), "hr") == [("100", 1, 80)]


def test_batches_hold_whole_patients(tmp_path, monkeypatch):
    more = {
        "icustays": [f"{i},{i},{i},{MICU},{MICU},{DAY} 00:00:00,{DAY} 20:00:00,1" for i in range(3, 60)],
        "patients": [f"{i},M,40,2150,2008 - 2010," for i in range(3, 60)],
        "admissions": [f"{i},{i},{DAY} 00:00:00,,,0" for i in range(3, 60)],
        "chartevents": [chart(220045, h, 60 + i, "bpm", i, i) for i in range(3, 60) for h in range(4)],
        "outputevents": [f"{i},{i},{i},7,{at(2)},{at(2)},226559,{i},mL" for i in range(3, 60)],
        "labevents": [row for i in range(3, 60)
                      for row in (lab(52033, 1, "ART.", "", i, i), lab(50821, 1, 60 + i, "mm Hg", i, i))],
    }  # fmt: skip
    folder = write(tmp_path / "raw", **more)
    one = mimic4.read(folder, tmp_path / "one")
    monkeypatch.setattr(tables, "PIECE", 4000)
    monkeypatch.setattr(tables, "CHUNK", 4000)
    many = mimic4.read(folder, tmp_path / "many")
    assert len(one.parts()) == 1 and len(many.parts()) > 3
    order = ["stay_id", "concept", "time"]
    assert one.events.collect().sort(order).equals(many.events.collect().sort(order))
    assert sum(part.collect()["subject_id"].n_unique() for part in many.parts()) == 59


def raw_from_meds(events: pl.DataFrame, folder: Path) -> Path:
    """Write raw tables with the stays and measurements of MEDS `events`. MEDS has no text and no specimen, so rows are
    not named by stay, a value without a number is text, and no laboratory gas is known to be arterial."""
    tail, time = pl.col("code").str.split("//"), pl.col("time").dt.strftime("%Y-%m-%d %H:%M:%S")

    def of(*starts: str) -> pl.DataFrame:
        is_one = pl.any_horizontal(pl.col("code").str.starts_with(start) for start in starts)
        return events.filter(is_one).sort("subject_id", "time")

    def paired(start: pl.DataFrame, end: pl.DataFrame) -> pl.DataFrame:
        ends = end.select("subject_id", end="time", end_code="code").sort("end")
        pairs = start.sort("time").join_asof(
            ends, left_on="time", right_on="end", by="subject_id", strategy="forward", check_sortedness=False
        )
        return pairs.with_columns(end=pl.col("end").dt.strftime("%Y-%m-%d %H:%M:%S")).sort("subject_id", "time")

    left = of("HOSPITAL_DISCHARGE").with_row_index("hadm", 1)
    dead = pl.col("code").str.starts_with("HOSPITAL_DISCHARGE//DIED")
    deaths = of("MEDS_DEATH").select("subject_id", deathtime=time)
    left = left.join(deaths, "subject_id", "left").with_columns(deathtime=pl.when(dead).then("deathtime"))
    stays = paired(of("ICU_ADMISSION"), of("ICU_DISCHARGE")).with_row_index("stay", 1)
    stays = stays.sort("time").join_asof(
        left.select("subject_id", "hadm", out="time").sort("out"),
        left_on="time", right_on="out", by="subject_id", strategy="forward", check_sortedness=False,
    ).with_columns(pl.col("hadm").fill_null(0))  # fmt: skip
    born = of("MEDS_BIRTH").select("subject_id", born=pl.col("time").dt.year())
    sexes = of("GENDER").select("subject_id", sex=tail.list.last())
    item, unit = tail.list.get(1), tail.list.get(2, null_on_oob=True)
    number = pl.col("numeric_value").cast(pl.String)
    measured = events.filter(pl.col("code").str.starts_with("LAB//"), pl.col("time").is_not_null()).select(
        "subject_id", itemid=item, charttime=time, valuenum=number, valueuom=unit,
        value=pl.when(pl.col("numeric_value").is_null() & (item != "52033")).then(pl.lit("text")),
    )  # fmt: skip
    is_chart = pl.col("itemid").str.len_chars() == 6
    nothing = pl.lit(None, pl.String)
    ventilation = paired(of("PROCEDURE//START//22579"), of("PROCEDURE//END//225792"))
    masks = paired(of("PROCEDURE//START//225794"), of("PROCEDURE//END//225794"))
    ventilation = pl.concat([ventilation.filter(tail.list.get(2) == "225792"), masks])
    # a row for each stay of the patient, because an episode of MEDS is of no stay
    ventilation = ventilation.join(stays.select("subject_id", stay_id="stay"), "subject_id")
    tables = {
        "hosp/patients": sexes.join(born, "subject_id").select(
            "subject_id", gender="sex", anchor_age=2100 - pl.col("born"), anchor_year=pl.lit(2100),
            anchor_year_group=pl.lit("2008 - 2010"),
        ),
        "hosp/admissions": left.select("subject_id", hadm_id="hadm", deathtime="deathtime",
                                       hospital_expire_flag=dead.cast(pl.Int8)),
        "hosp/labevents": measured.filter(~is_chart).with_columns(specimen_id=nothing),
        "icu/icustays": stays.select("subject_id", hadm_id="hadm", stay_id="stay", first_careunit=tail.list.get(1),
                                     intime=time, outtime="end"),
        "icu/chartevents": measured.filter(is_chart).with_columns(stay_id=nothing),
        "icu/outputevents": of("SUBJECT_FLUID_OUTPUT").select(
            "subject_id", stay_id=nothing, itemid=item, charttime=time, value=number, valueuom=unit
        ),
        "icu/procedureevents": ventilation.select(
            "subject_id", "stay_id", itemid=tail.list.get(2), starttime=time,
            endtime="end", statusdescription=nothing,
        ),
    }  # fmt: skip
    for name, table in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table.write_csv(folder / f"{name}.csv")
    return folder


def by_number_of_stay(data: SourceData) -> pl.DataFrame:
    """The events, with the number of the stay among the patient's own for its identifier."""
    stays = data.stays.with_columns(
        n=pl.col("stay_id").str.extract(r"(\d+)$", 1).cast(pl.Int64).rank().over("subject_id")
    )
    events = data.events.with_columns(pl.col("subject_id", "stay_id", "concept").cast(pl.String)).collect()
    return events.join(stays.select(pl.col("stay_id", "subject_id").cast(pl.String), "n"), ["stay_id", "subject_id"])


@pytest.mark.campaign
def test_the_demo_of_mimic_iv_is_the_same_as_raw_tables_and_as_meds(real_data, tmp_path):
    source = real_data / "icu" / "mimic-iv-demo-meds"
    if not source.is_dir():
        pytest.skip("no mimic-iv-demo-meds in the real data")
    tables = raw_from_meds(pl.read_parquet(source / "data" / "0.parquet"), tmp_path / "raw")
    raw, copy = mimic4.read(tables, tmp_path / "a"), meds.read(source, tmp_path / "b")
    assert raw.stays.height == copy.stays.height == 140
    value = pl.col("value").fill_nan(-9999).round_sig_figs(6)
    one, other = (
        by_number_of_stay(data)
        .filter(pl.col("time") >= 0)  # which is not used
        .select("subject_id", "n", pl.col("time").round(6), "concept", value, pl.col("unit").fill_null(""))
        .unique()
        for data in (raw, copy)
    )
    columns = one.columns
    only_meds = other.join(one, columns, "anti")
    assert set(only_meds["concept"]) <= {"height", "weight_admission"}  # charted in the 24 h before the stay
    assert (only_meds["time"] == 0).all()
    assert set(one.join(other, columns, "anti")["concept"]) == {"peep"}  # the laboratory's
    assert one.height > 100_000
    metas, rows = {}, {}
    rule = label("ahrf")
    for name, path in (("mimic4", tables), ("meds", source)):
        metas[name] = prepare_icu("ards", name, path, tmp_path / name, horizon=10_000, rule=rule)
        samples = pl.read_parquet(tmp_path / name / "samples.parquet")
        number = pl.col("stay_id").str.extract(r"(\d+)$", 1).cast(pl.Int64).rank().over("subject_id")
        rows[name] = samples.select("subject_id", number, "split", "label", "onset_h", "at_h", "age", "sex", "icu_type")
    assert rows["mimic4"].sort("subject_id", "stay_id").equals(rows["meds"].sort("subject_id", "stay_id"))
    assert metas["mimic4"].onsets == metas["meds"].onsets and metas["mimic4"].attrition == metas["meds"].attrition
    assert metas["mimic4"].onsets["stays"] > 10
