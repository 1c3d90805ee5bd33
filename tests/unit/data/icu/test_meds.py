from datetime import datetime, timedelta
from math import isnan

import polars as pl
import pytest

from raylab.data.icu.concepts import to_own_units
from raylab.data.icu.sources import meds
from raylab.errors import DataError

ADMITTED = datetime(2150, 1, 1, 10)


def at(hours: float) -> datetime:
    return ADMITTED + timedelta(hours=hours)


def write(folder, rows):
    (folder / "data").mkdir(parents=True)
    table = pl.DataFrame(
        [(subject, time, code, value) for subject, time, code, value in rows],
        schema={"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32},
        orient="row",
    )
    table.write_parquet(folder / "data" / "0.parquet")
    return folder


def read(folder, *rows, end=50.0):
    stay = [
        (7, None, "GENDER//M", None),
        (7, datetime(2100, 1, 1), "MEDS_BIRTH", None),
        (7, at(0), "ICU_ADMISSION//Trauma SICU (TSICU)", None),
        (7, at(end), "ICU_DISCHARGE//Trauma SICU (TSICU)", None),
    ]
    extract = meds.read(write(folder, [*stay, *((7, *row) for row in rows)]), folder / "work")
    return extract, extract.events.collect()


def values(events, concept):
    return events.filter(pl.col("concept") == concept).sort("stay_id", "time").select("stay_id", "time", "value").rows()


def test_codes_units_and_stay_window(tmp_path):
    _, events = read(
        tmp_path,
        (at(-1), "LAB//220045//bpm", 60.0),
        (at(0), "LAB//220045//bpm", 70.0),
        (at(50), "LAB//220045//bpm", 80.0),
        (at(51), "LAB//220045//bpm", 90.0),
        (at(2), "LAB//223761//°F", 98.6),
        (at(3), "LAB//223762//°C", 38.0),
        (at(4), "LAB//50821//mm Hg", 40.0),  # a blood gas of unknown specimen
        (at(4), "LAB//220224//mmHg", 90.0),
        (at(5), "SUBJECT_FLUID_OUTPUT//226559//ml", 120.0),
        (at(-5), "LAB//226730//cm", 180.0),
        (at(-30), "LAB//226512//kg", 80.0),  # over a day before the stay
        (at(6), "LAB//220045//bpm", None),
    )
    assert values(events, "hr")[::2] == [("7-1", 0, 70), ("7-1", 50, 80)]
    assert values(events, "hr")[1][:2] == ("7-1", 6) and isnan(values(events, "hr")[1][2])  # recorded, and no number
    temperatures = to_own_units(events.lazy()).filter(pl.col("concept") == "temp").sort("time").collect()
    assert temperatures["value"].round(3).to_list() == [37, 38]
    assert temperatures["unit"].to_list() == ["degF", "degC"] and temperatures["unit_is"].to_list() == [
        "converted", "own"
    ]  # fmt: skip
    assert values(events, "pao2") == [("7-1", 4, 90)]
    assert values(events, "urine") == [("7-1", 5, 120)]
    assert values(events, "height") == [("7-1", 0, 180)]
    assert values(events, "weight_admission") == []
    assert [values(events, name) for name in ("age", "sex", "icu_type")] == [
        [("7-1", 0, 50)],
        [("7-1", 0, 1)],
        [("7-1", 0, 4)],
    ]


def test_a_number_in_text_value_is_read_where_there_is_no_numeric_value(tmp_path):
    read(tmp_path, *((at(hour), "LAB//223835//UNK", None if hour < 4 else 70.0) for hour in (1, 2, 3, 4)))
    file = tmp_path / "data" / "0.parquet"
    texts = {1: "50%", 2: "<50", 3: None, 4: "90%"}
    table = pl.read_parquet(file)
    hours = ((pl.col("time") - ADMITTED).dt.total_hours()).replace_strict(texts, default=None, return_dtype=pl.String)
    table.with_columns(text_value=hours).write_parquet(file)
    extract = meds.read(tmp_path, tmp_path / "again")
    fio2 = values(extract.events.collect(), "fio2")
    assert [value for *_, value in fio2][::3] == [50, 70] and all(isnan(value) for *_, value in fio2[1:3])
    assert "values read from text_value, such as 50%, where numeric_value is empty: 1" in extract.notes


def test_coma_score_needs_all_three_parts(tmp_path):
    _, events = read(
        tmp_path,
        *((at(1), f"LAB//{item}//UNK", value) for item, value in (("220739", 4.0), ("223900", 5.0), ("223901", 6.0))),
        (at(2), "LAB//220739//UNK", 4.0),
    )
    assert values(events, "gcs") == [("7-1", 1, 15)]


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        pytest.param([("START", 1), ("END", 3.5)], [(1, 1), (2, 1), (3, 1), (3.5, 0)], id="within the stay"),
        pytest.param([("START", -5), ("END", 1.5)], [(0, 1), (1, 1), (1.5, 0)], id="begun before"),
        pytest.param([("START", 48.5), ("END", 60)], [(48.5, 1), (49.5, 1)], id="ends after"),
        pytest.param([("START", 48.5)], [(48.5, 1), (49.5, 1)], id="without an end"),
        pytest.param([("START", -5), ("END", -1)], [], id="over before the stay"),
        pytest.param([("START", 60), ("END", 70)], [], id="after the stay"),
        pytest.param(
            [("START", 1), ("END", 2), ("START", 4), ("END", 5)], [(1, 1), (2, 0), (4, 1), (5, 0)], id="two episodes"
        ),
    ],
)
def test_ventilation_episodes(tmp_path, edges, expected):
    _, events = read(tmp_path, *((at(hour), f"PROCEDURE//{edge}//225792", None) for edge, hour in edges))
    assert [(time, value) for _, time, value in values(events, "mech_vent")] == expected


