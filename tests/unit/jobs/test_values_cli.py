"""Values through `raylab prepare ards`: room air, ratios of float32, units; what it prints, and exit code 2."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from jobs import cli
from raylab.data import prepared
from raylab.data.icu.labels import first_onset, label, ratios
from raylab.data.icu.patient_batch import screen
from raylab.data.icu.prepare import SOURCES, Raw

DAY = datetime(2130, 1, 1, 8)
STAYS = 30
SICK = 10  # of which every gas after 12 h shows P/F 129
GASES, OXYGEN = (1, 6, 11, 15, 20, 26), (0, 4, 8, 12, 16, 20, 24, 28)
WEANED = range(SICK, 2 * SICK)  # on room air from 12 h on, with a PaO2 of 90


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


def charts(weaned_pao2: float, room_air: float, sick: tuple[float, float]) -> list[tuple[int, float, str, float]]:
    """(stay, hour, pao2 or fio2, value): all on FiO2 .5 at first; at 12 h the sick get worse and others come off."""
    low_pao2, low_fio2 = sick
    rows = []
    for stay in range(STAYS):
        for hour in OXYGEN:
            later = low_fio2 if stay < SICK else room_air if stay in WEANED else 0.5
            rows.append((stay, float(hour), "fio2", later if hour >= 12 else 0.5))
        for hour in GASES:
            later = low_pao2 if stay < SICK else weaned_pao2 if stay in WEANED else 220.0
            rows.append((stay, float(hour), "pao2", later if hour > 12 else 220.0))
    return rows


def room_air(value: float) -> list[tuple[int, float, str, float]]:
    return charts(90.0, value, (90.0, 0.7))


Chart = Sequence[tuple[int, float, str, float]]
MEDS_CODES = {"pao2": "LAB//220224//mmHg", "fio2": "LAB//223835//UNK"}


def meds(
    folder: Path, rows: Chart, kind: pl.DataType | type[pl.DataType] = pl.Float32, codes: Mapping[str, str] = MEDS_CODES
) -> Path:
    table: list[tuple[int, datetime | None, str, float | None]] = []
    for stay in range(STAYS):
        begin = DAY + timedelta(days=3 * stay)
        table += [(stay, None, "GENDER//M", None), (stay, datetime(2070, 1, 1), "MEDS_BIRTH", None)]
        table += [(stay, begin, "ICU_ADMISSION//Medical", None), (stay, begin, "PROCEDURE//START//225792", None)]
        table += [(stay, begin + timedelta(hours=50), f"{code}", None) for code in
                  ("ICU_DISCHARGE//Medical", "PROCEDURE//END//225792")]  # fmt: skip
    for stay, hour, concept, value in rows:
        at = DAY + timedelta(days=3 * stay, hours=hour)
        table.append((stay, at, codes.get(concept, concept), value))
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": kind}
    (folder / "data").mkdir(parents=True)
    pl.DataFrame(table, schema=schema, orient="row").write_parquet(folder / "data" / "0.parquet")
    return folder


def mimic3(
    folder: Path, rows: Chart, items: Mapping[str, tuple[int, str]], kind: type[pl.DataType] = pl.Float64
) -> Path:
    """CareVue's or MetaVision's items are charted, laboratory's (50...) are arterial samples."""
    folder.mkdir(parents=True)
    stays, events, labs, procedures = [], [], [], []
    for stay in range(STAYS):
        begin = DAY + timedelta(days=3 * stay)
        stays.append((stay, stay, stay, "metavision", "MICU", begin, begin + timedelta(hours=50)))
        procedures.append((stay, stay, 225792, begin, begin + timedelta(hours=49), "FinishedRunning"))
    for stay, hour, concept, value in rows:
        at, (item, unit) = DAY + timedelta(days=3 * stay, hours=hour), items[concept]
        if item < 100_000 and item >= 50_000:
            labs += [(stay, item, at, f"{value}", value, unit), (stay, 50800, at, "ART", None, None)]
        else:
            events.append((stay, stay, item, at, f"{value}", value, unit, 0))
    tables: dict[str, tuple[list[tuple], str]] = {
        "ICUSTAYS": (stays, "SUBJECT_ID HADM_ID ICUSTAY_ID DBSOURCE FIRST_CAREUNIT INTIME OUTTIME"),
        "PATIENTS": ([(s, "M", datetime(2070, 1, 1)) for s in range(STAYS)], "SUBJECT_ID GENDER DOB"),
        "ADMISSIONS": ([(s, None, 0) for s in range(STAYS)], "HADM_ID DEATHTIME HOSPITAL_EXPIRE_FLAG"),
        "CHARTEVENTS": (events, "SUBJECT_ID ICUSTAY_ID ITEMID CHARTTIME VALUE VALUENUM VALUEUOM ERROR"),
        "LABEVENTS": (labs, "SUBJECT_ID ITEMID CHARTTIME VALUE VALUENUM VALUEUOM"),
        "PROCEDUREEVENTS_MV": (procedures, "SUBJECT_ID ICUSTAY_ID ITEMID STARTTIME ENDTIME STATUSDESCRIPTION"),
    }
    for name, (lines, columns) in tables.items():
        table = pl.DataFrame(lines or None, schema=columns.split(), orient="row", infer_schema_length=None)
        if "VALUENUM" in table.columns and lines:
            table = table.with_columns(pl.col("VALUENUM").cast(kind))
        table.write_parquet(folder / f"{name}.parquet")
    return folder


