from datetime import datetime, timedelta
from math import isnan

import polars as pl
import pytest

from raylab.data.concepts import to_own_units
from raylab.data.sources import meds
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
