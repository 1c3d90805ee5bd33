"""New patients: the same inputs as a prepared directory gives, and a reason where there must be no prediction."""

import numpy as np
import polars as pl
import pytest

from raylab.data.icu.dataset import load_icu
from raylab.data.icu.labels import LABELS, label, restore_label
from raylab.data.icu.new_patients import check_events, read_new_patients
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import synthetic
from raylab.errors import DataError, UsageError
from raylab.tasks import mortality

AHRF = label("ahrf")


@pytest.fixture(scope="module")
def events():
    """Of the patients of `ards_data`."""
    return synthetic.read(200, 0).events.collect()


@pytest.fixture(scope="module")
def test_split(ards_data):
    return load_icu(ards_data, "test")


def read(frame, spec, rule=AHRF, cohort="all", fill="mask"):
    return read_new_patients(frame, spec, rule, cohort, fill)


def batch(samples, ids=None):
    order = range(len(samples)) if ids is None else [samples.rows["stay_id"].to_list().index(stay) for stay in ids]
    return samples.batch(np.array(list(order))).numpy()


def stay(*records, stay_id="a"):
    """A stay with records (concept, hours, value)."""
    columns = {"stay_id": [stay_id] * len(records), "time": [float(time) for _, time, _ in records]}
    return pl.DataFrame({**columns, "concept": [name for name, _, _ in records], "value": [v for _, _, v in records]})


def reasons(new):
    return dict(new.rows.select("stay_id", "reason").iter_rows())


@pytest.mark.parametrize("fill", ["mask", "forward"])
def test_the_inputs_are_those_of_the_prepared_directory(events, test_split, ards_data, fill):
    """In any order of the events; and known at the landmark, when the later ones have not happened yet."""
    spec, ids = test_split.spec, test_split.ids.tolist()
    expected = batch(load_icu(ards_data, "test", fill=fill))
    mine = events.filter(pl.col("stay_id").is_in(ids)).drop("subject_id")
    for frame in (mine, mine.sample(fraction=1, shuffle=True, seed=1), mine.filter(pl.col("time") < 12)):
        new = read(frame, spec, fill=fill)
        assert new.rows["reason"].null_count() == len(ids) == len(new.inputs)
        assert np.array_equal(batch(new.inputs, ids), expected)


def test_the_inputs_of_every_hour_are_those_of_the_prepared_directory(events, tmp_path):
    out = tmp_path / "rolling"
    prepare_icu("ards", "synthetic", None, out, patients=200, framing="rolling", until=20)
    samples = load_icu(out, "test")
    assert samples.spec["until_h"] == 20
    new = read(events.filter(pl.col("stay_id").is_in(samples.ids.tolist())), samples.spec)
    mine = new.inputs.rows.select("stay_id", "at_h").with_row_index("here")
    place = samples.rows.select("stay_id", "at_h").join(mine, ["stay_id", "at_h"], "left")["here"]
    assert place.null_count() == 0 and new.rows["at_h"].max() == 20
    assert np.array_equal(new.inputs.batch(place.to_numpy(writable=True)).numpy(), batch(samples))


def test_no_prediction_sees_what_is_recorded_at_it_or_later(events, test_split):
    """Not even whether there will be any: SpO2 here begins after 20 h, and so do records of the static values."""
    spec = {**test_split.spec, "framing": "rolling", "until_h": 48}
    late = pl.col("concept").is_in(["spo2", *spec["static"]])
    mine = events.filter(pl.col("stay_id").is_in(test_split.ids.tolist()[:20])).drop("subject_id")
    mine = mine.with_columns(time=pl.when(late & (pl.col("time") < 20)).then(20.5).otherwise("time"))
    mine = mine.with_columns(concept=pl.when(pl.col("concept") == "pao2").then(pl.lit("ph")).otherwise("concept"))
    everything = read(mine, spec).inputs
    for hour in (13, 20, 21, 30):
        rows = everything.rows.with_row_index("here").filter(pl.col("at_h") == hour)
        seen = read(mine.filter(pl.col("time") < hour), spec).inputs
        then = seen.rows.with_row_index("there").join(rows, ["stay_id", "at_h"], maintain_order="right")
        assert then.height == rows.height > 10
        now = everything.batch(rows["here"].to_numpy(writable=True))
        assert np.array_equal(now.numpy(), seen.batch(then["there"].to_numpy(writable=True)).numpy())
        static = now[:, :, 3 * len(spec["features"]) :]
        assert bool(static.any()) == (hour > 20)
        sf = now[:, :, len(spec["features"]) + spec["features"].index("sf")]
        assert hour > 20 or sf.any()  # of SaO2


