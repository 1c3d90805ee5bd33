"""Hand-worked patients: each is a list of (hour, concept, value), and when its onset is."""

import polars as pl
import pytest

from raylab.data.icu.cohorts import flags
from raylab.data.icu.concepts import EVENTS
from raylab.data.icu.labels import first_onset, label, ratios, sensitivity, severity
from raylab.data.icu.patient_batch import screen
from raylab.errors import UsageError


def events(*rows: tuple[float, str, float]) -> pl.LazyFrame:
    table = [("p", "s", float(time), concept, float(value)) for time, concept, value in rows]
    return pl.LazyFrame(table, schema=EVENTS, orient="row")


def onset(*rows: tuple[float, str, float], name: str = "ahrf", **settings: object) -> float | None:
    rule = label(name, settings)
    found = first_onset(ratios(screen(events(*rows))[1], rule), rule).collect()
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
        pytest.param([VENT, (9, "fio2", 19.9), (10, "pao2", 63)], None, id="19.9 is litres still"),
        pytest.param([VENT, (9, "fio2", 20), (10, "pao2", 63)], 10, id="20 is room air: P/F 300"),
        pytest.param([VENT, (9, "fio2", 20), (10, "pao2", 64)], None, id="20 is room air: P/F 304.8"),
        pytest.param([VENT, (9, "fio2", 0), (10, "pao2", 80)], None, id="FiO2 of zero"),
        pytest.param([VENT, (9, "fio2", 1), (10, "pao2", 250)], 10, id="1 is 100 percent"),
        pytest.param([VENT, (8, "fio2", 1), (9, "fio2", 4), (10, "pao2", 250)], None, id="litres end the carry"),
        pytest.param([VENT, (8, "fio2", 1), (9, "fio2", 0), (10, "pao2", 250)], None, id="so does a zero"),
        pytest.param([VENT, (8, "fio2", 1), (9, "fio2", float("nan")), (10, "pao2", 250)], None, id="and no number"),
        pytest.param(
            [VENT, (8, "fio2", 1), (9, "fio2", 4), (9.5, "fio2", 1), (10, "pao2", 250)], 10, id="until the next valid"
        ),
        pytest.param([VENT, (9, "fio2", 4), (9, "fio2", 1), (10, "pao2", 250)], 10, id="at one time the valid counts"),
        pytest.param([VENT, (9, "fio2", 1), (10, "fio2", 4), (9.5, "pao2", 250)], 9.5, id="litres after the gas"),
        pytest.param([VENT, (9.5, "mech_vent", 7), (9, "fio2", 0.5), (10, "pao2", 80)], None, id="ventilation of 7"),
        pytest.param([VENT, (9, "fio2", 0.5), (9.5, "pao2", 5), (10, "pao2", 80)], 10, id="a gas is not carried"),
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
    assert ratios(pl.LazyFrame(rows, schema=EVENTS, orient="row"), label("ahrf")).collect().is_empty()


def test_windows_are_parameters():
    rows = ((5, "mech_vent", 1), (5, "fio2", 0.5), (10, "pao2", 80))
    assert onset(*rows) == 10
    for settings in ({"fio2_back_h": 4}, {"vent_back_h": 4}, {"pf": 100}):
        assert onset(*rows, **settings) is None
    assert onset(*rows, vent_back_h=0, ventilation=None) == 10
    text = label("ahrf", {"pf": 200}).describe(12, 24)
    assert "<= 200 mmHg" in text["onset"] and "36 h" in text["positive"] and "not adjudicated" in text["title"]
    assert text["name"] == "ahrf" and text["version"] == 2


@pytest.mark.parametrize("settings", [{"pf": "low"}, {"persist_h": -1}, {"strict": 1}, {"ventilation": "some"}])
def test_wrong_windows_are_refused(settings):
    with pytest.raises(UsageError, match="cannot be"):
        label("ahrf", settings)


def test_wrong_names_print_the_right_ones():
    with pytest.raises(UsageError, match="berlin-oxygenation"):
        label("berlin")
    with pytest.raises(UsageError, match="fio2_back_h"):
        label("ahrf", {"fio2_back": 4})


