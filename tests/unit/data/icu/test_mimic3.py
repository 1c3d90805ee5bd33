import gzip
from math import isnan
from pathlib import Path

import polars as pl
import pytest

from jobs.fit import source_gases
from raylab.data.icu.concepts import to_own_units
from raylab.data.icu.labels import label
from raylab.data.icu.patient_batch import screen
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import mimic3, tables
from raylab.errors import DataError

TABLES = {
    "ICUSTAYS": "subject_id,hadm_id,icustay_id,dbsource,first_careunit,intime,outtime",
    "PATIENTS": "subject_id,gender,dob",
    "ADMISSIONS": "subject_id,hadm_id,deathtime,hospital_expire_flag",
    "CHARTEVENTS": "subject_id,icustay_id,itemid,charttime,value,valuenum,valueuom,error",
    "LABEVENTS": "subject_id,itemid,charttime,value,valuenum,valueuom",
    "PROCEDUREEVENTS_MV": "subject_id,icustay_id,itemid,starttime,endtime,statusdescription",
}
DAY = "2150-01-01"
ROWS: dict[str, list[str]] = {
    "ICUSTAYS": [f"1,10,100,carevue,MICU,{DAY} 00:00:00,{DAY} 20:00:00", f"2,20,200,metavision,CSRU,{DAY} 00:00:00,"],
    "PATIENTS": ["1,M,2100-01-01 00:00:00", "2,F,1850-01-01 00:00:00"],
    "ADMISSIONS": [f"1,10,{DAY} 20:00:00,1", "2,20,,0"],
    "CHARTEVENTS": [],
    "LABEVENTS": [],
    "PROCEDUREEVENTS_MV": [],
}


def write(folder: Path, upper: bool = True, packed: bool = False, **more: list[str]) -> Path:
    folder.mkdir(parents=True)
    for name, head in TABLES.items():
        lines = [head.upper() if upper else head, *ROWS[name], *more.get(name, [])]
        text = "\n".join(lines) + "\n"
        file = folder / ((name if upper else name.lower()) + (".csv.gz" if packed else ".csv"))
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    return folder


def chart(
    item: int, hour: float, value: object, unit: str = "", stay: object = 100, subject: object = 1, error: str = ""
) -> str:
    number = value if isinstance(value, int | float) else ""
    return f'{subject},{stay},{item},{at(hour)},"{value}",{number},{unit},{error}'


def lab(item: int, hour: float, value: object, unit: str = "", subject: int = 1) -> str:
    return f"{subject},{item},{at(hour)},{value},{value if isinstance(value, int | float) else ''},{unit}"


def at(hour: float) -> str:
    return f"{DAY} {int(hour):02}:{round(hour % 1 * 60):02}:00"


def read(tmp_path: Path, **more: list[str]) -> tuple[object, pl.DataFrame]:
    extract = mimic3.read(write(tmp_path / "raw", **more), tmp_path / "work")
    return extract, extract.events.collect()


def values(events: pl.DataFrame, concept: str) -> list[tuple]:
    return events.filter(pl.col("concept") == concept).sort("stay_id", "time").select("stay_id", "time", "value").rows()


@pytest.mark.parametrize(("upper", "packed"), [(True, True), (False, False)])
def test_letter_case_and_compression_do_not_matter(tmp_path, upper, packed):
    more = {"CHARTEVENTS": [chart(211, 1, 80, "BPM")]}
    extract = mimic3.read(write(tmp_path / "raw", upper, packed, **more), tmp_path / "work")
    events = extract.events.collect()
    assert values(events, "hr") == [("100", 1, 80)]
    assert values(events, "age") == [("100", 0, 50), ("200", 0, 91.4)]  # over 89: recorded as 300 years
    assert values(events, "icu_type") == [("100", 0, 3), ("200", 0, 2)] and values(events, "sex")[0][2] == 1
    columns = ("subject_id", "stay_id", "died", "end_h", "end", "period")
    assert extract.stays.select(columns).rows() == [
        ("1", "100", True, 20, "death", "2001-2008"),
        ("2", "200", False, None, None, "2008-2012"),
    ]


