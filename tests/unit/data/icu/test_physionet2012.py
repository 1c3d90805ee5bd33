import gzip
import io
import tarfile

import polars as pl
import pytest

from raylab.data.icu.sources import physionet2012
from raylab.errors import DataError

PATIENT = """Time,Parameter,Value
00:00,RecordID,{id}
00:00,Age,54
00:00,Gender,-1
00:00,Height,-1
00:00,ICUType,4
00:00,Weight,81.5
00:07,HR,73
01:30,Temp,35.1
10:00,,-1
"""


def write(folder, files, name="set-a", packed=True, outcomes=True):
    folder.mkdir(exist_ok=True)
    if packed:
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
            for file, text in files.items():
                info = tarfile.TarInfo(f"{name}/{file}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    else:
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    if outcomes:
        rows = "\n".join(f"{file[:-4]},6,1,5,-1,{i % 2}" for i, file in enumerate(files))
        head = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"
        (folder / f"Outcomes-{name[4:]}.txt").write_text(f"{head}\n{rows}\n")
    return folder


def patients(*ids):
    return {f"{i}.txt": PATIENT.format(id=i) for i in ids}


@pytest.mark.parametrize("packed", [True, False])
def test_reads_a_tar_and_a_directory_alike(tmp_path, packed):
    extract = physionet2012.read(write(tmp_path / "raw", patients(1, 2), packed=packed))
    events = extract.events.collect()
    first = events.filter(pl.col("stay_id") == "1").sort("time", "concept")
    assert first.select("time", "concept", "value").rows() == [
        (0, "age", 54),
        (0, "icu_type", 4),
        (0, "weight", 81.5),
        (0, "weight_admission", 81.5),
        (7 / 60, "hr", 73),
        (1.5, "temp", 35.1),
    ]
    columns = ("subject_id", "stay_id", "source", "died", "end_h", "end")
    assert extract.stays.select(columns).rows() == [
        ("1", "1", "set-a", False, 120, "discharge"),
        ("2", "2", "set-a", True, 120, "death"),
    ]
    assert extract.counts == {"unknown parameter": 2}


def test_several_sets_and_a_stay_without_rows(tmp_path):
    write(tmp_path, patients(1) | {"9.txt": "Time,Parameter,Value\n"}, "set-a")
    write(tmp_path, patients(2), "set-b", packed=False)
    extract = physionet2012.read(tmp_path)
    assert extract.stays.select("stay_id", "source").rows() == [("1", "set-a"), ("9", "set-a"), ("2", "set-b")]
    assert set(extract.events.collect()["stay_id"]) == {"1", "2"}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("00:07,HR,high", 3),
        ("00:07,HR", 3),
        ("00:07,HR,73,1", 3),
        ("seven,HR,73", 3),
        ("00:61,HR,73", 3),
        ("00:07:30,HR,73", 3),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, line):
    broken = f"Time,Parameter,Value\n00:00,Age,50\n{row}\n00:09,HR,70\n"
    write(tmp_path, patients(1) | {"2.txt": broken} | patients(3))
    with pytest.raises(DataError, match=rf"2\.txt, line {line} "):
        physionet2012.read(tmp_path)


def test_negative_times_keep_their_sign(tmp_path):
    write(tmp_path, {"1.txt": "Time,Parameter,Value\n-00:30,HR,70\n\n01:00,HR,71\n"})
    assert sorted(physionet2012.read(tmp_path).events.collect()["time"]) == [-0.5, 1.0]


def test_bad_directories_are_explained(tmp_path):
    with pytest.raises(DataError, match="no directory"):
        physionet2012.read(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no PhysioNet"):
        physionet2012.read(tmp_path)
    with pytest.raises(DataError, match=r"Outcomes-a\.txt is missing"):
        physionet2012.read(write(tmp_path / "a", patients(1), outcomes=False))
    with pytest.raises(DataError, match="no patient files"):
        physionet2012.read(write(tmp_path / "b", {}))
    with pytest.raises(DataError, match="line 1"):
        physionet2012.read(write(tmp_path / "c", {"1.txt": "00:00,HR,70\n"}))
    with pytest.raises(DataError, match="same record is in two sets"):
        physionet2012.read(write(write(tmp_path / "d", patients(1)), patients(1), "set-b"))
    folder = write(tmp_path / "e", patients(1))
    (folder / "Outcomes-a.txt").write_text("RecordID,Died\n1,0\n")
    with pytest.raises(DataError, match="not an outcome table"):
        physionet2012.read(folder)


@pytest.mark.parametrize("keep", [0.5, 0.95])
def test_a_truncated_tar_is_named(tmp_path, keep):
    write(tmp_path, patients(*range(50)))
    file = tmp_path / "set-a.tar.gz"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"set-a\.tar\.gz is damaged or truncated"):
        physionet2012.read(tmp_path)