PEEP = (9, "peep", 5)
LOW = [VENT, PEEP, (9, "fio2", 0.5), (10, "pao2", 100)]  # P/F 200 with PEEP 5


def later(hour: float, pao2: float = 100) -> list[tuple[float, str, float]]:
    """The same support and a gas at `hour`."""
    return [(hour - 1, "mech_vent", 1), (hour - 1, "peep", 5), (hour - 1, "fio2", 0.5), (hour, "pao2", pao2)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(LOW, None, id="one gas does not persist"),
        pytest.param([*LOW, *later(20)], 10, id="another 10 h later"),
        pytest.param([*LOW, *later(18)], None, id="another exactly 8 h later is too early"),
        pytest.param([*LOW, *later(18.01)], 10, id="another just over 8 h later"),
        pytest.param([*LOW, *later(34)], 10, id="another exactly 24 h later"),
        pytest.param([*LOW, *later(34.01)], None, id="another over 24 h later"),
        pytest.param([*LOW, *later(20, 151)], None, id="the later one is above 300"),
        pytest.param([*LOW, *later(20), *later(15, 200)], 10, id="better in between, not strict"),
        pytest.param(
            [VENT, (9, "peep", 4.9), *LOW[2:], *later(20)], None, id="PEEP 4.9: the later gas is first, alone"
        ),
        pytest.param([VENT, (2, "peep", 5), *LOW[2:], *later(20)], 10, id="PEEP exactly 8 h back"),
        pytest.param([VENT, (1.99, "peep", 5), *LOW[2:], *later(20)], None, id="PEEP over 8 h back"),
        pytest.param([VENT, PEEP, (9.5, "peep", 0), *LOW[2:], *later(20)], None, id="the latest PEEP counts"),
        pytest.param([VENT, PEEP, (9.5, "peep", 400), *LOW[2:], *later(20)], None, id="PEEP of 400 ends the carry"),
        pytest.param([(2, "mech_vent", 1), *LOW[1:], *later(20)], 10, id="ventilated exactly 8 h back"),
        pytest.param([(9, "niv", 1), *LOW[1:], *later(20)], None, id="non-invasive does not count"),
        pytest.param([VENT, PEEP, (9, "fio2", 0.5), (10, "spo2", 88), *later(20)], None, id="SpO2 does not count"),
    ],
)
def test_berlin_oxygenation(rows, expected):
    assert onset(*rows, name="berlin-oxygenation") == expected
    assert onset(*reversed(rows), name="berlin-oxygenation") == expected


def test_berlin_strict_and_without_persistence():
    rows = [*LOW, *later(15, 200), *later(20)]
    assert onset(*rows, name="berlin-oxygenation", strict=True) is None
    assert onset(*LOW, *later(20), name="berlin-oxygenation", strict=True) == 10
    assert onset(*LOW, name="berlin-oxygenation", persist_h=0) == 10
    assert onset(*LOW[:3], (10, "pao2", 150), name="berlin-oxygenation", persist_h=0) == 10  # P/F exactly 300
    assert onset(*LOW[:3], (10, "pao2", 150.1), name="berlin-oxygenation", persist_h=0) is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([*LOW], 10, id="P/F on PEEP 5, no persistence"),
        pytest.param([VENT, PEEP, (9, "fio2", 0.4), (10, "spo2", 97)], 10, id="SpO2 97: S/F 242.5"),
        pytest.param([VENT, PEEP, (9, "fio2", 0.4), (10, "spo2", 98)], None, id="SpO2 98 is on the flat part"),
        pytest.param([VENT, PEEP, (9, "fio2", 0.25), (10, "spo2", 78.75)], 10, id="S/F exactly 315"),
        pytest.param([VENT, PEEP, (9, "fio2", 0.25), (10, "spo2", 79)], None, id="S/F 316"),
        pytest.param([(9, "niv", 1), PEEP, (9, "fio2", 0.4), (10, "spo2", 90)], 10, id="non-invasive with PEEP 5"),
        pytest.param([(9, "niv", 1), (9, "peep", 4), (9, "fio2", 0.4), (10, "spo2", 90)], None, id="with PEEP 4"),
        pytest.param([(9, "niv", 0), PEEP, (9, "fio2", 0.4), (10, "spo2", 90)], None, id="mask taken off"),
        pytest.param([(9, "o2_flow", 30), (9, "fio2", 0.4), (10, "spo2", 90)], 10, id="flow exactly 30 L/min"),
        pytest.param([(9, "o2_flow", 29), (9, "fio2", 0.4), (10, "spo2", 90)], None, id="flow 29 L/min"),
        pytest.param(
            [(8, "o2_flow", 40), (9, "o2_flow", 300), (9, "fio2", 0.4), (10, "spo2", 90)], None, id="flow of 300"
        ),
        pytest.param([(8, "niv", 1), (9, "niv", 5), PEEP, (9, "fio2", 0.4), (10, "spo2", 90)], None, id="mask of 5"),
        pytest.param([(9, "fio2", 0.4), (10, "spo2", 90)], None, id="no support"),
    ],
)
def test_global_2023(rows, expected):
    assert onset(*rows, name="global-2023") == expected