def yaib(folder: Path, rows: Chart, kind: type[pl.DataType] = pl.Float64) -> Path:
    folder.mkdir(parents=True)
    table = pl.DataFrame(rows, schema=["stay_id", "time", "concept", "value"], orient="row")
    wide = table.pivot("concept", index=["stay_id", "time"], values="value").rename({"pao2": "po2"})
    wide.with_columns(pl.col("po2", "fio2").cast(kind)).write_parquet(folder / "dyn.parquet")
    pl.DataFrame({"stay_id": range(STAYS), "age": [60.0] * STAYS}).write_parquet(folder / "sta.parquet")
    return folder


def physionet2012(folder: Path, rows: Chart) -> Path:
    (folder / "set-a").mkdir(parents=True)
    names = {"fio2": "FiO2", "pao2": "PaO2"}
    for stay in range(STAYS):
        lines = [(hour, f"{names[concept]},{value}") for s, hour, concept, value in rows if s == stay]
        lines += [(float(hour), "MechVent,1") for hour in range(0, 48, 4)]
        text = "".join(f"{int(hour):02}:00,{line}\n" for hour, line in sorted(lines))
        (folder / "set-a" / f"{stay + 1000}.txt").write_text(
            f"Time,Parameter,Value\n00:00,RecordID,{stay + 1000}\n{text}"
        )
    (folder / "Outcomes-a.txt").write_text(
        "RecordID,In-hospital_death\n" + "".join(f"{stay + 1000},0\n" for stay in range(STAYS))
    )
    return folder


def labelled(source: str, folder: Path, work: Path) -> tuple[int, pl.DataFrame]:
    """How many stays have an onset, and all P/F."""
    work.mkdir()
    extract = SOURCES[source](Raw(folder, work))
    rule = label("ahrf")
    rule = rule.without_ventilation() if "mech_vent" in extract.lacks else rule
    found = ratios(screen(extract.events)[1].collect().lazy(), rule).collect()
    return first_onset(found.lazy(), rule).collect().height, found


CAREVUE = {"fio2": (190, "torr"), "pao2": (779, "mmHg")}
METAVISION = {"fio2": (223835, ""), "pao2": (220224, "mmHg")}
LABORATORY = {"fio2": (50816, "%"), "pao2": (50821, "mm Hg")}
FORMS = {
    "MEDS float32": lambda folder, rows: ("meds", meds(folder, rows)),
    "MEDS float64": lambda folder, rows: ("meds", meds(folder, rows, pl.Float64)),
    "MIMIC-III CareVue": lambda folder, rows: ("mimic3", mimic3(folder, rows, CAREVUE)),
    "MIMIC-III CareVue float32": lambda folder, rows: ("mimic3", mimic3(folder, rows, CAREVUE, pl.Float32)),
    "MIMIC-III MetaVision": lambda folder, rows: ("mimic3", mimic3(folder, rows, METAVISION)),
    "MIMIC-III laboratory": lambda folder, rows: ("mimic3", mimic3(folder, rows, LABORATORY)),
    "YAIB float32": lambda folder, rows: ("yaib", yaib(folder, rows, pl.Float32)),
    "YAIB float64": lambda folder, rows: ("yaib", yaib(folder, rows)),
    "PhysioNet 2012": lambda folder, rows: ("physionet2012", physionet2012(folder, rows)),
}


