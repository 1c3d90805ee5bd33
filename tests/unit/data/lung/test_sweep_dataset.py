"""Sweeps as data of the surrogate: splits, statistics of train alone, and inputs that it does not know."""

import numpy as np
import polars as pl
import pytest

from raylab.data.lung.sweep_dataset import FRACTIONS, finish, load_sweep, outputs
from raylab.distributed.map import run_chunks
from raylab.errors import DataError, UsageError
from raylab.physiology import sweep


def made(directory, changes, size=400):
    recipe = sweep.recipe("patient", changes, size=size, chunk=250)
    run_chunks(sweep.write_chunk, sweep.begin(recipe, directory))
    finish(recipe, directory, "surrogate")
    return directory


@pytest.fixture
def directory(surrogate_data):
    return surrogate_data


def test_every_row_is_in_one_split(directory):
    parts = [load_sweep(directory, split) for split in FRACTIONS]
    rows = np.concatenate([part.rows for part in parts])
    assert len(set(rows)) == len(rows) == len(load_sweep(directory, "all"))
    assert abs(len(parts[0]) / len(rows) - 0.8) < 0.08
    assert [part.spec for part in parts] == [parts[0].spec] * 3
    assert parts[0].x.mean(0) == pytest.approx(0, abs=1e-5)
    assert parts[0].y.std(0) == pytest.approx(1, abs=1e-4)


def test_outputs_come_back_in_their_units(directory):
    samples = load_sweep(directory, "test")
    table = pl.read_parquet(directory / "rows" / "*.parquet").sort("row")
    values = outputs(samples.y, samples.spec)
    for k, name in enumerate(samples.spec["classes"]):
        assert values[:, k] == pytest.approx(table[name].to_numpy()[samples.rows], rel=1e-4), name
    assert samples.inputs()["shunt"] == pytest.approx(table["shunt"].to_numpy()[samples.rows], rel=1e-4)


def test_what_does_not_vary_is_neither_input_nor_output(directory):
    spec = load_sweep(directory, "train").spec
    assert spec["features"] == ["fio2", "rate_per_min", "shunt"]
    assert "plateau_cmH2O" not in spec["classes"]
    assert spec["fixed"]["peep_cmH2O"] == 8


def test_inputs_beyond_the_sweep_are_refused(directory, tmp_path):
    spec = load_sweep(directory, "train").spec
    wider = made(tmp_path / "wider", {"shunt": "uniform(.05,.6)", "fio2": "uniform(.3,1)"}, 100)
    with pytest.raises(DataError, match=r"shunt 0.05 to 0.3: \d+ of \d+ rows beyond"):
        load_sweep(wider, "all", spec)
    other = made(tmp_path / "other", {"shunt": "uniform(.1,.2)", "fio2": "0.5", "peep_cmH2O": "12"}, 50)
    with pytest.raises(DataError, match="peep_cmH2O 8 only: 50 of 50 rows differ"):
        load_sweep(other, "all", spec)
    inside = made(tmp_path / "inside", {"shunt": "uniform(.1,.2)", "fio2": "0.5"}, 50)
    assert len(load_sweep(inside, "all", spec)) == 50


def test_wrong_splits_and_empty_sweeps_are_refused(directory, tmp_path):
    with pytest.raises(UsageError, match="unknown split"):
        load_sweep(directory, "tests")
    with pytest.raises(DataError, match="varies no input"):
        load_sweep(made(tmp_path / "one", {}, 20), "train")
