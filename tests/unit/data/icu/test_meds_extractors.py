"""The mappings that ship for public MEDS extractors, on codes as those write them."""

import re
from datetime import datetime, timedelta
from math import isnan
from pathlib import Path

import polars as pl
import pytest

from raylab.data.icu.concepts import CONCEPTS, SourceData, to_own_units
from raylab.data.icu.sources import meds
from raylab.errors import DataError, UsageError

ADMITTED = datetime(2015, 12, 29, 10)


def at(hours: float) -> datetime:
    return ADMITTED + timedelta(hours=hours)


def read(tmp_path: Path, mapping: str | Path, *rows: tuple, columns: tuple[str, ...] = ()) -> SourceData:
    kinds = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    schema = {**kinds, **dict.fromkeys(columns, pl.String)}
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    padded = [(*row, *[None] * (len(schema) - len(row))) for row in rows]
    pl.DataFrame(padded, schema=schema, orient="row").write_parquet(folder / "0.parquet")
    return meds.read(tmp_path / "set", tmp_path / "work", Path(mapping))


def values(data: SourceData, concept: str) -> list[tuple]:
    events = data.events.filter(pl.col("concept") == concept).collect().sort("stay_id", "time")
    return events.select("stay_id", "time", "value").rows()


def own(data: SourceData) -> dict[tuple[str, float], tuple[float, str]]:
    """(concept, time) -> (value in the concept's unit, what became of the unit)."""
    rows = to_own_units(data.events).filter(pl.col("time") > 0).collect()
    return {(c, t): (v, u) for c, t, v, u in rows.select("concept", "time", "value", "unit_is").iter_rows()}


TREATED = "TREATMENT//ENTERED//pulmonary|ventilation and oxygenation|"
EICU = [
    (7, None, "GENDER//Female"),
    (7, at(0) - timedelta(days=20000), "MEDS_BIRTH"),
    (7, at(-3), "HOSPITAL_ADMISSION//Emergency Department//Midwest//f//100 - 249"),
    (7, at(0), "ICU_ADMISSION//Emergency Department//admit"),
    (7, at(0), "ICU_ADMISSION_HEIGHT", 170.0),
    (7, at(0), "ICU_ADMISSION_WEIGHT", 80.0),
    (7, at(40), "ICU_DISCHARGE//Alive//Step-Down Unit (SDU)"),
    (7, at(90), "HOSPITAL_DISCHARGE//Expired//Death"),
    (7, at(90), "MEDS_DEATH"),
]


def test_eicu(tmp_path):
    gas = (("paO2", "mm Hg", 70.0), ("FiO2", "%", 60.0), ("PEEP", "cm H2O", 8.0), ("TV", "mls", 420.0))
    data = read(
        tmp_path,
        "eicu",
        *EICU,
        *((7, at(2), f"LAB//RESULT//{name}//{unit}", value) for name, unit, value in gas),
        (7, at(2), "LAB//SPECIMEN_DRAWN//paO2//mm Hg"),
        (7, at(3), "VITALS//PERIODIC//HEARTRATE", 90.0),
        (7, at(3), "VITALS//PERIODIC//TEMPERATURE", 37.5),
        (7, at(3), "VITALS//APERIODIC//BP//NONINVASIVE_MEAN", 71.0),
        (7, at(4), "LAB//RESULT//creatinine//umol/L", 88.4),
        (7, at(4), "LAB//RESULT//lactate//furlong", 2.0),
        (7, at(5), f"{TREATED}mechanical ventilation|volume controlled"),
        (7, at(6), f"{TREATED}mechanical ventilation|non-invasive ventilation|face mask"),
        (7, at(6), "LAB//RESULT//PEEP//cm H2O", 5.0),
        (7, at(7), f"{TREATED}oxygen therapy"),
        (7, at(50), "VITALS//PERIODIC//HEARTRATE", 99.0),
        (8, at(1), "ICU_ADMISSION//Floor//stepdown/other"),
    )  # fmt: skip
    stay = data.stays.filter(pl.col("subject_id") == "7").select("source", "died", "end_h", "end", "period")
    assert stay.rows() == [("eicu", True, 40, "discharge", "2015")]
    read_as = own(data)
    assert (
        read_as["creatinine", 4] == (pytest.approx(1, abs=1e-4), "converted") and read_as["lactate", 4][1] == "unknown"
    )
    assert read_as["fio2", 2][1] == "own" and read_as["tidal_volume", 2] == (420, "own")
    assert values(data, "hr") == [("7-1", 3, 90)] and values(data, "nimap") == [("7-1", 3, 71)]
    assert values(data, "sex") == [("7-1", 0, 0)] and round(values(data, "age")[0][2]) == 55
    assert values(data, "height") == [("7-1", 0, 170)]
    assert values(data, "mech_vent") == [("7-1", 2, 1), ("7-1", 5, 1), ("7-1", 6, 0)]
    assert values(data, "niv") == [("7-1", 2, 0), ("7-1", 5, 0), ("7-1", 6, 1)]
    assert data.lacks == () and data.numbering == "eicu"
    # the specimen, the oxygen therapy and the hospital's admission mean nothing here
    assert "rows of 3 codes that the mapping does not name, not used: 3" in data.notes
    (absent,) = [note for note in data.notes if note.startswith("codes of the mapping that no row has")]
    assert "VITALS//PERIODIC//BP//SYSTEMIC_MEAN" in absent