@pytest.mark.parametrize("form", FORMS)
def test_room_air_is_21_percent_in_every_source(tmp_path, form):
    """Ten stays are sick; ten came off oxygen, with P/F 90 / .21 then at three gases."""
    found, weaned = {}, {}
    for value in (0.2, 0.209, 0.2095, 0.21, 20, 20.9, 20.95, 21):
        source, folder = FORMS[form](tmp_path / str(value), room_air(value))
        found[value], table = labelled(source, folder, tmp_path / f"work {value}")
        weaned[value] = table.filter(pl.col("ratio") == 428.6).height
    assert found == dict.fromkeys(found, SICK) and weaned == dict.fromkeys(found, 3 * len(WEANED))


@pytest.mark.parametrize("form", FORMS)
def test_a_ratio_of_exactly_300_is_an_onset_in_every_source(tmp_path, form):
    found = {}
    for hundredths in (35, 45, 65, 70, 90, 100):
        fio2 = hundredths / 100
        source, folder = FORMS[form](tmp_path / str(hundredths), charts(220.0, 0.5, (3 * hundredths, fio2)))
        found[fio2], _ = labelled(source, folder, tmp_path / f"work {hundredths}")
    assert found == dict.fromkeys(found, SICK)


@pytest.mark.parametrize("litres", [2, 6, 15, 19.9])
def test_litres_are_no_fio2_and_end_the_one_before(tmp_path, litres, capsys):
    folder = meds(tmp_path / "raw", room_air(litres))
    assert raylab("prepare", "ards", "--source", "meds", "--path", folder, "--out", tmp_path / "out") == 0
    assert prepared.read_meta(tmp_path / "out", "ards").onsets["stays"] == SICK
    assert "outside plausible range, set missing: fio2 50" in capsys.readouterr().out


