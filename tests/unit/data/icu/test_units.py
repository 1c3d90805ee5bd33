"""Units as hospitals write them."""

import polars as pl
import pytest

from raylab.data.icu.concepts import CONCEPTS, EVENTS, UNIT, factor, read_quantities
from raylab.data.icu.patient_batch import screen, units_of
from raylab.data.icu.units import conversion, parse

SAME = {
    "mg/dL": ["MG/DL", "mg/dl", "mg / dL", "mg%", "mg/100 mL", "mg/100ml", "mg.dL-1", "milligrams per deciliter"],
    "umol/L": [
        "µmol/L", "μmol/L", "UMOL/L", "umol / L", "mcmol/L", "micromol/l", "micromoles per litre", "µM", "uM",
        "Âµmol/L", "umol.L-1", "µmol L⁻¹", "umol{creatinine}/L",
    ],
    "K/uL": [
        "10*3/uL", "10^3/uL", "10**3/uL", "x10^3/uL", "x 10e3/uL", "10E3/uL", "10(3)/uL", "10³/µL", "k/µl", "K/mcL",
        "thou/uL", "Thousand/uL", "1000/uL", "10*9/L", "10^9/L", "10⁹/L", "x10(9)/L", "10*9{cells}/L", "/nL", "K/mm3",
        "10^3/mm^3", "10³/mm³", "K/cumm", "G/L", "Gpt/L", "Billion/L",
    ],
    "mmHg": ["mm[Hg]", "mm Hg", "MM HG", "torr", "mmHg"],
    "cmH2O": ["cm[H2O]", "cm H2O", "CMH2O", "cmH₂O", "cm H20", "cm of water"],
    "degC": ["Cel", "°C", "ºC", "℃", "C", "Deg. C", "deg C", "degrees C", "Celsius", "?C", "Â°C", "�C"],
    "degF": ["[degF]", "°F", "F", "Deg. F", "degrees Fahrenheit", "?F"],
    "lb": ["[lb_av]", "lbs", "lbs.", "pound", "Pounds", "LB"],
    "in": ["[in_i]", "inch", "Inches", '"'],
    "kg": ["KG", "kgs", "kilogram", "kilograms"],
    "1/min": ["/min", "min-1", "bpm", "BPM", "{beats}/min", "beats/min", "breaths/min",
              "insp/min", "breaths per minute"],
    "IU/L": ["U/L", "[iU]/L", "IU/l", "units/L", "mU/mL"],
    "ug/L": ["µg/L", "mcg/L", "ng/mL", "NG/ML", "micrograms/L", "ug/l"],
    "ng/L": ["pg/mL", "PG/ML"],
    "g/dL": ["gm/dl", "G/DL", "g%", "grams/dL", "g/100 mL"],
    "mmol/L": ["MMOL/L", "mM", "mmol / l", "mmol L-1", "umol/mL"],
    "L/min": ["lpm", "LPM", "l/min", "liters/min", "litres per minute"],
    "mL": ["cc", "ml", "ML", "milliliter"],
    "%": ["percent", "vol%", "PCT"],
}  # fmt: skip


@pytest.mark.parametrize("unit", SAME)
def test_spellings_of_one_unit(unit):
    wrong = {}
    for spelling in SAME[unit]:
        own = factor(CONCEPTS["wbc"], spelling) if unit == "K/uL" else conversion(spelling, unit)
        if own != (1.0, 0.0):
            wrong[spelling] = own
    assert not wrong