def test_units_errors_and_windows(tmp_path):
    extract, events = read(
        tmp_path,
        CHARTEVENTS=[
            chart(678, 1, 98.6, "Deg. F"),
            chart(211, 2, 90, "BPM", error="1"),
            chart(211, 21, 95, "BPM"),  # after the stay
            chart(223761, 3, 98.6, "?F", stay=200, subject=2),
            *(chart(item, 4, v, stay=200, subject=2) for item, v in ((220739, 4), (223900, 5), (223901, 6))),
            '1,,211,2150-01-01 05:00:00,"70",70,BPM,',  # no stay named: by its time
        ],
    )
    temperatures = to_own_units(events.lazy()).filter(pl.col("concept") == "temp").collect()
    assert temperatures["value"].round(3).to_list() == [37, 37]
    assert values(events, "hr") == [("100", 5, 70)]
    assert values(events, "gcs") == [("200", 4, 15)]
    assert extract.counts == {"marked as an error": 1}


def test_a_number_in_the_text_is_read_where_valuenum_is_empty(tmp_path):
    extract, events = read(
        tmp_path,
        CHARTEVENTS=[
            chart(190, 1, "50%"), chart(190, 2, "60 %", "%"), chart(190, 3, "<50"), chart(190, 4, "4 L"),
            chart(190, 5, "0,7"), chart(190, 6, "0.8"),
            chart(779, 1, "12.5 kPa"), chart(779, 2, ">200"), chart(646, 1, "97%"), chart(646, 2, "97 mmHg"),
        ],
        LABEVENTS=[lab(50816, 7, "100%")],
    )  # fmt: skip
    fio2 = values(events, "fio2")
    assert [time for _, time, value in fio2 if isnan(value)] == [3, 4]
    assert [value for _, _, value in fio2 if not isnan(value)] == [50, 60, 0.7, 0.8, 100]
    _, screened = screen(events.lazy())
    usable = screened.drop_nulls("value").collect()
    assert [value for *_, value in values(usable, "fio2")] == [0.5, 0.6, 0.7, 0.8, 1]
    assert values(usable, "pao2") == [("100", 1, pytest.approx(93.757773))]
    assert values(usable, "spo2") == [("100", 1, 97)]
    said = "{}: values read from text such as 50% or 7,4, where VALUENUM is empty: {}".format
    assert [note for note in extract.notes if "text" in note] == [said("CHARTEVENTS", 5), said("LABEVENTS", 1)]


def test_laboratory_gases_are_arterial(tmp_path):
    _, events = read(
        tmp_path,
        LABEVENTS=[
            lab(50800, 1, "ART"), lab(50821, 1, 90, "mm Hg"), lab(50820, 1, 7.4, "units"),
            lab(50800, 2, "VEN"), lab(50821, 2, 40, "mm Hg"),
            lab(50821, 3, 60, "mm Hg"),  # no specimen row
            lab(50816, 3, 50, "%"), lab(50912, 3, 1.1, "mg/dL"),
        ],
    )  # fmt: skip
    assert values(events, "pao2") == [("100", 1, 90)]
    assert values(events, "ph") == [("100", 1, 7.4)]
    assert values(events, "fio2") == [("100", 3, 50)] and values(events, "creatinine") == [("100", 3, 1.1)]


@pytest.mark.parametrize(
    ("rows", "invasive", "mask"),
    [
        pytest.param([(720, "Assist Control")], 1, 0, id="a mode"),
        pytest.param([(720, "Other/Remarks")], None, None, id="no mode"),
        pytest.param([(506, 5)], 1, 0, id="PEEP set"),
        pytest.param([(682, 0)], None, None, id="tidal volume of zero"),
        pytest.param([(543, 22)], 1, 0, id="plateau pressure"),
        pytest.param([(467, "Nasal Cannula")], 0, 0, id="nasal cannula"),
        pytest.param([(467, "None")], None, None, id="no device named"),
        pytest.param([(467, "Bipap Mask"), (506, 5)], 0, 1, id="PEEP of a mask is not invasive"),
        pytest.param([(467, "Nasal Cannula"), (506, 5)], 1, 0, id="a setting outweighs a cannula"),
        pytest.param([(190, 0.5)], None, None, id="FiO2 alone says nothing"),
    ],
)
def test_carevue_rule(tmp_path, rows, invasive, mask):
    _, events = read(tmp_path, CHARTEVENTS=[chart(item, 3, value) for item, value in rows])
    assert values(events, "mech_vent") == ([] if invasive is None else [("100", 3, invasive)])
    assert values(events, "niv") == ([] if mask is None else [("100", 3, mask)])


