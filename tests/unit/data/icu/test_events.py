from pathlib import Path

import polars as pl
import pytest

from raylab.data.icu.dataset import load_icu
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.sources import events, synthetic
from raylab.errors import DataError


def write(folder: Path, records: str, stays: str) -> Path:
    folder.mkdir()
    (folder / "events.csv").write_text(records)
    (folder / "stays.csv").write_text(stays)
    return folder


STAYS = "stay_id,subject_id,died,end_h,end\n"
TWO = STAYS + "7,1,yes,30,death\n8,2,0,,\n"


def test_events_by_hand(tmp_path):
    folder = write(
        tmp_path / "ours",
        "Stay_ID;time;concept;value;unit\n7;1,5;pao2;9,3;kPa\n7;0;age;63 years;\n7;2;fio2;50%;\n7;0;sex;F;\n8;1;hr;;\n"
        "8;2;hr;error;\n8;3;mood;good;\n",
        TWO.replace(",", ";"),
    )
    data = events.read(folder, tmp_path / "work")
    assert data.events.collect().drop("subject_id").rows() == [
        ("7", 1.5, "pao2", 9.3, "kPa"),
        ("7", 0, "age", 63, "years"),
        ("7", 2, "fio2", 50, "%"),
        ("7", 0, "sex", 0, ""),
        ("8", 1, "hr", None, ""),
        ("8", 2, "hr", pytest.approx(float("nan"), nan_ok=True), ""),
    ]
    assert data.stays.select("stay_id", "subject_id", "source", "died", "end_h", "end").rows() == [
        ("7", "1", "ours", True, 30, "death"),
        ("8", "2", "ours", False, None, None),
    ]
    assert data.numbering == "events ours" and not data.synthetic
    assert [note for note in data.notes if "does not know ('mood'), not used: 1" in note]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The synthetic source's patients as tables."""
    folder = tmp_path_factory.mktemp("tables")
    data = synthetic.read(80, 0)
    data.events.collect().drop("subject_id").write_csv(folder / "events.csv")
    data.stays.select("stay_id", "subject_id", "source").write_parquet(folder / "stays.parquet")
    return folder


def test_tables_of_the_synthetic_source_become_the_same_data(exported, tmp_path):
    ours = prepare_icu("ards", "events", exported, tmp_path / "ours")
    theirs = prepare_icu("ards", "synthetic", None, tmp_path / "theirs", patients=80)
    for name in ("samples", "hours"):
        files = [pl.read_parquet(tmp_path / who / f"{name}.parquet") for who in ("ours", "theirs")]
        assert files[0].equals(files[1])
    assert ours.split_hash == theirs.split_hash and ours.synthetic and ours.source == "events"
    assert ours.no_unit == {} and len(load_icu(tmp_path / "ours", "train").rows) == ours.counts["train"]["n"]


def test_pieces_have_the_same_rows(exported, tmp_path, monkeypatch):
    whole = events.read(exported, tmp_path / "whole")
    monkeypatch.setattr(events, "PIECE", 1 << 18)
    parts = events.read(exported, tmp_path / "parts")
    assert len(parts.pieces) > 3 and len(whole.pieces) == 1
    columns = ["stay_id", "time", "concept", "value"]
    assert parts.events.collect().sort(columns).equals(whole.events.collect().sort(columns))


@pytest.mark.parametrize(
    ("records", "stays", "said"),
    [
        ("stay_id,time,concept,value,units\n7,1,hr,80,/min\n", TWO, "not used: units"),
        ("stay_id,time,concept,value\n7,1,hr,80\n", TWO.replace("died", "dead"), "not used: dead"),
        ("stay_id,time,concept,value\n7,2026-01-01 10:00,hr,80\n", TWO, "time is not a number in 1 of 1 rows"),
        ("stay_id,time,concept,value\n7,,hr,80\n", TWO, "time is empty in 1 of 1 rows"),
        ("stay_id,time,concept\n7,1,hr\n", TWO, "no column value"),
        ("stay_id,time,concept,value\nx,1,hr,80\n", TWO, "no identifier of events.csv is in the table stays"),
        ("stay_id,time,concept,value\n7,1,hr,80\n", STAYS, "stays.csv has no rows"),
        ("stay_id,time,concept,value\n7,1,hr,80\n", STAYS + "7,1,0,,\n7,2,0,,\n", "stay_id is not unique"),
        ("stay_id,time,concept,value\n7,1,hr,80\n", STAYS + "7,,0,,\n", "subject_id is empty in 1 of 1 rows"),
        (
            "stay_id,time,concept,value\n7,1,hr,80\n",
            "stay_id,subject_id,source\n7,1,synthetic\n8,2,ours\n",
            "stays of the source 'synthetic' beside those of ours",
        ),
    ],
)
def test_bad_tables_are_refused(tmp_path, records, stays, said):
    with pytest.raises(DataError, match=said):
        events.read(write(tmp_path / "ours", records, stays), tmp_path / "work")


def test_rows_of_another_patients_stay_are_left_out(tmp_path):
    folder = write(
        tmp_path / "ours", "stay_id,subject_id,time,concept,value\n7,1,1,hr,80\n7,2,1,hr,90\n7,,2,hr,70\n", TWO
    )
    data = events.read(folder, tmp_path / "work")
    assert data.events.collect()["value"].to_list() == [80, 70]
    assert data.counts == {"rows of another patient's stay": 1}