def test_a_rolling_prediction_reaches_the_hour_in_which_the_records_end(test_split):
    spec = {**test_split.spec, "framing": "rolling", "until_h": 48}
    new = read(stay(("hr", 1, 80.0), ("hr", 14.2, 90.0)), spec)
    assert new.rows["at_h"].to_list() == [12, 13, 14, 15] and new.rows["last_h"].to_list() == [1, 1, 1, 14.2]


def test_without_oxygenation_and_vital_signs_there_is_no_prediction(test_split):
    frame = pl.concat(
        [
            stay(("creatinine", 3, 1.0), ("hr", 12.5, 80.0), ("spo2", 3, 300.0), stay_id="laboratory"),
            stay(("hr", 3, 80.0), stay_id="pulse"),
            stay(("pao2", 3, 80.0), stay_id="gas"),
        ]
    )
    said = reasons(read(frame, test_split.spec))
    assert said["pulse"] is None and said["gas"] is None
    assert said["laboratory"].startswith("too little input: no usable value of pao2, sao2, spo2, hr, map")
    assert read(frame.filter(stay_id="laboratory"), test_split.spec).inputs is None
    assert read(stay(("hr", -1, 80.0)), test_split.spec).inputs is None


def test_what_is_absent_is_listed_for_each_stay_and_for_all(test_split):
    new = read(stay(("hr", 3, 80.0), ("pao2", 4, 80.0), ("fio2", 4, 0.4)), test_split.spec)
    names = {*test_split.spec["features"], *test_split.spec["static"]}
    assert set(new.rows["absent"][0]) == set(new.missing) == names - {"hr", "pao2", "fio2", "pf"}


def test_a_patient_who_meets_the_criteria_is_not_predicted(test_split):
    """P/F 140: on a ventilator the label's criteria are met; without one it is what the model must see."""
    gas = [("pao2", 5, 70.0), ("fio2", 5, 0.5)]
    said = reasons(read(pl.concat([stay(*gas), stay(*gas, ("mech_vent", 4, 1.0), stay_id="b")]), test_split.spec))
    assert said == {"a": None, "b": "the criteria of the label 'ahrf' are met already"}
    after = stay(("hr", 1, 80.0), ("pao2", 13, 70.0), ("fio2", 13, 0.5), ("mech_vent", 13, 1.0))
    assert reasons(read(after, test_split.spec)) == {"a": None}


def test_a_ratio_that_may_persist_is_no_certainty_yet(test_split):
    low = [("pao2", 10, 70.0), ("fio2", 10, 0.5), ("mech_vent", 10, 1.0), ("peep", 10, 8.0)]
    berlin = label("berlin-oxygenation")
    assert "whether that persists" in reasons(read(stay(*low), test_split.spec, berlin))["a"]
    followed = stay(*low, *((name, time + 10, value) for name, time, value in low))
    assert "are met already" in reasons(read(followed, test_split.spec, berlin))["a"]
    assert reasons(read(stay(*low, ("hr", 40, 80.0)), test_split.spec, berlin)) == {"a": None}


def test_the_model_is_for_the_patients_that_it_was_trained_on(test_split):
    frame = pl.concat(
        [
            stay(("hr", 1, 80.0), ("age", 0, 12.0), stay_id="child"),
            stay(("hr", 1, 80.0), ("mech_vent", 10, 1.0), stay_id="ventilated"),
            stay(("hr", 1, 80.0), stay_id="unknown"),
        ]
    )
    new = read(frame, test_split.spec, cohort="ventilated")
    said = reasons(new)
    assert said["child"].startswith("younger than 18 years") and said["ventilated"] is None
    assert said["unknown"].startswith("outside of the cohort 'ventilated'") and new.of_unknown_age == 2