def test_metavision_procedures(tmp_path):
    def procedure(item: int, begin: float, end: float, status: str = "FinishedRunning") -> str:
        return f"2,200,{item},{at(begin)},{at(end)},{status}"

    _, events = read(
        tmp_path,
        CHARTEVENTS=[chart(220045, 15, 80, "bpm", stay=200, subject=2)],
        PROCEDUREEVENTS_MV=[
            procedure(225792, 2, 3.5),
            procedure(225792, 8, 10, "Rewritten"),
            procedure(225794, 5, 6),
        ],
    )
    # the stay has no end: an episode within it is charted as it is
    assert values(events, "mech_vent") == [("200", 2, 1), ("200", 3, 1), ("200", 3.5, 0)]
    assert values(events, "niv") == [("200", 5, 1), ("200", 6, 0)]


def test_stays_that_overlap_are_cut_and_counted(tmp_path):
    extract, events = read(
        tmp_path,
        ICUSTAYS=[f"1,10,101,carevue,MICU,{DAY} 10:00:00,{DAY} 23:00:00"],
        LABEVENTS=[lab(50912, 9, 1.0, "mg/dL"), lab(50912, 11, 2.0, "mg/dL")],
    )
    assert extract.counts["stays cut where they overlap"] == 1
    assert values(events, "creatinine") == [("100", 9, 1), ("101", 1, 2)]


def test_pieces_hold_whole_patients(tmp_path, monkeypatch):
    more = {
        "ICUSTAYS": [f"{i},{i},{i},carevue,MICU,{DAY} 00:00:00,{DAY} 20:00:00" for i in range(3, 60)],
        "PATIENTS": [f"{i},M,2100-01-01 00:00:00" for i in range(3, 60)],
        "ADMISSIONS": [f"{i},{i},,0" for i in range(3, 60)],
        "CHARTEVENTS": [chart(211, h, 60 + i, "BPM", i, i) for i in range(3, 60) for h in range(4)],
    }
    folder = write(tmp_path / "raw", **more)
    one = mimic3.read(folder, tmp_path / "one")
    monkeypatch.setattr(tables, "PIECE", 2000)
    monkeypatch.setattr(tables, "CHUNK", 1000)  # lines are cut in the middle
    many = mimic3.read(folder, tmp_path / "many")
    assert len(one.parts()) == 1 and len(many.parts()) > 3
    order = ["stay_id", "time", "concept"]
    assert one.events.collect().sort(order).equals(many.events.collect().sort(order))
    frames = [part.collect() for part in many.parts()]
    assert sum(frame["subject_id"].n_unique() for frame in frames) == 59
    assert all(set(frame["concept"]) >= {"hr", "age"} for frame in frames if frame.height > 8)


def test_quoted_line_breaks_do_not_cut_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "CHUNK", 64)
    odd = f'1,100,211,{at(1)},"two\nlines, ""quoted""",71,BPM,'
    _, events = read(tmp_path, CHARTEVENTS=[odd, chart(211, 2, 72, "BPM")])
    assert values(events, "hr") == [("100", 1, 71), ("100", 2, 72)]


