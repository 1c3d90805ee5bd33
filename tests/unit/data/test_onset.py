"""Hand-worked patients: each is a list of (hour, concept, value), and when its onset is."""

import polars as pl
import pytest

from raylab.data.concepts import EVENTS
from raylab.data.icu import screen, ventilated_with_pf
from raylab.data.onset import Ahrf, first_onset, pf_ratios


def events(*rows: tuple[float, str, float]) -> pl.LazyFrame:
    table = [("p", "s", float(time), concept, float(value)) for time, concept, value in rows]
    return pl.LazyFrame(table, schema=EVENTS, orient="row")


def onset(*rows: tuple[float, str, float]) -> float | None:
    measured = screen(events(*rows))[1].drop_nulls("value")
    found = first_onset(pf_ratios(measured)).collect()
    return found["onset_h"][0] if found.height else None


VENT = (9, "mech_vent", 1)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([VENT, (9, "fio2", 0.5), (10, "pao2", 80)], 10, id="P/F 160"),
        pytest.param([VENT, (9, "fio2", 0.5), (10, "pao2", 150)], 10, id="P/F exactly 300"),
        pytest.param([VENT, (9, "fio2", 0.7), (10, "pao2", 210)], 10, id="P/F 300, though .7 is no binary fraction"),
        pytest.param([VENT, (9, "fio2", 0.5), (10, "pao2", 151)], None, id="P/F 302"),
        pytest.param([VENT, (9, "fio2", 40), (10, "pao2", 120)], 10, id="FiO2 as 40 percent"),
        pytest.param([VENT, (9, "fio2", 0.4), (10, "pao2", 120)], 10, id="FiO2 as .4"),
        pytest.param([VENT, (9, "fio2", 4), (10, "pao2", 80)], None, id="4 is litres"),
        pytest.param([VENT, (9, "fio2", 20), (10, "pao2", 80)], None, id="20 is litres still"),
        pytest.param([VENT, (9, "fio2", 0), (10, "pao2", 80)], None, id="FiO2 of zero"),
        pytest.param([VENT, (9, "fio2", 1), (10, "pao2", 250)], 10, id="1 is 100 percent"),
        pytest.param([VENT, (8, "fio2", 1), (9, "fio2", 4), (10, "pao2", 250)], 10, id="litres do not hide the last"),
        pytest.param([VENT, (2, "fio2", 0.5), (10, "pao2", 80)], 10, id="FiO2 exactly 8 h back"),
        pytest.param([VENT, (2.1, "fio2", 0.5), (10.1, "pao2", 80)], 10.1, id="8 h back in decimals"),
        pytest.param([VENT, (1.99, "fio2", 0.5), (10, "pao2", 80)], None, id="FiO2 over 8 h back"),
        pytest.param([VENT, (10.01, "fio2", 0.5), (10, "pao2", 80)], None, id="FiO2 after the gas"),
        pytest.param([VENT, (10, "fio2", 0.5), (10, "pao2", 80)], 10, id="FiO2 with the gas"),
        pytest.param([VENT, (3, "fio2", 0.5), (9, "fio2", 0.25), (10, "pao2", 100)], None, id="the latest FiO2 counts"),
        pytest.param([(4, "mech_vent", 1), (9, "fio2", 0.5), (10, "pao2", 80)], 10, id="ventilated exactly 6 h back"),
        pytest.param([(3.99, "mech_vent", 1), (9, "fio2", 0.5), (10, "pao2", 80)], None, id="over 6 h back"),
        pytest.param([(9, "fio2", 0.5), (10, "pao2", 80)], None, id="never ventilated"),
        pytest.param(
            [(8, "mech_vent", 1), (9, "mech_vent", 0), (9, "fio2", 0.5), (10, "pao2", 80)], None, id="extubated before"
        ),
        pytest.param([VENT, (9, "fio2", 0.5), (10, "pao2", 300), (12, "pao2", 90), (14, "pao2", 80)], 12, id="first"),
        pytest.param([VENT, (9, "fio2", 0.5), (10, "pao2", 90), (11, "pao2", 300)], 10, id="no persistence asked"),
        pytest.param([(12, "pao2", 80), (10, "pao2", 90), (9, "fio2", 0.5), VENT], 10, id="rows out of order"),
    ],
)
def test_onset(rows, expected):
    assert onset(*rows) == expected
    assert onset(*reversed(rows)) == expected


def test_one_stay_never_answers_for_another():
    rows = [("p", "a", 9.0, "fio2", 0.5), ("p", "a", 9.0, "mech_vent", 1.0), ("p", "b", 10.0, "pao2", 80.0)]
    assert pf_ratios(pl.LazyFrame(rows, schema=EVENTS, orient="row")).collect().is_empty()


def test_windows_are_parameters():
    rows = events((5, "mech_vent", 1), (5, "fio2", 0.5), (10, "pao2", 80))
    for rule, n in ((Ahrf(), 1), (Ahrf(fio2_back_h=4), 0), (Ahrf(vent_back_h=4), 0), (Ahrf(pf=100), 0)):
        assert first_onset(pf_ratios(rows, rule), rule).collect().height == n
    text = Ahrf(pf=200).describe(12, 24)
    assert "<= 200 mmHg" in text["onset"] and "36 h" in text["positive"] and "not adjudicated" in text["title"]


@pytest.mark.parametrize(
    ("rows", "member"),
    [
        pytest.param([(11, "mech_vent", 1), (10, "fio2", 0.4), (11, "pao2", 200)], True, id="ventilated, P/F 500"),
        pytest.param([(6, "mech_vent", 1), (10, "fio2", 0.4), (12, "pao2", 200)], True, id="both at the boundary"),
        pytest.param([(5.9, "mech_vent", 1), (10, "fio2", 0.4), (11, "pao2", 200)], False, id="ventilated long ago"),
        pytest.param([(11, "mech_vent", 1), (10, "fio2", 0.4), (12.1, "pao2", 200)], False, id="gas after landmark"),
        pytest.param([(11, "mech_vent", 1), (11, "pao2", 200)], False, id="no FiO2"),
        pytest.param(
            [(9, "mech_vent", 1), (11, "mech_vent", 0), (10, "fio2", 0.4), (10, "pao2", 200)], False, id="extubated"
        ),
    ],
)
def test_cohort_ventilated_with_pf(rows, member):
    table = events(*rows)
    assert ventilated_with_pf(table, pf_ratios(table), 12, Ahrf()).collect().height == member
