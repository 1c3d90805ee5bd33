from datetime import timedelta

import polars as pl
import pytest

from raylab.data.icu.dataset import load_icu
from raylab.data.icu.labels import label
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import yaib
from raylab.errors import DataError


def dyn(stays: int = 40, hours: int = 40) -> pl.DataFrame:
    """Hourly rows in eICU's form: FiO2 in percent; every third stay has a P/F of 180 from hour 20 on."""
    rows = []
    for stay in range(stays):
        for hour in range(hours):
            low = stay % 3 == 0 and hour >= 20
            po2 = (90.0 if low else 200.0) if hour % 4 == 0 else None
            rows.append((stay, timedelta(hours=hour), 50.0 if hour % 4 == 0 else None, po2, 7.4, 96.0, 80.0 + hour))
    schema = {"stay_id": pl.Int64, "time": pl.Duration("ms"), "fio2": pl.Float64, "po2": pl.Float64, "ph": pl.Float64,
              "o2sat": pl.Float64, "hr": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def sta(stays: int = 40) -> pl.DataFrame:
    sex = ["Male", "Female", None, "Other"]
    return pl.DataFrame(
        {
            "stay_id": range(stays),
            "age": [60.0] * stays,
            "sex": [sex[i % 4] for i in range(stays)],
            "height": [170.0] * stays,
            "weight": [80.0] * stays,
        }
    )


def write(folder, d=None, s=None, names=("dyn", "sta")):
    folder.mkdir(parents=True)
    (dyn() if d is None else d).write_parquet(folder / f"{names[0]}.parquet")
    (sta() if s is None else s).write_parquet(folder / f"{names[1]}.parquet")
    return folder


def test_events_by_hand(tmp_path):
    extract = yaib.read(write(tmp_path / "eicu", dyn(2, 2), sta(2)))
    events = extract.events.collect().sort("stay_id", "time", "concept")
    assert events.filter(pl.col("stay_id") == "0").select("time", "concept", "value").rows() == [
        (0, "age", 60), (0, "fio2", 50), (0, "height", 170), (0, "hr", 80), (0, "pao2", 200), (0, "ph", 7.4),
        (0, "sex", 1), (0, "spo2", 96), (0, "weight_admission", 80),
        (1, "hr", 81), (1, "ph", 7.4), (1, "spo2", 96),
    ]  # fmt: skip
    assert extract.stays.select("subject_id", "stay_id").rows() == [("0", "0"), ("1", "1")]
    assert extract.lacks == ("mech_vent", "niv")


def test_the_label_does_without_ventilation_and_says_so(tmp_path):
    meta = prepare_icu("ards", "yaib", write(tmp_path / "eicu"), tmp_path / "out")
    assert meta.cohorts["all"] == {"n": 40, "positive": 14} and meta.cohorts["ventilated_pf"]["n"] == 0
    assert meta.label["ventilation"] is None and "not asked for" in meta.label["onset"]
    assert any("ventilation is not recorded" in note for note in meta.notes)
    assert any("a stay counts as a patient" in note for note in meta.notes)
    rows = load_icu(tmp_path / "out", "all").rows
    assert set(rows.filter(pl.col("label") == 1)["onset_h"]) == {20.0}


@pytest.mark.parametrize("kind", [pl.Duration("ns"), pl.Duration("us"), pl.Float64, pl.Int32])
def test_time_as_a_duration_or_as_hours(tmp_path, kind):
    hours = dyn().with_columns(pl.col("time").dt.total_hours())
    table = hours.with_columns(
        pl.duration(hours="time").cast(kind) if kind == pl.Duration else pl.col("time").cast(kind)
    )
    upper = table.rename({"stay_id": "Stay_ID", "fio2": "FiO2"})
    meta = prepare_icu("ards", "yaib", write(tmp_path / "eicu", upper, names=("DYN", "Sta")), tmp_path / "out")
    assert meta.cohorts["all"] == {"n": 40, "positive": 14}


def test_a_folder_above_is_enough_and_fractions_are_fine(tmp_path):
    write(tmp_path / "task" / "eicu", dyn().with_columns(pl.col("fio2") / 100))
    meta = prepare_icu("ards", "yaib", tmp_path / "task", tmp_path / "out")
    assert meta.cohorts["all"]["positive"] == 14 and meta.left_out == []


def test_a_label_with_peep_is_refused(tmp_path):
    with pytest.raises(DataError, match="'berlin-oxygenation' cannot be made: no plausible value of peep"):
        prepare_icu("ards", "yaib", write(tmp_path / "eicu"), tmp_path / "out", rule=label("berlin-oxygenation"))
    assert not (tmp_path / "out").exists()


def test_other_units_are_noticed(tmp_path):
    kpa = dyn().with_columns(pl.col("po2") / 30)  # 3 and 6.7: no mmHg
    with pytest.raises(DataError, match="values of pao2 cannot be in the concept's unit"):
        prepare_icu("ards", "yaib", write(tmp_path / "a", kpa), tmp_path / "out")
    odd = dyn().with_columns(temp=pl.lit(98.6))
    meta = prepare_icu("ards", "yaib", write(tmp_path / "b", odd), tmp_path / "out")
    assert meta.left_out == ["temp"] and "temp" not in meta.features


@pytest.mark.parametrize(
    ("d", "s", "text"),
    [
        (lambda: dyn().drop("po2"), sta, "'ahrf' cannot be made: no plausible value of pao2"),
        (lambda: dyn().drop("time"), sta, r"dyn\.parquet: no column time"),
        (lambda: dyn().with_columns(time=pl.lit("1 h")), sta, "(?s)column time holds String, .*for example '1 h'"),
        (lambda: dyn().with_columns(hr=pl.col("time")), sta, "column hr holds Duration.* not numbers"),
        (lambda: dyn().with_columns(pl.col("stay_id").replace(0, None)), sta, "stay_id is empty or cannot be read in"),
        (lambda: dyn().select("stay_id", "time"), sta, "no column of a known quantity"),
        (dyn, lambda: pl.concat([sta(), sta().head(1).with_columns(age=61.0)]), "stay_id is not unique in 2 of"),
        (lambda: dyn().clear(), sta, "no rows"),
    ],
)  # fmt: skip
def test_bad_tables_are_explained(tmp_path, d, s, text):
    with pytest.raises(DataError, match=text):
        prepare_icu("ards", "yaib", write(tmp_path / "eicu", d(), s()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_as_text_are_read_and_other_text_is_counted(tmp_path):
    text = dyn().with_columns(pl.col("time").dt.total_hours()).with_columns(pl.exclude("stay_id").cast(pl.String))
    text = text.with_columns(hr=pl.when(pl.col("time") == "3").then(pl.lit("fast")).otherwise("hr"))
    meta = prepare_icu("ards", "yaib", write(tmp_path / "eicu", text), tmp_path / "out")
    assert meta.cohorts["all"] == {"n": 40, "positive": 14}
    assert meta.unreadable == {"hr": 40}


def test_bad_directories(tmp_path):
    with pytest.raises(DataError, match="no directory"):
        yaib.read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"holds no dyn\.parquet"):
        yaib.read(tmp_path)
    write(tmp_path / "one")
    write(tmp_path / "two")
    with pytest.raises(DataError, match="2 pairs"):
        yaib.read(tmp_path)
    (tmp_path / "one" / "dyn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        yaib.read(tmp_path / "one")


@pytest.mark.parametrize("kind", [pl.Float64, pl.Int16, pl.UInt64, pl.String, pl.Categorical])
def test_the_same_stay_in_two_types(tmp_path, kind):
    """Its age is found, and with it that nobody here is a child."""
    column = pl.col("stay_id").cast(pl.String).cast(kind)
    plain = prepare_icu("ards", "yaib", write(tmp_path / "eicu"), tmp_path / "a")
    meta = prepare_icu(
        "ards", "yaib", write(tmp_path / "odd" / "eicu", dyn(), sta().with_columns(column)), tmp_path / "b"
    )
    assert meta.stays == 40 and meta.split_hash == plain.split_hash
    assert load_icu(tmp_path / "b", "all").rows["age"].null_count() == 0


def test_tables_of_two_databases_are_refused(tmp_path):
    other = sta().with_columns(pl.format("ICU-{}", "stay_id").alias("stay_id"))
    with pytest.raises(DataError) as caught:
        prepare_icu("ards", "yaib", write(tmp_path / "eicu", None, other), tmp_path / "out")
    assert "no identifier of dyn.parquet is in sta.parquet: 0 of 40 are among its 40" in str(caught.value)
    assert "whole numbers of 1 to 2 digits, in sta.parquet text that begins with 'ICU-'" in str(caught.value)


def test_what_only_a_part_has_is_noted(tmp_path):
    ages = ["> 89", "17", "60", None, "old", "150", *["60"] * 32]
    few = sta(38).with_columns(age=pl.Series(ages), sex=pl.Series(["F ", "Male", "1", "2", "x", None] * 6 + ["m", "f"]))
    extra = pl.concat([few, few.head(1).with_columns(stay_id=pl.lit(900, pl.Int64))])
    meta = prepare_icu("ards", "yaib", write(tmp_path / "eicu", None, extra), tmp_path / "out")
    for note in (
        "stays without a row in sta.parquet (no age, no sex): 2",
        "stays of sta.parquet without a row in dyn.parquet: 1",
        "stays with an unreadable age, set missing: 1",
        "stays with an unreadable sex, set missing: 12",
        "stays of unknown age, counted as 18 years and older: 5",
    ):
        assert note in meta.notes
    assert meta.attrition[1] == {"step": "18 years and older, or of unknown age", "patients": 40, "stays": 40}
    assert meta.attrition[0]["stays"] == 41 and meta.out_of_range["age"] == 1
    assert load_icu(tmp_path / "out", "all").rows["age"].max() == pytest.approx(91.4)


def test_children_are_left_out_unless_the_label_says_otherwise(tmp_path):
    young = sta().with_columns(age=pl.when(pl.col("stay_id") % 2 == 0).then(17).otherwise(18))
    folder = write(tmp_path / "eicu", None, young)
    meta = prepare_icu("ards", "yaib", folder, tmp_path / "out")
    assert meta.attrition[1]["stays"] == 20 and meta.onsets["stays"] == 7  # of 14 in all
    assert meta.label["population"] == "18 years and older, or of unknown age"
    meta = prepare_icu("ards", "yaib", folder, tmp_path / "all", rule=label("ahrf", {"min_age": 0}))
    assert meta.attrition[1]["step"] == "at least one record" and meta.onsets["stays"] == 14
    with pytest.raises(DataError, match="empty after '90 years and older"):
        prepare_icu("ards", "yaib", folder, tmp_path / "none", rule=label("ahrf", {"min_age": 90}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.with_columns(pl.col("stay_id") + 0.5), "stay_id is empty or cannot be read in 1,600"),
        (lambda t: t.with_columns(stay_id=float("nan")), "stay_id is empty or cannot be read in 1,600"),
        (lambda t: t.with_columns(time=float("nan")), "time is empty or cannot be read in 1,600"),
    ],
)
def test_what_is_no_identifier_or_time(tmp_path, change, text):
    with pytest.raises(DataError, match=text):
        yaib.read(write(tmp_path / "eicu", change(dyn())))