@pytest.mark.parametrize(
    ("table", "rows", "text"),
    [
        ("CHARTEVENTS", ["1,100,211,soon,80,80,BPM,"], r"CHARTEVENTS\.csv: column charttime is not a date in 1 of 1"),
        ("CHARTEVENTS", [",100,211,2150-01-01 01:00:00,80,80,BPM,"], "column subject_id is empty in 1 of 1"),
        ("CHARTEVENTS", [chart(211, 1, 8), "1,100,x,2150-01-01 01:00:00,8,8,BPM,"], "itemid is not a whole number"),
        ("LABEVENTS", ["1,50912,2150-01-01 01:00:00,high,high,mg/dL"], "column valuenum is not a number in 1 of 1"),
        ("ICUSTAYS", ["1,10,100,carevue,MICU,2150-01-01 05:00:00,"], "share their icustay_id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_table_column_and_rows(tmp_path, table, rows, text):
    with pytest.raises(DataError, match=text):
        read(tmp_path, **{table: rows})


def floats(rows: list[str], *columns: int) -> list[str]:
    """The rows with whole numbers as pandas writes them where a column has gaps."""
    split = [row.split(",") for row in rows]
    return [",".join(f"{v}.0" if at in columns and v else v for at, v in enumerate(row)) for row in split]


def test_identifiers_as_floats_meet_whole_numbers(tmp_path):
    """The same events, whatever the writer made of subject, stay and item."""
    rows = [chart(211, 1, 80, "BPM"), f"1,,211,{at(5)},70,70,BPM,0"]
    labs = [lab(50912, 3, 1.1, "mg/dL")]
    _, plain = read(tmp_path / "a", CHARTEVENTS=rows, LABEVENTS=labs)
    _, odd = read(tmp_path / "b", CHARTEVENTS=floats(rows, 0, 1, 2, 7), LABEVENTS=floats(labs, 0, 1))
    assert odd.sort("time", "concept").equals(plain.sort("time", "concept")) and len(values(odd, "hr")) == 2
    folder = write(tmp_path / "c", CHARTEVENTS=rows, LABEVENTS=labs)
    for name, kind in (("CHARTEVENTS", pl.Float64), ("LABEVENTS", pl.Float32), ("ICUSTAYS", pl.UInt16)):
        table = pl.read_csv(folder / f"{name}.csv")
        ids = [column for column in table.columns if column.lower().endswith("_id") or column.lower() == "itemid"]
        table.with_columns(pl.col(ids).cast(kind)).write_parquet(folder / f"{name}.parquet")
        (folder / f"{name}.csv").unlink()
    typed = mimic3.read(folder, tmp_path / "work").events.collect()
    assert typed.sort("time", "concept").equals(plain.sort("time", "concept"))


@pytest.mark.parametrize(
    ("table", "rows", "text"),
    [
        ("CHARTEVENTS", [chart(211, 1, 80, stay="ICU-9", subject="P-9")], "icustay_id is not a whole number in 1 of 1"),
        ("CHARTEVENTS", [f"1.5,100,211,{at(1)},80,80,,"], r"subject_id is not a whole number .* \(first: in line 2\)"),
        ("CHARTEVENTS", [chart(211, 1, 80, stay=900, subject=9)], "no identifier of CHARTEVENTS is in ICUSTAYS"),
        ("CHARTEVENTS", [chart(211, 1, 80, stay=900)], "no identifier of CHARTEVENTS is in ICUSTAYS"),
        ("LABEVENTS", [lab(50912, 1, 1, subject=9)], "no identifier of LABEVENTS is in ICUSTAYS"),
        ("PROCEDUREEVENTS_MV", [f"2,999,225792,{at(1)},{at(2)},"], "of PROCEDUREEVENTS_MV is in ICUSTAYS"),
        ("CHARTEVENTS", [f"1,100,211,{at(1)},80,\"1,234\",,"], r"valuenum is not a number .*'1,234' in line 2"),
        ("CHARTEVENTS", [f"1,100,211,{at(1)}Z,80,80,,"], "dates with and without a time zone: with one in CHARTEVENTS"),
        ("CHARTEVENTS", ["1,100,211,01/02/2150 10:00,80,80,,"], r"not a date .*'01/02/2150 10:00' in line 2"),
        ("CHARTEVENTS", [f"1,100,211,{at(1)},8,\"36,6\",,", f"1,100,211,{at(2)},8,36.6,,"], "with decimal commas and"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused(tmp_path, table, rows, text):
    with pytest.raises(DataError, match=text) as caught:
        read(tmp_path, **{table: rows})
    assert "1.5" not in str(caught.value) and "ICU-9" not in str(caught.value)  # no patient in a message


def test_rows_of_other_stays_are_counted(tmp_path):
    extract, events = read(
        tmp_path,
        CHARTEVENTS=[
            chart(211, 1, 80),
            chart(211, 2, 90, stay=999),
            chart(211, 3, 95, stay=200),
            chart(211, 4, 99, stay=9, subject=9),
        ],
        LABEVENTS=[lab(50912, 1, 1.0), lab(50912, 1, 2.0, subject=9)],
        ICUSTAYS=[f"5,50,500,metavision,WARD,{DAY} 00:00:00,"],
        PATIENTS=["7,X,2100-01-01"],
    )  # fmt: skip
    assert values(events, "hr") == [("100", 1, 80)] and values(events, "creatinine") == [("100", 1, 1)]
    assert extract.counts == {
        "CHARTEVENTS: rows of patients without a stay": 1,
        "CHARTEVENTS: rows that name a stay which the patient does not have": 2,
        "LABEVENTS: rows of patients without a stay": 1,
    }
    assert "stays without a row in PATIENTS (no age and sex): 1" in extract.notes
    assert "stays without a row in ADMISSIONS (no outcome): 1" in extract.notes
    assert "stays with an unknown first_careunit (no icu_type): 1" in extract.notes


def test_patients_of_another_release_are_refused(tmp_path):
    folder = write(tmp_path / "raw")
    (folder / "PATIENTS.csv").write_text("subject_id,gender,dob\n8,M,2100-01-01\n")
    with pytest.raises(DataError, match="no identifier of ICUSTAYS is in PATIENTS: 0 of 2 are among its 1"):
        mimic3.read(folder, tmp_path / "work")


def test_sexes_in_words(tmp_path):
    people = ["3,Male,", "4,F ,2100-01-01", "5,Unknown,2100-01-01"]
    stays = [f"{n},{n}0,{n}00,carevue,MICU,{DAY} 00:00:00," for n in (3, 4, 5)]
    extract, events = read(tmp_path, PATIENTS=people, ICUSTAYS=stays)
    assert [v for _, _, v in values(events, "sex")] == [1, 0, 1, 0]
    assert [v for _, _, v in values(events, "age")] == [50, 91.4, 50, 50]  # stay 300 has none
    assert "stays with an unreadable sex, set missing: 1" in extract.notes


def test_latin_1_semicolons_decimal_commas_and_windows_line_ends(tmp_path):
    rows = [chart(678, 1, "x", "\u00b0F").replace('"x",,', '"x";98,6;').replace(",", ";").replace("98;6", "98,6")]
    folder = write(tmp_path / "raw")
    text = "\r\n".join(["\ufeff" + TABLES["CHARTEVENTS"].replace(",", ";"), *rows, ""])
    (folder / "CHARTEVENTS.csv").write_bytes(b"\xef\xbb\xbf" + text[1:].encode("latin-1"))
    extract = mimic3.read(folder, tmp_path / "work")
    assert [round(v, 3) for _, _, v in values(to_own_units(extract.events).collect(), "temp")] == [37]
    assert "CHARTEVENTS.csv: column valuenum has decimal commas" in extract.notes
    assert "lines of CHARTEVENTS.csv that are not UTF-8, read as Windows-1252: 1" in extract.notes


def test_rows_that_nobody_asks_for_may_hold_anything(tmp_path):
    odd = [",,999999,never,,NaN,,", f"nan,1.5,999999,{at(1)},x,1e999,,"]
    _, events = read(tmp_path, CHARTEVENTS=[chart(211, 1, 80), *odd, f"1,100,211,{at(2)},,NaN,,"])
    assert values(events, "hr") == [("100", 1, 80)]


def test_dates_with_zones_everywhere(tmp_path):
    folder = write(tmp_path / "raw", CHARTEVENTS=[chart(211, 1.5, 80)])
    for file in folder.iterdir():
        zone = {"ICUSTAYS": "+01:00", "CHARTEVENTS": "+02:00"}.get(file.stem, "Z")
        lines = [line.split(",") for line in file.read_text().splitlines()]
        file.write_text("\n".join(",".join(f"{v}{zone}" if v.endswith(":00") else v for v in line) for line in lines))
    extract = mimic3.read(folder, tmp_path / "work")
    assert values(extract.events.collect(), "hr") == [("100", 0.5, 80)]
    assert any("the time of day is UTC's" in note for note in extract.notes)


def test_what_is_recorded_and_cannot_be_used_is_kept_as_that(tmp_path):
    extract, events = read(
        tmp_path,
        CHARTEVENTS=[
            chart(211, 1, 80, "mmHg"),  # a unit of something else
            '1,100,211,2150-01-01 02:00:00,"ERROR",,BPM,',
            '1,100,211,2150-01-01 03:00:00,"85",,BPM,',  # the number stands in VALUE alone
            "1,100,211,2150-01-01 04:00:00,,,BPM,",  # nothing charted
            chart(678, 5, 37, "Deg. C"),  # an item of degrees Fahrenheit
            chart(676, 6, 37),
            chart(506, 7, "No data", "cmH2O"),
        ],
        LABEVENTS=[lab(51003, 8, "<0.01", "ng/mL"), lab(51003, 9, 14, "ng/L")],
    )
    _, unique = screen(events.lazy())
    rows = unique.sort("time").filter(pl.col("time") > 0).select("time", "concept", "value", "problem").collect()
    assert rows.rows() == [
        (1, "hr", None, "unknown unit"),
        (2, "hr", None, "unreadable"),
        (3, "hr", 85, None),
        (5, "temp", None, "unknown unit"),
        (6, "temp", 37, None),
        (7, "peep", None, "unreadable"),
        (8, "troponin_t", None, "unreadable"),
        (9, "troponin_t", 0.014, None),
    ]
    assert extract.counts == {"without a value": 1}
    assert values(events, "mech_vent") == []  # "No data" is no setting of a ventilator


def test_missing_tables_and_columns(tmp_path):
    with pytest.raises(DataError, match="no directory"):
        mimic3.read(tmp_path / "absent", tmp_path / "work")
    folder = write(tmp_path / "raw")
    (folder / "LABEVENTS.csv").rename(folder / "labs.csv")
    with pytest.raises(DataError, match="no table LABEVENTS"):
        mimic3.read(folder, tmp_path / "work")
    (folder / "labs.csv").rename(folder / "LabEvents.csv")
    (folder / "CHARTEVENTS.csv").write_text("SUBJECT_ID,ITEMID\n1,2\n")
    with pytest.raises(DataError, match="no column icustay_id, charttime, value"):
        mimic3.read(folder, tmp_path / "work")
    (folder / "CHARTEVENTS.csv").unlink()
    (folder / "CHARTEVENTS.csv.gz").write_bytes(gzip.compress(TABLES["CHARTEVENTS"].encode() * 100)[:-20])
    with pytest.raises(DataError, match="damaged or truncated"):
        mimic3.read(folder, tmp_path / "work")
    (folder / "chartevents.csv").write_text("")
    with pytest.raises(DataError, match="more than once"):
        mimic3.read(folder, tmp_path / "work")


def test_counts_on_the_mimic_iii_demo(real_data, tmp_path):
    folder = real_data / "icu" / "mimic-iii-demo"
    if not folder.is_dir():
        pytest.skip("no mimic-iii-demo in the real data")
    rule = label("berlin-oxygenation")
    meta = prepare_icu("ards", "mimic3", folder, tmp_path / "out", horizon=10_000, rule=rule, grid_of_windows=True)
    assert meta.attrition[0] == {"step": "all stays", "patients": 100, "stays": 136}
    assert meta.attrition[1]["stays"] == 135  # one patient is younger than 18
    assert meta.onsets["stays"] == 15 and meta.onsets["after_6_h"] == 10
    cells = {(cell["fio2_back_h"], cell["persist_h"]): cell["stays"] for cell in meta.sensitivity}
    assert cells[8, 0] == 29 and cells[8, 8] == 15 and cells[2, 24] == 12
    assert all(cells[f, 0] >= cells[f, 8] for f in (2, 4, 8)) and cells[2, 0] <= cells[8, 0]
    assert {"peep", "plateau", "tidal_volume", "driving_pressure", "compliance"} <= set(meta.features)


def test_gases_name_their_stays_as_text(tmp_path):
    charts = [chart(720, 1, "Assist Control"), chart(190, 1, 0.5), chart(778, 2, 40)]
    gases = [lab(50800, 2, "ART"), lab(50821, 2, 80, "mm Hg"), lab(50818, 2, 40, "mm Hg")]
    folder = write(tmp_path / "raw", CHARTEVENTS=charts, LABEVENTS=gases)
    table = source_gases("mimic3", folder, 0, 0, 24, 24)
    assert table.schema["stay_id"] == pl.String
    assert set(table["stay_id"]) == {"100"}
