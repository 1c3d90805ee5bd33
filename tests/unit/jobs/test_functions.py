"""The verbs as functions of `raylab`, in this process."""

import json
import os
import stat
import subprocess
import sys

import polars as pl
import pytest

import raylab
from jobs.common import home
from jobs.common.results import find_run
from jobs.train import build_recipe
from raylab.data.icu.meta import IcuMeta
from raylab.data.prepared import read_meta
from raylab.errors import DataError, TrackingError, UsageError
from raylab.tasks.recipes import shipped_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield home.home()


@pytest.fixture(scope="module")
def run(place, ards_data):
    """Of a baseline, which is fitted in one step."""
    recipe = shipped_recipe("ards", smoke=True)
    return raylab.train(recipe, ards_data, settings={"model.name": "logistic"}, workers=0, name="first", quiet=True)


def test_the_functions_are_found_and_loaded_when_they_are_used():
    assert set(raylab.__all__) < set(dir(raylab)) and "__version__" in dir(raylab)
    code = "import raylab, sys; print([name for name in sys.modules if name.split('.')[0] in ('jobs', 'torch', 'ray')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        raylab.trian  # noqa: B018


def test_data_is_prepared_with_the_options_of_its_task(tmp_path):
    made = raylab.prepare("ards", tmp_path / "a", source="synthetic", patients=60, landmark=6, quiet=True)
    assert made.directory == tmp_path / "a" and read_meta(made.directory, "ards", IcuMeta).landmark_h == 6
    with pytest.raises(UsageError, match="unknown option of prepare ards 'size'"):
        raylab.prepare("ards", tmp_path / "b", source="synthetic", size=64)
    with pytest.raises(UsageError, match="use one of: landmark"):
        raylab.prepare("ards", tmp_path / "b", source="synthetic", landmrk=6)
    assert not (tmp_path / "b").exists()


def test_a_run_is_trained_and_describes_itself(run, place, ards_data):
    assert (run.name, run.task, run.directory, run.data) == ("first", "ards", place / "runs" / "first", ards_data)
    assert 0 <= run.scores["auroc"].value <= 1 and "ventilated_pf/auroc" in run.scores
    assert run.details["weights_sha256"] == json.loads((run.directory / "result.json").read_text())["weights_sha256"]
    assert stat.S_IMODE((run.directory / "result.json").stat().st_mode) == 0o600


def test_the_callers_files_keep_their_mode(run, tmp_path):
    (tmp_path / "mine").touch()
    before = os.umask(0o022)
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o666 & ~before != 0o600


def test_a_run_is_named_in_four_ways(run):
    for reference in (run, "first", run.run_id, run.directory):
        assert find_run(reference) == run.directory


def test_a_recipe_that_is_given_has_no_smaller_one(ards_data):
    with pytest.raises(UsageError, match="a recipe was given"):
        raylab.train(shipped_recipe("ards"), ards_data, smoke=True)


def test_a_transfer_is_of_the_task_of_its_parent(run, ards_data):
    with pytest.raises(DataError, match="is of task 'ards', not 'covidnet'"):
        raylab.transfer(run, ards_data, task="covidnet")


def test_wrong_names_print_the_right_ones(run, ards_data):
    with pytest.raises(UsageError, match="ards"):
        raylab.train("adrs", ards_data)
    with pytest.raises(UsageError, match=r"optim\.lr"):
        raylab.train("ards", ards_data, settings={"optim.lrr": 1})
    with pytest.raises(UsageError, match="asha"):
        raylab.tune("ards", ards_data, smoke=True, scheduler="ahsa")
    with pytest.raises(UsageError, match="first"):
        raylab.resume("frist")


def test_an_evaluation_is_counted_and_has_the_scores_of_its_split(run, ards_data):
    first = raylab.evaluate(run, ards_data, quiet=True)
    again = raylab.evaluate("first", ards_data, split="test", quiet=True)
    assert (first.run, first.run_id, first.split, first.data) == ("first", run.run_id, "test", ards_data)
    assert (first.test_reads, again.test_reads) == (1, 2) and first.scores == again.scores
    assert first.scores["auroc"].value == first.details["auroc"]["value"]
    with pytest.raises(UsageError, match="use one of: test"):
        raylab.evaluate(run, ards_data, split="tset")


def test_predictions_are_a_private_file_with_a_row_for_each_stay(run, ards_data, tmp_path):
    predicted = raylab.predict(run, ards_data, tmp_path / "p.parquet", split="val", quiet=True)
    frame = pl.read_parquet(predicted.path)
    assert (len(frame), tuple(frame.columns)) == (predicted.rows, predicted.columns)
    assert stat.S_IMODE(predicted.path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="use one of: val"):
        raylab.predict(run, ards_data, tmp_path / "p.parquet", split="vla")
    with pytest.raises(DataError, match="is of task 'ards', not 'covidnet'"):
        raylab.predict(run, ards_data, tmp_path / "p.parquet", task="covidnet")


def test_compare_returns_the_runs_and_writes_a_report(run, tmp_path):
    compared = raylab.compare(out=tmp_path / "report.html", quiet=True)
    assert "first" in [row["name"] for row in compared.runs] and compared.report == tmp_path / "report.html"
    assert compared.report.read_text().startswith("<!doctype html>")
    with pytest.raises(TrackingError, match="no experiment 'nothing'"):
        raylab.compare(experiment="nothing")


def test_workers_and_priority_are_short_forms_of_their_fields():
    scaling = build_recipe("ards", {"scaling.gpu": True}, "1:3", smoke=True, priority=2.5).scaling
    assert (scaling.workers, scaling.priority, scaling.gpu) == ((1, 3), 2.5, True)
    assert build_recipe("ards", {"scaling.priority": 3.0}).scaling.priority == 3.0
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=r"scaling\.priority"):
            build_recipe("ards", {}, priority=wrong)