CONVERTED = [
    # concept, value as recorded, unit, in the concept's own
    ("pao2", 28, "kPa", 210.0),
    ("pao2", 280, "mbar", 210.0),
    ("paco2", 5.33, "kPa", 40.0),
    ("etco2", 53.3, "hPa", 40.0),
    ("map", 10, "kPa", 75.0),
    ("peep", 5, "mbar", 5.1),
    ("peep", 0.49, "kPa", 5.0),
    ("plateau", 22, "hPa", 22.4),
    ("peak_pressure", 22, "mm[Hg]", 29.9),
    ("temp", 98.6, "[degF]", 37.0),
    ("temp", 77, "°F", 25.0),
    ("temp", 113, "Deg. F", 45.0),
    ("temp", 310.15, "K", 37.0),
    ("weight", 180, "[lb_av]", 81.6),
    ("weight", 180, "pounds", 81.6),
    ("weight", 81600, "g", 81.6),
    ("weight", 2880, "oz", 81.6),
    ("height", 65, "[in_i]", 165.1),
    ("height", 1.65, "m", 165.0),
    ("height", 5.5, "ft", 167.6),
    ("height", 1650, "mm", 165.0),
    ("age", 730.5, "d", 2.0),
    ("tidal_volume", 0.45, "L", 450.0),
    ("minute_volume", 8000, "mL/min", 8.0),
    ("o2_flow", 1800, "L/h", 30.0),
    ("urine", 0.25, "L", 250.0),
    ("hct", 0.3, "L/L", 30.0),
    ("sao2", 0.97, "fraction", 97.0),
    ("hemoglobin", 87, "g/L", 8.7),
    ("hemoglobin", 8.7, "mmol/L", 14.0),
    ("hemoglobin", 14000, "mg/dL", 14.0),
    ("wbc", 8100, "/uL", 8.1),
    ("wbc", 8100, "cells/mm3", 8.1),
    ("platelets", 182_000, "#/uL", 182.0),
    ("na", 140, "mmol/L", 140.0),
    ("k", 15.64, "mg/dL", 4.0),
    ("hco3", 25, "mmol/l", 25.0),
    ("base_excess", -3, "mEq/L", -3.0),
    ("lactate", 18, "mg/dL", 2.0),
    ("lactate", 2, "mEq/L", 2.0),
    ("mg", 0.8, "mmol/L", 1.9),
    ("mg", 1.6, "mEq/L", 1.9),
    ("bun", 5, "mmol/L", 14.0),
    ("creatinine", 35, "µmol/L", 0.4),
    ("creatinine", 4, "mg/L", 0.4),
    ("creatinine", 0.0884, "mmol/L", 1.0),
    ("glucose", 5.5, "mmol/L", 99.0),
    ("glucose", 1, "g/L", 100.0),
    ("albumin", 35, "g/L", 3.5),
    ("albumin", 527, "µmol/L", 3.5),
    ("bilirubin", 17, "μmol/L", 1.0),
    ("bilirubin", 10, "mg/L", 1.0),
    ("cholesterol", 4, "mmol/L", 155.0),
    ("alt", 1, "µkat/L", 60.0),
    ("ast", 0.05, "U/mL", 50.0),
    ("troponin_t", 14, "ng/L", 0.014),
    ("troponin_t", 14, "pg/mL", 0.014),
    ("troponin_i", 0.7, "ng/ml", 0.7),
]


@pytest.mark.parametrize(("name", "value", "unit", "expected"), CONVERTED)
def test_conversions(name, value, unit, expected):
    scale, offset = factor(CONCEPTS[name], unit)
    assert (
        round(value * scale + offset, 3 if "troponin" in name else 0 if CONCEPTS[name].precision == 1 else 1)
        == expected
    )


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("pao2", "mg/dL"), ("pao2", "kPa/s"), ("pao2", "foo"), ("pao2", "arterial"), ("pao2", "1"), ("pao2", "%"),
        ("fio2", "mmHg"), ("fio2", "L/min"), ("hr", "mmHg"), ("hr", "1"), ("hemoglobin", "K/uL"), ("wbc", "g/dL"),
        ("wbc", "mmol/L"), ("troponin_t", "mmol/L"), ("temp", "kg"), ("temp", "deg"), ("weight", "cm"), ("weight", "#"),
        ("ph", "nmol/L"), ("ph", "mmHg"), ("creatinine", "umol"), ("creatinine", "mg/"), ("creatinine", "/"),
        ("creatinine", "?mol/L"), ("mech_vent", "hour"), ("sex", "kg"), ("gcs", "mmHg"), ("glucose", "mg/mmol"),
        ("lactate", "mg/dL/h"), ("urine", "mL/h"), ("tidal_volume", "mL/kg"), ("o2_flow", "L"), ("k", "m" * 10_000),
    ],
)  # fmt: skip
def test_what_cannot_be_read_or_is_of_something_else_has_no_conversion(name, unit):
    assert factor(CONCEPTS[name], unit) is None


@pytest.mark.parametrize(
    ("name", "unit"),
    [("ph", "units"), ("ph", "[pH]"), ("ph", "1"), ("gcs", "points"), ("gcs", "{score}"), ("fio2", "%"),
     ("fio2", "torr"), ("tidal_volume", "ml/B"), ("resp_rate_set", "Breath"), ("wbc", "G/L"),
     ("o2_flow", "L/M"), ("age", "a"), ("spo2", "%")],
)  # fmt: skip
def test_a_concepts_own_unit(name, unit):
    assert factor(CONCEPTS[name], unit) == (1.0, 0.0)


def test_every_concept_reads_its_own_unit():
    assert {name: factor(c, c.unit) for name, c in CONCEPTS.items()} == dict.fromkeys(CONCEPTS, (1.0, 0.0))
    assert {c.unit for c in CONCEPTS.values() if parse(c.unit) is None and not c.unit.startswith("1")} == set()


