"""Runs whose files are damaged, hostile or in the wrong place: an error that names the file, or a result without it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import evaluate, rm
from jobs.common import home, outputs, predictions, provenance
from jobs.common.disk_use import list_paths
from jobs.common.results import ScoresFile
from raylab.documents import read_document
from raylab.errors import DataError, UsageError
from raylab.files import write_json
from raylab.tasks.recipes import shipped_recipe
from raylab.training.run_record import RunRecord

DEEP = "[" * 100_000


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an empty home's runs."""
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    place = tmp_path / "home" / "runs"
    place.mkdir(parents=True)
    return place


def make_run(directory: Path, **facts: Any) -> Path:
    """A finished run without a model."""
    directory.mkdir(parents=True)
    record = {"name": directory.name, "uri": "", "experiment": "e", "kind": "train", "task": "ards", "data": "/nowhere"}
    more = {"synthetic": True, "status": "FINISHED", "run_id": f"id-{directory.name}", "data_hash": "d", **facts}
    write_json(directory / "run.json", {**record, **more})
    write_json(directory / "recipe.json", shipped_recipe("ards", smoke=True).model_dump(mode="json"))
    return directory


def test_a_name_that_no_file_can_have_is_no_run(runs):
    with pytest.raises(UsageError, match=r"(?s)cannot be a run.*name too long.*raylab runs"):
        home.find("x" * 5000)


def test_runs_that_name_one_another_as_parents_end(runs, monkeypatch):
    """As when a run is removed, and another of its name starts from its child."""
    for name, parent in (("first", "second"), ("second", "first")):
        make_run(runs / name, parent=parent, parent_directory=str(runs / parent))
    origin = provenance.describe(runs / "first")
    assert origin.parent is not None and origin.parent.name == "second"
    assert origin.parent.parent is not None and origin.parent.parent.recipe is None
    monkeypatch.setattr(evaluate, "leakage", lambda *_: {"checked": True})
    parents = evaluate.leakage_of_run(runs / "first", Path("/nowhere"), "test")["parents"]
    assert parents["second"]["checked"] and not parents["first"]["checked"]


def test_a_run_of_the_same_name_is_not_the_parent(runs):
    tags = {"raylab.parent": "id-of-one-that-was-removed"}
    child = make_run(runs / "child", parent="first", parent_directory=str(runs / "first"), tags=tags)
    record = home.note(child)
    with pytest.raises(UsageError, match=r"(?s)first, from whose weights child starts, is missing.*raylab rerun child"):
        home.require_parent(record)
    make_run(runs / "first")
    assert home.find_parent(record) is None
    same = RunRecord.model_validate({**record.to_json(), "tags": {"raylab.parent": "id-first"}})
    assert home.find_parent(same) == runs / "first"


def test_a_link_to_a_run_is_not_removed(runs, tmp_path):
    there = make_run(tmp_path / "elsewhere" / "first")
    (runs / "first").symlink_to(there)
    with pytest.raises(UsageError, match=f"(?s)is a link to a run.*{there}"):
        rm.check(runs / "first", [], None, [])


def test_a_run_outside_of_the_home_is_removed_completely(runs, tmp_path):
    there = make_run(tmp_path / "elsewhere" / "first")
    home.remove(there)
    assert [path.name for path in there.parent.iterdir()] == [".opening.lock"]


def test_parts_behind_a_link_stay(runs, tmp_path):
    search = make_run(runs / "search", kind="tune")
    for trial in (search / "trials" / "000", tmp_path / "theirs"):
        (trial / "checkpoints").mkdir(parents=True)
    (search / "trials" / "001").symlink_to(tmp_path / "theirs")
    assert list_paths(search, "checkpoints") == [search / "trials" / "000" / "checkpoints"]


def test_an_output_that_would_be_waited_for_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is not a plain file"):
        outputs.check(tmp_path / "pipe", "--json", "result")
    (tmp_path / "deep").write_text(DEEP)
    with pytest.raises(DataError, match="is not a result file"):
        outputs.check(tmp_path / "deep", "--json", "result")


@pytest.mark.parametrize(
    "change",
    [
        {"p": np.zeros(3)},
        {"p": np.full(4, np.nan)},
        {"p": np.zeros((4, 1, 1))},
        {"p": np.array(["a"] * 4)},
        {"y": np.array(5)},
        {"group": np.array({}, dtype=object)},
    ],
    ids=["fewer", "NaN", "more dimensions", "text", "scalar", "pickle"],
)
def test_predictions_of_another_form_are_damaged(change, tmp_path):
    file = predictions.path(tmp_path, "test", "0" * 64)
    file.parent.mkdir()
    rows = {"y": np.zeros(4), "p": np.full(4, 0.5), "group": np.arange(4), "rows": "r", "classes": ["a", "b"]}
    np.savez_compressed(file, **rows)
    assert predictions.read(tmp_path, "test", "0" * 64, "again").patients == 4
    np.savez_compressed(file, **{**rows, **change})
    with pytest.raises(DataError, match=r"(?s)is damaged.*next: again"):
        predictions.read(tmp_path, "test", "0" * 64, "again")


@pytest.mark.parametrize(
    "change", [{"n": None}, {"n": float("nan")}, {"classes": [1]}, {"auroc": {"value": "x", "low": None, "high": None}}]
)
def test_scores_of_another_form_are_damaged(change, tmp_path):
    kept = {"data": "d", "split": "val", "n": 9, "patients": 9, "classes": {"a": 9}, "more": {"x": 1}}
    kept["auroc"] = {"value": 0.5, "low": None, "high": None}
    write_json(tmp_path / "val.json", kept)
    assert list(read_document(tmp_path / "val.json", ScoresFile).scores()) == ["auroc"]
    write_json(tmp_path / "val.json", {**kept, **change})
    with pytest.raises(DataError, match="is damaged"):
        read_document(tmp_path / "val.json", ScoresFile)