def test_room_air_of_float32_through_the_command(tmp_path, capsys):
    folder = meds(tmp_path / "raw", room_air(20.9))
    assert raylab("prepare", "ards", "--source", "meds", "--path", folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "onsets at any time: stays 10," in said and "20 to 21 %, read as room air: fio2 50" in said
    assert "no unit given, the usual one taken: fio2 240" in said and "outside plausible range" not in said
    meta = prepared.read_meta(tmp_path / "out", "ards")
    assert meta.room_air == {"fio2": 50} and meta.out_of_range == {} and meta.percent == {"fio2": 50}


SI = {
    # code: (value, concept, its value)
    "LAB//50885//µmol/L": (17.0, "bilirubin", 1.0),
    "LAB//50912//μmol/L": (35.0, "creatinine", 0.4),
    "LAB//224639//[lb_av]": (180.0, "weight", 81.6),
    "LAB//51003//ng/L": (14.0, "troponin_t", 0.014),
    "LAB//51222//mmol/L": (8.7, "hemoglobin", 14.0),
    "LAB//50931//mmol/L": (5.5, "glucose", 99.1),
    "LAB//50813//mg/dL": (18.0, "lactate", 2.0),
    "LAB//51006//mmol/L": (5.0, "bun", 14.0),
    "LAB//51301//10*9/L": (8.1, "wbc", 8.1),
    "LAB//51265//x10^3/µL": (182.0, "platelets", 182.0),
    "LAB//220339//mbar": (5.0, "peep", 5.1),
    "LAB//223761//[degF]": (98.6, "temp", 37.0),
    "LAB//50862//g/L": (35.0, "albumin", 3.5),
    "LAB//220235//kPa": (5.33, "paco2", 40.0),
    "LAB//51221//L/L": (0.3, "hct", 30.0),
}


def test_units_of_the_international_system(tmp_path, capsys):
    """PaO2 in kPa: 28 is 210 mmHg, and P/F 300 on FiO2 .7."""
    rows = [(s, h, name, v / 7.5 if name == "pao2" else v) for s, h, name, v in charts(220.0, 0.5, (210.0, 0.7))]
    rows += [(stay, 3.0, code, value) for stay in range(STAYS) for code, (value, _, _) in SI.items()]
    folder = meds(tmp_path / "raw", rows, codes={**MEDS_CODES, "pao2": "LAB//220224//kPa"})
    assert raylab("prepare", "ards", "--source", "meds", "--path", folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "stays 10, after 6 h 10, after 12 h 10, mild 10" in said and "bilirubin 'µmol/L' 30" in said
    hours = pl.read_parquet(tmp_path / "out" / "hours.parquet").filter(pl.col("hour") == 3)
    found = {name: round(hours[name][0], 3 if name == "troponin_t" else 1) for _, name, _ in SI.values()}
    assert found == {name: value for _, name, value in SI.values()}


def test_a_unit_that_is_not_understood_is_set_missing_and_counted(tmp_path, capsys):
    rows = charts(220.0, 0.5, (90.0, 0.7))
    rows += [(stay, 3.0, code, 14.0) for stay in range(STAYS) for code in ("LAB//51222//foo", "LAB//50912//mmHg")]
    rows += [(0, h + 0.5, "LAB//220224//foo", 60.0) for h in (1.0, 2.0)]
    rows += [(1, 8.5, "LAB//223835//L/min", 6.0)]
    folder = meds(tmp_path / "raw", rows)
    assert raylab("prepare", "ards", "--source", "meds", "--path", folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert (
        "unit not understood, set missing: creatinine 'mmHg' 30, fio2 'L/min' 1, hemoglobin 'foo' 30, pao2 'foo' 2"
    ) in said
    meta = prepared.read_meta(tmp_path / "out", "ards")
    assert meta.unknown_units["pao2"] == {"foo": 2} and meta.onsets["stays"] == SICK
    assert {"creatinine", "hemoglobin"} <= set(meta.unmeasured)


@pytest.mark.parametrize(("concept", "code"), [("pao2", "LAB//220224//foo"), ("fio2", "LAB//223835//L/min")])
@pytest.mark.parametrize(("share", "code_of_exit"), [(0.04, 0), (0.07, 2)])
def test_too_many_of_a_concept_of_the_label_are_refused(tmp_path, capsys, concept, code, share, code_of_exit):
    rows = charts(220.0, 0.5, (90.0, 0.7))
    usable = sum(name == concept for _, _, name, _ in rows)
    other = round(usable * share / (1 - share))
    rows += [(k % STAYS, 30.0 + k // STAYS, code, 60.0) for k in range(other)]
    folder = meds(tmp_path / "raw", rows)
    words = ("prepare", "ards", "--source", "meds", "--path", folder, "--out", tmp_path / "out")
    assert raylab(*words) == code_of_exit
    said = capsys.readouterr()
    if code_of_exit:
        unit = code.rpartition("//")[2]
        assert f"{other} of {usable + other} values in '{unit}' ({other})" in said.err and concept in said.err
        assert "code=unit" in said.err and not (tmp_path / "out").exists()
    else:
        assert f"{concept} '" in said.out


def test_a_label_counts_only_what_it_reads(tmp_path):
    """PEEP of unknown unit stops the label that asks for PEEP, and no other."""
    rows = charts(220.0, 0.5, (90.0, 0.7))
    rows += [(stay, float(hour), "LAB//220339//foo", 8.0) for stay in range(STAYS) for hour in range(0, 40, 4)]
    words = ("prepare", "ards", "--source", "meds", "--path", meds(tmp_path / "raw", rows), "--out", tmp_path / "out")
    assert raylab(*words, "--label", "berlin-oxygenation") == 2
    assert raylab(*words) == 0


def test_the_given_cases(tmp_path, real_data):
    """The folders of the bug reports, where they are there."""
    cases = real_data.parent / "cases"
    expected = {
        "fio2-room-air/meds-float32-0.21": 10, "fio2-room-air/meds-float64-0.21-right": 10,
        "fio2-room-air/mimic3-percent-20": 10, "fio2-room-air/mimic3-percent-20.9": 10,
        "fio2-room-air/mimic3-percent-21-right": 10, "pf-300-float32/meds-float32": 15,
        "pf-300-float32/meds-float64-right": 15, "units-unknown/meds": 15, "units-unknown/meds-right": 15,
    }  # fmt: skip
    there = {name: n for name, n in expected.items() if (cases / name).is_dir()}
    if not there:
        pytest.skip(f"no cases at {cases}")
    for name, n in there.items():
        source, out = ("mimic3" if "mimic3" in name else "meds"), tmp_path / name.replace("/", "-")
        assert raylab("prepare", "ards", "--source", source, "--path", cases / name, "--out", out, "--quiet") == 0
        meta = prepared.read_meta(out, "ards")
        assert meta.onsets["stays"] == n and meta.onsets.get("mild", 0) == (5 if "pf-300" in name else 0), name
        if name == "units-unknown/meds":
            hours = pl.read_parquet(out / "hours.parquet").drop_nulls("bilirubin")
            values = hours.row(0, named=True)
            assert [round(values[x], 3) for x in ("bilirubin", "creatinine", "weight", "troponin_t")] == [
                0.994, 0.396, 81.647, 0.014
            ]  # fmt: skip
            assert meta.left_out == ["hemoglobin"] and meta.out_of_range["hemoglobin"] == 90