def test_units_that_hand_over_in_one_minute(tmp_path):
    edges = [
        (0, "ICU_ADMISSION//a//admit"), (5, "ICU_DISCHARGE//Alive//b"), (5, "ICU_ADMISSION//b//transfer"),
        (9, "ICU_DISCHARGE//Alive//c"), (20, "ICU_ADMISSION//c//readmit"), (20, "ICU_DISCHARGE//Alive//d"),
    ]  # fmt: skip
    data = read(tmp_path, "eicu", *((7, at(hour), code) for hour, code in edges),
                (7, at(6), "VITALS//PERIODIC//HEARTRATE", 80.0))  # fmt: skip
    assert data.stays["end_h"].to_list() == [5, 4, 0]
    assert values(data, "hr") == [("7-2", 1, 80)]


def hirid(*rows: tuple, death: bool = False) -> list[tuple]:
    return [
        (7, None, "SEX//M"),
        (7, at(0) - timedelta(days=23741), "MEDS_BIRTH"),
        (7, at(0), "HOSPITAL_ADMISSION"),
        *rows,
        (7, at(48), "HOSPITAL_DISCHARGE"),
        *([(7, at(48), "MEDS_DEATH")] if death else []),
    ]


@pytest.mark.parametrize("death", [True, False])
def test_hirid(tmp_path, death):
    def observed(hour: float, name: str, unit: str, value: float | None) -> tuple:
        return 7, at(hour), f"OBSERVATION//{name}//{unit}", value

    data = read(
        tmp_path,
        "hirid",
        *hirid(
            observed(1, "Heart rate", "/min", 88.0),
            observed(2, "Oxygen [Partial pressure] in Arterial blood", "mmHg", 75.0),
            observed(2, "Inspired oxygen concentration", "%", 50.0),
            observed(2, "Positive end expiratory pressure setting", "cmH2O", 0.0),  # not ventilated
            observed(3, "Positive end expiratory pressure setting", "cmH2O", 7.0),
            observed(3, "Creatinine [Moles/volume] in Blood", "umol/l", 88.4),
            observed(3, "Hemoglobin [Mass/volume] in Arterial blood", "g/L", 95.0),
            observed(3, "Troponin T.cardiac [Mass/volume] in Serum or Plasma", "ng/l", 14.0),
            observed(3, "Urea [Moles/volume] in Venous blood", "mmol/l", 10.0),
            observed(3, "Core body temperature", "°C", 38.0),
            observed(3, "Platelets [#/volume] in Blood", "G/l", 150.0),
            observed(4, "Glasgow Coma Score eye opening subscore", "UNK", 4.0),
            observed(4, "Glasgow Coma Score verbal response subscore", "UNK", 5.0),
            observed(4, "Glasgow Coma Score motor response subscore", "UNK", 6.0),
            observed(5, "Lactate [Mass/volume] in Arterial blood", "mmol/l", None),
            observed(6, "Hourly urine volume", "ml/h", 60.0),
            (7, at(1), "MEDICATION//Noradrenalin", 0.1),
            death=death,
        ),
    )
    assert data.stays.select("died", "end_h", "end", "period").rows() == [
        (death, 48, "death" if death else "discharge", None)
    ]
    read_as = own(data)
    assert read_as["creatinine", 3] == (pytest.approx(1, abs=1e-4), "converted")
    assert read_as["hemoglobin", 3] == (9.5, "converted")
    assert read_as["troponin_t", 3] == (pytest.approx(0.014), "converted")
    assert read_as["bun", 3] == (pytest.approx(28.014), "converted")
    assert read_as["platelets", 3] == (150, "own") and read_as["temp", 3] == (38, "own")
    assert values(data, "gcs") == [("7-1", 4, 15)] and values(data, "mech_vent") == [("7-1", 3, 1)]
    assert isnan(values(data, "lactate")[0][2]) and values(data, "urine") == []
    assert "rows of 2 codes that the mapping does not name, not used: 2" in data.notes