def test_stays_of_one_patient(tmp_path):
    extract, events = read(
        tmp_path,
        (at(60), "HOSPITAL_DISCHARGE//HOME", None),
        (at(100), "ICU_ADMISSION//Medical Intensive Care Unit (MICU)", None),
        (at(101), "LAB//220045//bpm", 90.0),
        (at(110), "HOSPITAL_DISCHARGE//DIED", None),
    )
    assert extract.stays.select("subject_id", "stay_id", "died").rows() == [("7", "7-1", False), ("7", "7-2", True)]
    assert values(events, "hr") == [("7-2", 1, 90)]
    assert values(events, "icu_type") == [("7-1", 0, 4), ("7-2", 0, 3)]


def test_bad_directories_are_explained(tmp_path):
    with pytest.raises(DataError, match="holds no MEDS data"):
        meds.read(tmp_path / "absent", tmp_path / "work")
    with pytest.raises(DataError, match="holds no MEDS data"):
        meds.read(tmp_path, tmp_path / "work")
    with pytest.raises(DataError, match="no ICU stay"):
        meds.read(write(tmp_path / "a", [(1, at(0), "LAB//220045//bpm", 1.0)]), tmp_path / "work")
    folder = write(tmp_path / "b", [(1, at(0), "LAB//220045//bpm", 1.0)])
    file = folder / "data" / "0.parquet"
    pl.DataFrame({"subject_id": [1], "time": [at(0)]}).write_parquet(file)
    with pytest.raises(DataError, match="is not the table MEDS events: no column code, numeric_value"):
        meds.read(folder, tmp_path / "work")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"0\.parquet is damaged"):
        meds.read(folder, tmp_path / "work")


STAY = [
    (7, None, "GENDER//F", None),
    (7, datetime(2100, 1, 1), "MEDS_BIRTH", None),
    (7, at(0), "ICU_ADMISSION//Medical", None),
    (7, at(1), "LAB//220045//bpm", 70.0),
    (7, at(50), "ICU_DISCHARGE//Medical", None),
]


def frame(rows=STAY):
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    return pl.DataFrame(rows, schema=schema, orient="row")


def store(folder, **files):
    for name, table in files.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table.write_parquet(folder / "data" / f"{name}.parquet")
    return folder


def events_in(tmp_path, **files):
    extract = meds.read(store(tmp_path / "set", **files), tmp_path / "work")
    return extract, extract.events.collect().sort("time", "concept").drop("subject_id").rows()


EXPECTED = [
    ("7-1", 0.0, "age", 50.0, None),
    ("7-1", 0.0, "icu_type", 3.0, None),
    ("7-1", 0.0, "sex", 0.0, None),
    ("7-1", 1.0, "hr", 70.0, "bpm"),
]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t, id="MEDS 0.4"),
        pytest.param(lambda t: t.rename({"subject_id": "patient_id"}), id="before 0.3.3"),
        pytest.param(lambda t: t.rename({"time": "timestamp", "numeric_value": "value"}), id="other names"),
        pytest.param(lambda t: t.with_columns(text_value=pl.lit("x"), unit=pl.lit(None)), id="more columns"),
        pytest.param(lambda t: t.with_columns(pl.col("code").cast(pl.Categorical)), id="codes as a dictionary"),
        pytest.param(lambda t: t.with_columns(pl.col("subject_id").cast(pl.Float64)), id="ids as floats"),
        pytest.param(lambda t: t.with_columns(subject_id=pl.lit("7 ")), id="ids as text"),
        pytest.param(lambda t: t.with_columns(pl.col("numeric_value").cast(pl.Float64)), id="values of 64 bits"),
        pytest.param(lambda t: t.with_columns(pl.col("numeric_value").cast(pl.String)), id="values as text"),
        pytest.param(lambda t: t.with_columns(pl.col("numeric_value").fill_null(float("nan"))), id="NaN for no value"),
        pytest.param(lambda t: t.with_columns(pl.col("time").cast(pl.Datetime("ns"))), id="nanoseconds"),
        pytest.param(lambda t: t.with_columns(pl.col("time").dt.replace_time_zone("UTC")), id="dates with a zone"),
        pytest.param(lambda t: t.with_columns(pl.col("time").dt.strftime("%Y-%m-%dT%H:%M:%SZ")), id="dates as text"),
        pytest.param(lambda t: t.with_columns(pl.col("code").replace("GENDER//F", "GENDER//female")), id="words"),
        pytest.param(lambda t: t.select(subject_id="subject_id", events=pl.struct(
            "time", measurements=pl.concat_list(pl.struct("code", "numeric_value", text_value=pl.lit(None, pl.String))))
        ).group_by("subject_id").agg("events"), id="MEDS 0.1, nested"),
    ],
)  # fmt: skip
def test_other_writers_of_meds(tmp_path, change):
    assert events_in(tmp_path, **{"0": change(frame())})[1] == EXPECTED