@pytest.mark.parametrize(
    ("concept", "unit", "text", "number", "unit_read"),
    [
        ("fio2", "", "50%", 50, "%"), ("fio2", "%", " 50 % ", 50, "%"), ("fio2", "", "0,5", 0.5, ""),
        ("fio2", "UNK", "60 pct", 60, "pct"), ("spo2", "", "97 %", 97, "%"), ("spo2", "%", "97", 97, "%"),
        ("ph", "", "7,4", 7.4, ""), ("pao2", "", "12.5 kPa", 12.5, "kPa"), ("pao2", "mmHg", "90 mm Hg", 90, "mmHg"),
        ("temp", "degF", "98.6 F", 98.6, "degF"), ("platelets", "", "1.234,5", 1234.5, ""), ("hr", "", "+.8e2", 80, ""),
    ],
)  # fmt: skip
def test_a_number_in_text_is_read_with_its_unit(concept, unit, text, number, unit_read):
    assert read_text(concept, unit, text) == (number, unit_read)


@pytest.mark.parametrize(
    ("concept", "unit", "text"),
    [
        *(("pao2", "mmHg", text) for text in ("<0.5", ">200", "5-10", "10/20", "ERROR", "", "90%", "12 kPa", "90 a")),
        ("fio2", "", "4 L"), ("fio2", "L/min", "50%"), ("temp", "degF", "37 C"), ("platelets", "", "1,234"),
        ("gcs", "", "10T"), ("hr", "", "8O"), ("hr", "", "inf"), ("hr", "", "nan"),
    ],
)  # fmt: skip
def test_text_whose_meaning_is_not_certain_is_no_number(concept, unit, text):
    assert read_text(concept, unit, text) == (None, None)


def read_text(concept: str, unit: str, text: str) -> tuple[float | None, str | None]:
    schema = {"concept": pl.String, UNIT: pl.String, "text": pl.String}
    read = read_quantities(pl.DataFrame([(concept, unit, text)], schema, orient="row"))
    number, unit_read = read.select("number", "unit_read").row(0)
    return number, unit_read if number is not None else None


def events(*rows: tuple[str, float, str | None]) -> pl.LazyFrame:
    """One value an hour, (concept, value, unit)."""
    table = [("p", "s", float(k), *row) for k, row in enumerate(rows)]
    return pl.LazyFrame(table, schema={**EVENTS, UNIT: pl.String}, orient="row")


def test_events_are_converted_by_their_unit_column():
    rows = [
        ("pao2", 28.0, "kPa"), ("pao2", 90.0, "mm Hg"), ("pao2", 91.0, ""), ("pao2", 92.0, None), ("pao2", 93.0, "UNK"),
        ("pao2", 94.0, "foo"), ("creatinine", 35.0, "µmol/L"), ("pao2", 94.0, None), ("nonsense", 1.0, "kPa"),
    ]  # fmt: skip
    _, unique = screen(events(*rows))
    rows = unique.sort("time").select("value", "unit_is", "problem").collect()
    assert rows["value"].round(2).to_list() == [210.02, 90, 91, 92, 93, None, 0.4, 94]
    assert rows["unit_is"].to_list() == ["converted", "own", "none", None, "none", "unknown", "converted", None]
    assert rows["problem"].to_list() == [*[None] * 5, "unknown unit", None, None]


def test_one_value_in_two_spellings_of_its_unit_is_one_record():
    rows = [
        ("p", "s", 1.0, "urine", 50.0, "mL"),
        ("p", "s", 1.0, "urine", 50.0, "ml"),
        ("p", "s", 1.0, "urine", 50.0, "cc"),
        ("p", "s", 1.0, "urine", 50.0, ""),
    ]
    _, unique = screen(pl.LazyFrame(rows, schema={**EVENTS, UNIT: pl.String}, orient="row"))
    assert unique.collect().height == 1
    rows = [("p", "s", 1.0, "temp", 98.6, "degF"), ("p", "s", 1.0, "temp", 37.0, "degC")]
    _, unique = screen(pl.LazyFrame(rows, schema={**EVENTS, UNIT: pl.String}, orient="row"))
    assert unique.collect()["value"].to_list() == [37.0]


def test_not_more_units_are_named_than_can_be_read():
    units = [("pao2", f"{'x' * 60} {k}", "unknown", 1) for k in range(30)]
    table = pl.DataFrame(units, schema=["concept", UNIT, "unit_is", "n"], orient="row")
    named = units_of(table.with_columns(unit=pl.lit("text ") + pl.int_range(30).cast(pl.String)), "unknown")["pao2"]
    assert len(named) == 11 and named["others"] == 20 and sum(named.values()) == 30
    assert units_of(table, "unknown") == {"pao2": {"x" * 40: 30}}


def test_a_unit_column_may_be_categorical_and_values_float32():
    kinds = {"unit": pl.Categorical, "value": pl.Float32}
    _, unique = screen(events(("pao2", 28.0, "kPa"), ("fio2", 0.21, "")).cast(kinds))
    rows = unique.sort("time").collect()
    assert rows["value"].round(2).to_list() == [210.02, 0.21] and rows["problem"].null_count() == 2
