"""How a run begins: all of it or nothing, once in MLflow, also when the server leaves or refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import sync
from jobs.common import home, run_tracking
from raylab.config.recipe import flatten
from raylab.data.prepared import read_meta
from raylab.errors import RunError, TrackingError, UsageError
from raylab.files import is_empty
from raylab.tasks.recipes import shipped_recipe
from tests.verbs import ROOT
from tests.wait import wait_for
from tracking import runs
from tracking.outbox import Outbox, target

NOWHERE = "http://127.0.0.1:9"  # nobody listens on the discard port


@pytest.fixture(scope="module")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("RAYLAB_HOME", str(path))
        yield path


@pytest.fixture
def describe(own_home: Path, ards_data: Path) -> Any:
    recipe, meta = shipped_recipe("ards", smoke=True), read_meta(ards_data, "ards")

    def make(name: str, uri: str | None = None, kind: Any = "train") -> tuple[Path, run_tracking.NewRun]:
        directory = home.new_run(name, "ards")
        uri = uri or run_tracking.checked_address()
        return directory, run_tracking.describe_run(directory, recipe, meta, ards_data, kind, uri)

    return make


def find(name: str) -> list[Any]:
    """The runs of this name in the store of this home."""
    client = runs.client(runs.address(home.home()))
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()], f"run_name = '{name}'"))


def send_all() -> None:
    """As `sync` does, once the request to the server that is gone has ended."""
    wait_for(lambda: sync.once(quiet=True)["exit_code"] == 0, 60, "everything to be sent")


def test_a_run_with_an_idempotency_key_is_created_once(own_home):
    uri = runs.address(own_home)
    first = runs.start_run(uri, "raylab", "once", tags={runs.KEY: "k"})
    assert runs.start_run(uri, "raylab", "once", tags={runs.KEY: "k"}) == first
    assert runs.start_run(uri, "raylab", "once", tags={runs.KEY: "other"}) != first
    runs.client(uri).delete_run(first)
    assert runs.start_run(uri, "raylab", "once", tags={runs.KEY: "k"}) == first


def test_what_a_killed_opening_has_left_is_removed_by_the_next(own_home, describe):
    leftover = own_home / "runs" / home.OPENING
    (leftover / "outbox").mkdir(parents=True)
    (leftover / "run.json").write_text("{}")
    assert [directory.name for directory, _ in home.records()] == []
    directory, new = describe("next")
    with run_tracking.open_run(directory, new):
        assert not leftover.exists()
    leftover.mkdir()
    assert sync.once(quiet=True)["exit_code"] == 0
    assert not leftover.exists()


def test_a_name_is_taken_only_once_and_nothing_of_others_is_touched(own_home, describe):
    directory, new = describe("taken")
    with run_tracking.open_run(directory, new):
        pass
    with pytest.raises(UsageError, match="already a run named 'taken'"), run_tracking.open_run(directory, new):
        pass
    (own_home / "runs" / "mine").mkdir()
    (own_home / "runs" / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty, and is not a run"):
        home.new_run("mine", "ards")
    assert (own_home / "runs" / "mine" / "notes.txt").read_text() == "keep"
    assert len(find("taken")) == 1 and not (own_home / "runs" / home.OPENING).exists()


def test_a_server_that_refuses_the_run_leaves_none(own_home, describe, monkeypatch):
    uri = runs.address(own_home)
    client = runs.client(uri)
    client.delete_experiment(client.create_experiment("gone"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    directory, new = describe("refused")
    with pytest.raises(TrackingError, match="was deleted"), run_tracking.open_run(directory, new):
        pass
    assert not directory.exists() and not (own_home / "runs" / home.OPENING).exists()


def test_a_server_that_leaves_while_a_run_opens_gets_it_later(own_home, describe, monkeypatch):
    monkeypatch.setattr(run_tracking, "FLUSH_SECONDS", 0.1)
    directory, new = describe("later", NOWHERE)
    with run_tracking.open_run(directory, new, system=False):
        Outbox(directory / "outbox").append({"kind": "metrics", "step": 1, "values": {"train/loss": 0.5}})
    assert home.note(directory).run_id is None and home.note(directory).status == "FINISHED"
    uri = runs.address(own_home)  # the server is back, at another address
    Outbox(directory / "outbox").bind(uri, None)
    home.annotate(directory, uri=uri)
    send_all()
    (run,) = find("later")
    assert home.note(directory).run_id == run.info.run_id and run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in flatten(shipped_recipe("ards", smoke=True)).items()}
    assert run.data.metrics["train/loss"] == 0.5
    began = json.loads((directory / "outbox" / "target.json").read_text())["request"]["time"]
    assert run.info.start_time == began


def test_trials_open_without_a_server_and_are_shown_under_their_search(own_home, describe, monkeypatch):
    monkeypatch.setattr(run_tracking, "FLUSH_SECONDS", 0.1)
    directory, new = describe("search", NOWHERE, "tune")
    with run_tracking.open_run(directory, new, system=False):
        trial = directory / "trials" / "000"
        trial.mkdir(parents=True)
        for _ in range(2):  # as after a kill
            run_tracking.write_run(trial, run_tracking.describe_trial(shipped_recipe("ards", smoke=True), directory, 0))
    uri = runs.address(own_home)
    for one in (directory, trial):
        Outbox(one / "outbox").bind(uri, None)
        home.annotate(one, uri=uri)
    send_all()
    (search,), (child,) = find("search"), find("search-000")
    assert child.data.tags["mlflow.parentRunId"] == search.info.run_id
    assert (search.info.status, child.info.status) == ("FINISHED", "KILLED")  # nobody works on the trial any more


def test_sync_marks_a_run_whose_process_is_gone_and_no_other(own_home, describe):
    directory, new = describe("working")
    with run_tracking.open_run(directory, new, system=False):
        sync.once(quiet=True)
        assert home.note(directory).status == "RUNNING" and find("working")[0].info.status == "RUNNING"
        with pytest.raises(RunError, match="another process"), run_tracking.reopen_run(directory):
            pass
    home.annotate(directory, status="RUNNING")  # killed before it could say so itself
    assert sync.once(quiet=True)["exit_code"] == 0
    assert home.note(directory).status == "FINISHED" and find("working")[0].info.status == "FINISHED"


def test_a_damaged_target_is_written_again_for_the_same_run(own_home, describe):
    directory, new = describe("damaged")
    with run_tracking.open_run(directory, new, system=False):
        pass
    content = json.loads((directory / "run.json").read_text())
    content.pop("run_id")  # killed before it was noted
    (directory / "run.json").write_text(json.dumps(content))
    (directory / "outbox" / "target.json").write_text("{")
    with run_tracking.reopen_run(directory, system=False):
        pass
    (run,) = find("damaged")
    bound = target(directory / "outbox")
    assert bound is not None and bound.run_id == run.info.run_id


def test_unfinished_files_do_not_fill_a_directory(tmp_path):
    assert is_empty(tmp_path / "missing") and is_empty(tmp_path)
    end = "import os, pathlib, raylab.files as f\nwith f.atomic_write(pathlib.Path('a.json')): os._exit(9)"
    subprocess.run([sys.executable, "-c", end], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert len([*tmp_path.iterdir()]) == 1 and is_empty(tmp_path)
    (tmp_path / ".hidden").write_text("mine")
    assert not is_empty(tmp_path)
