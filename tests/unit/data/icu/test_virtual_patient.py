"""Features of virtual patients: from before the landmark alone, beside the others only when asked for."""

import polars as pl
import pytest

from raylab.data.icu.dataset import load_icu
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.virtual_patient import VIRTUAL, events, virtual_patients
from raylab.errors import DataError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("virtual") / "ards"
    prepare_icu("ards", "synthetic", None, out, patients=70, virtual=True)
    return out


def test_they_are_there_and_used_only_when_asked_for(directory):
    plain = load_icu(directory, "train")
    full = load_icu(directory, "train", virtual=True)
    assert full.x.shape[2] == plain.x.shape[2] + len(VIRTUAL)
    assert full.spec["static"][-len(VIRTUAL) :] == list(VIRTUAL)
    val = load_icu(directory, "val", spec=full.spec)
    assert val.x.shape[2] == full.x.shape[2]
    rows = pl.read_parquet(directory / "samples.parquet")
    known = rows.filter(pl.col("vp_known") == 1)
    assert 5 < len(known) < len(rows)
    assert known["vp_shunt"].null_count() == 0
    assert rows.filter(pl.col("vp_known") == 0)["vp_shunt"].null_count() == len(rows) - len(known)
    assert known["vp_shunt"].is_between(0, 0.7).all()


def test_they_see_nothing_at_or_after_the_landmark(directory):
    rows = pl.read_parquet(directory / "samples.parquet").drop(VIRTUAL)
    table = pl.read_parquet(directory / "hours.parquet")
    changed = table.with_columns(pao2=pl.when(pl.col("hour") >= 8).then(60.0).otherwise("pao2"))
    assert virtual_patients(rows, changed, 8).equals(virtual_patients(rows, table, 8))
    assert not events(rows, changed).collect().equals(events(rows, table).collect())


def test_the_end_of_a_carry_is_an_event():
    table = pl.DataFrame(
        {
            "stay_id": ["a"] * 4 + ["b"] * 2,
            "hour": [0, 1, 2, 3, 0, 1],
            "fio2": [0.5, None, None, 0.4, None, 0.6],
            "fio2__mask": [True, False, False, True, False, True],
            "fio2__since": [0.5, 1.5, None, 0.25, None, 0.5],
        }
    )
    found = events(pl.DataFrame({"stay_id": ["a", "b"]}), table).sort("stay_id", "time").collect()
    assert found.select("stay_id", "time", "value").rows() == [
        ("a", 0.5, 0.5), ("a", 2.0, None), ("a", 3.75, 0.4), ("b", 1.5, 0.6)
    ]  # fmt: skip


def test_a_stay_does_not_change_anothers(directory):
    rows = pl.read_parquet(directory / "samples.parquet")
    table = pl.read_parquet(directory / "hours.parquet")
    half = rows.head(35)
    part = virtual_patients(half.drop(VIRTUAL), table.filter(pl.col("stay_id").is_in(half["stay_id"].to_list())), 12)
    assert (part["vp_shunt"] - half["vp_shunt"]).abs().max() < 1e-4


def test_without_them_the_next_command_is_said(ards_data):
    with pytest.raises(DataError, match="--virtual-patient"):
        load_icu(ards_data, "train", virtual=True)