def test_global_2023_where_resources_are_limited():
    rows = [(9, "fio2", 0.4), (10, "spo2", 90)]
    assert onset(*rows, name="global-2023", ventilation=None, peep=None, flow=None) == 10


@pytest.mark.parametrize(
    ("pao2", "expected"), [(150, "mild"), (100.5, "mild"), (100, "moderate"), (50.5, "moderate"), (50, "severe")]
)
def test_severity_at_onset(pao2, expected):
    rule = label("ahrf")
    table = events(VENT, (9, "fio2", 0.5), (10, "pao2", pao2))
    found = ratios(table, rule)
    assert severity(found, first_onset(found, rule)).collect()["severity"].to_list() == [expected]


def test_sensitivity_is_a_grid_of_the_same_label():
    rules = sensitivity(label("berlin-oxygenation"))
    assert [(rule.fio2_back_h, rule.persist_h) for rule in rules] == [(f, p) for f in (2, 4, 8) for p in (0, 8, 24)]
    assert {rule.peep for rule in rules} == {5}


@pytest.mark.parametrize(
    ("rows", "member"),
    [
        pytest.param([(11, "mech_vent", 1), (10, "fio2", 0.4), (11, "pao2", 200)], True, id="ventilated, P/F 500"),
        pytest.param([(6, "mech_vent", 1), (10, "fio2", 0.4), (12, "pao2", 200)], True, id="both at the boundary"),
        pytest.param([(5.9, "mech_vent", 1), (10, "fio2", 0.4), (11, "pao2", 200)], False, id="ventilated long ago"),
        pytest.param([(11, "mech_vent", 1), (10, "fio2", 0.4), (12.1, "pao2", 200)], False, id="gas after landmark"),
        pytest.param([(11, "mech_vent", 1), (11, "pao2", 200)], False, id="no FiO2"),
        pytest.param([(11, "mech_vent", 1), (9, "fio2", 0.4), (10, "fio2", 4), (11, "pao2", 200)], False, id="litres"),
        pytest.param(
            [(10, "mech_vent", 1), (11, "mech_vent", 9), (9, "fio2", 0.4), (10, "pao2", 200)], False, id="no such state"
        ),
        pytest.param(
            [(9, "mech_vent", 1), (11, "mech_vent", 0), (10, "fio2", 0.4), (10, "pao2", 200)], False, id="extubated"
        ),
    ],
)
def test_cohort_ventilated_with_pf(rows, member):
    table = screen(events(*rows))[1]
    at = flags(pl.DataFrame({"stay_id": ["s"], "at_h": [12.0]}), table, ratios(table, label("ahrf")), label("ahrf"))
    assert at["ventilated_pf"].to_list() == [member]
    assert member == (at["ventilated"][0] and at["gas"][0])
