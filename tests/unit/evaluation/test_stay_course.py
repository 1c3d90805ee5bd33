"""Courses of single stays: which predictions are explained, against what, and which readings they show."""

import numpy as np
import polars as pl
import pytest

from raylab.data.icu.dataset import IcuSamples
from raylab.data.icu.meta import IcuMeta
from raylab.evaluation.stay_course import Reading, Readings, courses, find_moments, rows_to_explain

SPEC = {
    "features": ["hr", "pf"], "static": ["age"], "hours": 2, "mean": [80.0, 300.0], "std": [10.0, 50.0],
    "static_mean": [60.0], "static_std": [10.0],
}  # fmt: skip
GRID = pl.DataFrame(
    {
        "stay_id": ["a"] * 8 + ["b"] * 8,
        "hour": list(range(8)) * 2,
        "hr": [90.0, None, None, 95.0, None, None, 99.0, None] + [None] * 8,
        "hr__mask": [True, False, False, True, False, False, True, False] + [False] * 8,
        "hr__since": [0.5, 1.5, 2.5, 0.25, None, None, 0.5, 1.5] + [None] * 8,  # unusable from hour 4 to 6
    },
    schema_overrides={"hr": pl.Float32, "hr__since": pl.Float32},
)


@pytest.fixture
def samples():
    rows = pl.DataFrame(
        {
            "stay_id": ["a"] * 6 + ["b"] * 2,
            "at_h": [2.0, 3, 4, 5, 6, 7, 2, 3],
            "onset_h": [7.5] * 6 + [None] * 2,
            "outcome": ["onset"] * 6 + ["no onset within the horizon"] * 2,
            "label": [0] * 8,
            "group": [0] * 6 + [1] * 2,
            "source": ["x"] * 8,
            "age": [None, *[61.0] * 5, 50.0, 50.0],
        }
    )
    x = np.zeros((2, 8, 7), dtype=np.float32)
    return IcuSamples(x, rows, SPEC, IcuMeta.model_construct(), [])


def test_alarms_are_compared_with_the_prediction_hours_before_and_else_the_highest_risk_is_shown():
    at, risk = np.arange(2.0, 9.0), np.array([0.1, 0.2, 0.1, 0.5, 0.6, 0.7, 0.6])
    alarm = np.array([False, True, False, False, False, True, False])
    assert list(find_moments(at, risk, alarm)) == [(1, 0), (5, 1)]
    assert list(find_moments(at, risk, np.zeros(7, dtype=bool))) == [(5, 1)]
    assert list(find_moments(at, risk, np.arange(7) == 0)) == [(0, None)]


def test_a_reading_is_the_latest_usable_one_before_the_prediction():
    readings = Readings(GRID.filter(pl.col("stay_id") == "a"), {"age": 61.0})
    assert readings.latest("hr", 3) == Reading(90.0, 0.5)
    assert readings.latest("hr", 4) == Reading(95.0, 3.75)
    assert readings.latest("hr", 5) == Reading(), "a record that cannot be used has ended the carry"
    assert readings.latest("pf", 5) == Reading() and readings.latest("age", 5) == Reading(61.0)
    assert {name: [*map(list, both)] for name, both in readings.series().items()} == {
        "hr": [[0.5, 3.75, 6.5], [90, 95, 99]]
    }


def test_the_course_of_a_stay(samples):
    p = np.array([0.1, 0.2, 0.3, 0.4, 0.8, 0.7, 0.3, 0.2])
    alarm = p >= 0.75
    ahead = np.array([True] * 6 + [False] * 2)
    explained = rows_to_explain(samples, p, alarm, ["b", "a"])
    assert explained.tolist() == [0, 4, 6]
    moved = {0: np.array([0.5, 0.0, 0.25]), 4: np.array([2.0, -1.0, 0.25]), 6: np.array([0.0, 0.0, -3.0])}
    b, a = courses(samples, p, alarm, ahead, ["b", "a"], GRID, moved)
    assert (a.stay_id, a.onset_h, a.lead_h, a.alarms.tolist()) == ("a", 7.5, 1.5, [6])
    (moment,) = a.moments
    assert (moment.at_h, moment.risk, moment.is_alarm) == (6, 0.8, True)
    assert (moment.before_h, moment.before_risk) == (2, 0.1)
    assert [(push.name, push.logit) for push in moment.pushes] == [("hr", 1.5), ("pf", -1.0), ("age", 0.0)]
    assert moment.pushes[0].before == Reading(90.0, 0.5) and moment.pushes[0].now == Reading()
    assert moment.others == 0
    assert (b.onset_h, b.lead_h, b.alarms.tolist(), b.readings, b.static) == (None, None, [], {}, {"age": 50.0})
    assert (b.moments[0].pushes[0].name, b.moments[0].pushes[0].logit) == ("age", -3.0)
    assert (b.moments[0].is_alarm, b.moments[0].before_h) == (False, None)