def test_omop(tmp_path):
    rows = [
        (7, None, "GENDER//Male"),
        (7, at(0) - timedelta(days=20000), "MEDS_BIRTH"),
        (7, at(-10), "Visit//9201//start"),
        (7, at(0), "Visit//32037//start"),
        *((7, at(1), f"LOINC//{code}", value, unit) for code, value, unit in (
            ("2703-7", 10.0, "44777602.0"), ("3150-0", 0.5, "0"), ("2160-0", 1.0, "8840"), ("8310-5", 98.6, "9289"),
            ("20077-4", 8.0, "44777590"), ("777-3", 200.0, None), ("8867-4", 90.0, "8541"), ("6598-7", 14.0, "1234"),
        )),
        (7, at(1), "LOINC//99999-9", 1.0, "8840"),
        (7, at(30), "Visit//32037//end"),
        (7, at(100), "Visit//9201//end"),
        (7, at(101), "MEDS_DEATH"),
    ]  # fmt: skip
    data = read(tmp_path, "omop", *rows, columns=("unit",))
    assert data.stays.select("died", "end_h", "end", "period").rows() == [(True, 30, "discharge", "2015")]
    read_as = own(data)
    assert read_as["creatinine", 1] == (1, "own") and read_as["temp", 1] == (pytest.approx(37), "converted")
    assert read_as["platelets", 1] == (200, "none") and read_as["fio2", 1] == (0.5, "none")
    assert read_as["pao2", 1] == (pytest.approx(75.0062, rel=1e-5), "converted")  # kPa
    assert read_as["troponin_t", 1] == (14, "unknown")  # a unit_concept_id that the mapping does not know
    assert values(data, "mech_vent") == [("7-1", 1, 1)]


@pytest.mark.parametrize("name", list(meds.MAPPINGS))
def test_every_shipped_mapping_is_sound(name):
    by = meds.read_mapping(Path(name))
    assert {"pao2", "fio2", "peep", "mech_vent", "spo2", "hr", "creatinine"} <= by.makes()
    for code, unit in by.units.items():
        assert unit is None or CONCEPTS[by.concepts[code]].unit
    file = meds.MAPPINGS[name]
    assert file.read_text().startswith("#") and "PyPI" in file.read_text().partition("[")[0]  # says whose codes
    codes = [code for codes in by.stay.values() for code in codes] + list(by.concepts)
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        pytest.param("hirid", r"no ICU stay.*HOSPITAL_ADMISSION.*mapping of hirid", id="no code of a stay"),
        pytest.param(
            "mimic4", r"none of its 10 codes is a value that the mapping of mimic-iv-meds knows", id="no value"
        ),
    ],
)
def test_a_mapping_of_another_extractor_fails_with_both_kinds_of_codes(tmp_path, mapping, text):
    rows = [row for row in EICU if not row[2].startswith("HOSPITAL_ADM")]
    rows += [(7, at(2), "LAB//RESULT//paO2//mm Hg", 70.0), (7, at(2), "VITALS//PERIODIC//HEARTRATE", 70.0)]
    if mapping == "hirid":
        rows.append((7, at(2), "OBSERVATION//Heart rate//1/min", 70.0))
    with pytest.raises(DataError) as caught:
        read(tmp_path, mapping, *rows)
    shown = " ".join(map(str, (caught.value.what, caught.value.why, caught.value.do)))
    assert re.search(text, shown), shown
    assert "--mapping" in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('source = "x"\n[stay]\nbegin = "A"\n[concepts]\nhr = ["B"]\nmap = ["B"]', "'B' is hr and map"),
        ('source = "x"\n[stay]\nbegin = "A"\n[ventilation]\nsettings = ["pep"]', "unknown pep"),
        ('source = "x"\n[stay]\nbegin = "A"\n[ventilation]\nmask = ["B"]', "ventilation.mask"),
        ('source = "x"\n[stay]\nbegin = 3', "stay.begin"),
        ('source = "x"\n[stay]\nend = "A"', "stay.begin"),
    ],
)
def test_a_mapping_that_contradicts_itself_is_refused(tmp_path, text, said):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        meds.read_mapping(file)
    assert said in f"{caught.value.what} {caught.value.why}"


def test_a_mapping_that_is_not_there_names_those_that_ship(tmp_path):
    with pytest.raises(UsageError) as caught:
        meds.read_mapping(tmp_path / "eicus")
    assert "mimic4, eicu, hirid, omop" in str(caught.value.do)


def test_what_a_mapping_cannot_make_is_said_to_lack(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('source = "x"\n[concepts]\nhr = ["PULSE"]\n[stay]\nbegin = ["IN", "IN2"]\nend = "OUT"\n')
    data = read(tmp_path, file, (1, at(0), "IN2//x"), (1, at(1), "PULSE", 80.0), (1, at(2), "OUT"))
    assert data.lacks == ("mech_vent", "niv", "peep")
    assert data.stays["died"].to_list() == [None]  # nothing says who died
