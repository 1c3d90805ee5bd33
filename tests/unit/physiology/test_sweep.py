import os
import shutil

import polars as pl
import pytest

from raylab.data.lung.sweep_dataset import finish
from raylab.data.prepared import read_meta
from raylab.distributed.map import run_chunks
from raylab.errors import DataError, RunError, UsageError
from raylab.physiology import sweep
from raylab.physiology.parameters import QUANTITIES, inputs
from raylab.physiology.steady import OUTPUTS, steady_state


def run(made, directory):
    run_chunks(sweep.write_chunk, sweep.begin(made, directory))
    return finish(made, directory, "surrogate")


def small(**options):
    return sweep.recipe("living", {}, **{"size": 300, "chunk": 128, **options})


@pytest.mark.parametrize("design", ["sobol", "lhs"])
def test_an_interrupted_sweep_ends_with_the_same_hash(tmp_path, design):
    made = small(design=design)
    calm = run(made, tmp_path / "calm")
    chunks = sweep.begin(made, tmp_path / "torn")
    for path in list(chunks)[2:0:-1]:  # backwards, and then no further
        sweep.write_chunk(chunks[path], path)
    assert run(made, tmp_path / "torn").data_hash == calm.data_hash
    assert run(small(design=design, seed=1), tmp_path / "other").data_hash != calm.data_hash
    assert read_meta(tmp_path / "calm", "surrogate").data_hash == calm.data_hash


def test_rows_can_be_computed_again_from_themselves(tmp_path):
    made = small()
    meta = run(made, tmp_path)
    table = pl.read_parquet(tmp_path / "rows" / "*.parquet")
    assert table["row"].to_list() == list(range(300))
    assert sum(meta.status.values()) == 300
    ok = table.filter(pl.col("status") == 0)
    assert len(ok) == meta.status["ok"] > 200
    assert ok.select(pl.col(list(OUTPUTS)).null_count()).row(0) == (0,) * len(OUTPUTS)
    lost = table.filter(pl.col("status") != 0)
    assert lost.select(pl.col(list(OUTPUTS)).count()).row(0) == (0,) * len(OUTPUTS)
    again = steady_state(inputs({name: ok[name].to_numpy() for name in QUANTITIES})).values["pao2_mmHg"]
    assert again.numpy() == pytest.approx(ok["pao2_mmHg"].to_numpy(), rel=1e-6)
    assert meta.counts["train"]["n"] == pytest.approx(0.8 * len(ok), abs=25)
    assert sum(part["n"] for part in meta.counts.values()) == len(ok)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
def test_a_compiled_sweep_is_another_recipe_with_the_same_patients(tmp_path):
    run(small(), tmp_path / "plain")
    first = run(small(compiled=True), tmp_path / "first")
    assert run(small(compiled=True), tmp_path / "again").data_hash == first.data_hash
    plain, compiled = (pl.read_parquet(tmp_path / name / "rows" / "*.parquet") for name in ("plain", "first"))
    assert compiled["status"].to_list() == plain["status"].to_list()
    for name in OUTPUTS:
        expected = plain[name].drop_nulls().to_numpy()
        assert compiled[name].drop_nulls().to_numpy() == pytest.approx(expected, rel=1e-6), name


def test_a_compiled_sweep_without_a_compiler_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match="cannot be compiled") as caught:
        run(small(compiled=True), tmp_path / "s")
    assert "no-such-compiler" in str(caught.value.why)
    assert not list((tmp_path / "s" / "rows").iterdir())


def test_breaths_below_the_dead_space_are_counted_not_computed(tmp_path):
    made = sweep.recipe("patient", {"tidal_volume_mL": "uniform(100,300)"}, size=50)
    meta = run(made, tmp_path)
    refused = pl.read_parquet(tmp_path / "rows" / "*.parquet").filter(pl.col("status") == sweep.REFUSED)
    assert 0 < len(refused) < 50
    assert refused["tidal_volume_mL"].max() < 2.2 * 66 + 1
    assert meta.status[sweep.STATUSES[sweep.REFUSED]] == len(refused)


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    sweep.begin(small(), tmp_path / "s")
    with pytest.raises(DataError, match="contains another sweep"):
        sweep.begin(small(seed=3), tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(DataError, match="not empty"):
        sweep.begin(small(), tmp_path / "full")


def test_a_sweep_larger_than_the_disk_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(DataError, match="does not fit on the disk"):
        sweep.begin(small(), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_wrong_recipes_are_refused():
    with pytest.raises(UsageError, match="unknown sweep"):
        sweep.recipe("livin", {})
    with pytest.raises(UsageError, match="peep_cmH2O"):
        sweep.recipe("patient", {"peep_cmH20": "5"})
    with pytest.raises(DataError, match=r"fio2=uniform\(.1,1\) exceeds"):
        sweep.recipe("patient", {"fio2": "uniform(.1,1)"})
    with pytest.raises(UsageError, match="size"):
        sweep.recipe("patient", {}, size=0)


def test_an_unfinished_sweep_has_no_meta(tmp_path):
    made = small()
    chunks = sweep.begin(made, tmp_path)
    path = next(iter(chunks))
    sweep.write_chunk(chunks[path], path)
    with pytest.raises(DataError, match="1 of 3 chunks"):
        finish(made, tmp_path, "surrogate")