def test_a_tar_cut_between_members_is_named(tmp_path):
    write(tmp_path, patients(1, 2))
    file = tmp_path / "set-a.tar.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:1024]))  # one whole member, no end of archive
    with pytest.raises(DataError, match="damaged or truncated"):
        physionet2012.read(tmp_path)


def outcomes(folder, *rows, mark=","):
    head = ["RecordID", "SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death"]
    (folder / "Outcomes-a.txt").write_text("\n".join(mark.join(row) for row in (head, *rows)) + "\n")


@pytest.mark.parametrize(("record", "mark"), [("1", ","), ("1.0", ","), (" 1 ", ";"), ("001", "\t")])
def test_outcomes_meet_their_record_however_it_is_written(tmp_path, record, mark):
    write(tmp_path, patients(1), outcomes=False)
    outcomes(tmp_path, (record, "6", "1", "5", "-1", "1"), mark=mark)
    assert physionet2012.read(tmp_path).stays["died"].to_list() == [True]


def test_outcomes_of_another_set_are_refused_and_of_a_part_noted(tmp_path):
    write(tmp_path, patients(1, 2), outcomes=False)
    outcomes(tmp_path, ("7", "6", "1", "5", "-1", "1"))
    with pytest.raises(DataError, match=r"no identifier of set-a is in Outcomes-a\.txt: 0 of 2"):
        physionet2012.read(tmp_path)
    outcomes(tmp_path, ("1", "6", "1", "5", "long", "1"))
    extract = physionet2012.read(tmp_path)
    assert "stays of Outcomes-a.txt with an unreadable survival: 1" in extract.notes
    assert "stays of set-a without a row in its outcomes: 1" in extract.notes
    assert extract.stays["died"].to_list() == [True, None]
    outcomes(tmp_path, ("1.5", "6", "1", "5", "-1", "1"))
    with pytest.raises(DataError, match="recordid is not a whole number in 1 of 1"):
        physionet2012.read(tmp_path)


def test_ages_and_sexes_in_words(tmp_path):
    def patient(n, age, gender):
        return PATIENT.format(id=n).replace("Age,54", f"Age,{age}").replace("Gender,-1", f"Gender,{gender}")

    said = {1: ("> 89", "F"), 2: ("90 or older", "male "), 3: ("old", "?"), 4: ("-1", "-1"), 5: ("63", "0")}
    extract = physionet2012.read(write(tmp_path, {f"{n}.txt": patient(n, *what) for n, what in said.items()}))
    found = extract.events.collect().filter(pl.col("concept").is_in(["age", "sex"])).sort("concept", "stay_id")
    assert found.select("stay_id", "value").rows() == [
        ("1", 91.4),
        ("2", 91.4),
        ("5", 63),
        ("1", 0),
        ("2", 1),
        ("5", 0),
    ]
    assert "stays of set-a.tar.gz with an unreadable age, set missing: 1" in extract.notes
    assert "stays of set-a.tar.gz with an unreadable gender, set missing: 1" in extract.notes


def test_a_file_of_another_patient_is_refused(tmp_path):
    with pytest.raises(DataError, match="in 1 files RecordID is another number than in the file's name"):
        physionet2012.read(write(tmp_path / "a", {"1.txt": PATIENT.format(id=2)}))
    folder = write(tmp_path / "b", patients(1, "note"))
    outcomes(folder, ("1", "6", "1", "5", "-1", "1"))
    with pytest.raises(
        DataError, match=r"1 files are not named by a record number\n  why:  they are text such as 'aaaa'"
    ):
        physionet2012.read(folder)