def test_units_and_text_are_read_as_in_prepare(test_split):
    plain = stay(("temp", 1, 37.0), ("fio2", 1, 0.5), ("sex", 0, 1.0), ("age", 0, 91.4))
    text = stay(("temp", 1, "98.6 F"), ("fio2", 1, "50%"), ("sex", 0, "male"), ("age", 0, "> 89"), ("hr", 1, "n/a"))
    units = stay(("temp", 1, 98.6), ("fio2", 1, 50.0), ("sex", 0, 1.0), ("age", 0, 91.4)).with_columns(
        unit=pl.Series(["F", "%", None, None])
    )
    expected = batch(read(plain, test_split.spec).inputs)
    new = read(text, test_split.spec)
    assert np.array_equal(batch(new.inputs), expected) and new.totals.by_problem()["unreadable"] == {"hr": 1}
    assert new.totals.by_problem()["no_unit"] == {}, "without a column of units there is none to miss"
    assert new.totals.units()["converted"] == {"temp": {"F": 1}}
    assert np.array_equal(batch(read(units, test_split.spec).inputs), expected)


def test_what_is_dropped_or_doubtful_is_counted(test_split):
    new = read(
        stay(("hr", -1, 80.0), *[("hr", 1, 80.0)] * 2, ("heart", 1, 80.0), ("pao2", 2, 20.0), ("map", 1, None)),
        test_split.spec,
    )
    assert new.incomplete == 1
    assert new.totals.dropped() == {"negative time": 1, "exact duplicate": 1} and new.unknown_concepts == {"heart": 1}
    assert new.doubts[0].startswith("pao2: 1 of 1 values are 30 mmHg or less, as values in kPa are")
    assert new.doubts[1].startswith("without fio2, mech_vent it cannot be checked")


def test_values_in_another_unit_are_refused_or_left_out(test_split):
    kilopascal = stay(*(("pao2", hour / 10, 11.0) for hour in range(40)), ("hr", 1, 80.0))
    with pytest.raises(DataError, match=r"pao2.*cannot be in the concept's unit"):
        read(kilopascal, test_split.spec)
    fahrenheit = stay(*(("temp", k / 10, 98.6 if k < 30 else 40.0) for k in range(40)), ("hr", 1, 80.0))
    new = read(fahrenheit, test_split.spec)
    assert list(new.left_out) == ["temp"] and "temp" in new.missing and reasons(new) == {"a": None}
    low = stay(*(("pao2", k / 10, 20.0) for k in range(40)), ("fio2", 0, 0.5), ("hr", 1, 80.0))
    new = read(low, test_split.spec, mortality.LABELS["in-hospital-death"])
    assert list(new.left_out) == ["pao2"] and {"pao2", "pf"} <= set(new.missing), "nor what is derived from it"
    with pytest.raises(DataError, match="in unknown units"):
        read(stay(("pao2", 1, 80.0), ("hr", 1, 80.0)).with_columns(unit=pl.lit("bushel")), test_split.spec)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (stay(("hr", 1, 80.0)).drop("time"), "no column time"),
        (stay(("hr", 1, 80.0)).with_columns(units=pl.lit("F")), "not used: units"),
        (
            stay(("hr", 1, 80.0)).with_columns(time=pl.lit("2026-01-01").str.to_date()),
            "time of the events has type Date",
        ),
        (stay(("hr", 1, 80.0)).with_columns(time=pl.lit(float("nan"))), "1 of 1 events have a time that is not finite"),
        (stay(("hr", 1, 80.0)).with_columns(stay_id=pl.lit(None, pl.String)), "without a stay_id"),
        (stay(("heartrate", 1, 80.0)), "no concept that raylab knows"),
        (stay(("hr", 1, 80.0)).clear(), "the events have no rows"),
        (
            pl.concat([stay(("hr", t, 80.0)) for t in (1, 2)]).with_columns(subject_id=pl.Series([1, 2])),
            "several patients",
        ),
        ({"stay_id": [1]}, "cannot be read from a dict"),
    ],
    ids=str,
)
def test_a_frame_that_is_not_of_events_is_refused(frame, said):
    with pytest.raises(DataError, match=said):
        check_events(frame)


def test_a_label_is_restored_from_its_description():
    rule = label("ahrf", {"persist_h": 8, "min_age": 16})
    assert restore_label(rule.describe(12, 24), LABELS) == rule
    with pytest.raises(UsageError, match="ahrf"):
        restore_label({"name": "ahrff"})