def test_shards_of_different_types_hold_one_patient(tmp_path):
    first, last = frame(STAY[:3]), frame(STAY[3:]).with_columns(pl.col("subject_id").cast(pl.Float64))
    assert events_in(tmp_path, a=first, b=last)[1] == EXPECTED


def test_a_single_file_metadata_and_what_other_systems_leave(tmp_path):
    frame().write_parquet(tmp_path / "events.parquet")
    pl.DataFrame({"code": ["x"], "description": ["y"]}).write_parquet(tmp_path / "._events.parquet")
    (tmp_path / "metadata").mkdir()
    pl.DataFrame({"code": ["x"], "description": ["y"]}).write_parquet(tmp_path / "metadata" / "codes.parquet")
    for path in (tmp_path, tmp_path / "events.parquet"):
        events = meds.read(path, tmp_path / "work" / path.name).events.collect()
        assert events.sort("time", "concept").drop("subject_id").rows() == EXPECTED


def test_rows_that_nobody_asks_for_may_hold_anything(tmp_path):
    odd = [(None, at(1), "OTHER", float("inf")), (7, None, None, float("nan")), (8, at(1), "LAB//1", float("-inf"))]
    assert events_in(tmp_path, a=frame([*STAY, *odd]))[1] == EXPECTED


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.with_columns(pl.col("subject_id") + 0.5), "subject_id is not an identifier that can be matched"),
        (lambda t: t.with_columns(subject_id=2.0**60), "subject_id is not an identifier that can be matched"),
        (lambda t: t.with_columns(subject_id=pl.lit(None, pl.Int64)), "column subject_id is empty in 5 of 5"),
        (lambda t: t.with_columns(numeric_value=pl.lit(">100")), "numeric_value is not a number .*'>100' in line 1"),
        (lambda t: t.with_columns(time=pl.lit("01/02/2150")), "time is not a date .*'01/02/2150' in line 1"),
        (lambda t: t.with_columns(time=pl.when(pl.col("code") == "MEDS_BIRTH").then(pl.lit("2100-01-01T00:00Z"))
            .otherwise(pl.col("time").cast(pl.String))), "dates with and without a time zone"),
        (lambda t: t.drop("numeric_value"), "no column numeric_value"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused(tmp_path, change, text):
    with pytest.raises(DataError, match=text):
        events_in(tmp_path, a=change(frame()))


@pytest.mark.parametrize(
    ("codes", "sex"),
    [(["GENDER//M"], [1]), (["GENDER//Missing"], []), (["GENDER//M", "GENDER//F"], []), (["GENDER//male"], [1])],
)
def test_a_sex_that_is_not_certain_is_missing_and_noted(tmp_path, codes, sex):
    rows = [*STAY[1:], *((7, None, code, None) for code in codes)]
    extract, _ = events_in(tmp_path, a=frame(rows))
    assert [v for _, _, v in values(extract.events.collect(), "sex")] == sex
    assert any("an unreadable sex, or with two" in note for note in extract.notes) is (not sex)


def test_a_week_before_the_birthday_is_not_yet_the_age(tmp_path):
    """Rounded to .1, 17.98 years would be 18: an adult."""
    rows = [(7, datetime(2132, 1, 9), "MEDS_BIRTH", None) if row[2] == "MEDS_BIRTH" else row for row in STAY]
    (age,) = [row[3] for row in events_in(tmp_path, a=frame(rows))[1] if row[2] == "age"]
    assert 17.97 < age < 18


def test_births_moved_by_300_years_and_rows_of_patients_without_a_stay(tmp_path):
    rows = [*STAY, (7, datetime(1850, 1, 1), "MEDS_BIRTH", None), (8, at(1), "LAB//220045//bpm", 60.0)]
    extract, events = events_in(tmp_path, a=frame(rows))
    assert ("7-1", 0.0, "age", 91.4, None) in events
    assert extract.counts == {"rows of patients without an ICU stay": 1} and extract.numbering == "mimic-iv-meds"
