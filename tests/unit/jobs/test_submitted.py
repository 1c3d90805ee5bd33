"""Runs that are submitted from Python: what can be, and how the same lines come back to the same run. The processes
themselves are in tests/ray/test_notebook.py."""

import json
import stat
from pathlib import Path

import pytest

import raylab
from jobs.common import home
from jobs.common.submitted import Cluster, Process, carry_out, describe_call
from raylab.errors import DataError, RunError, UsageError
from raylab.files import locked
from raylab.tasks.recipes import parse_recipe, shipped_recipe
from raylab.training.run_record import RunRecord


class Recorded(Cluster):
    """A cluster that notes what it is told to start, and says of all of it that it is alive or not."""

    name = "recorded"

    def __init__(self, place: Path) -> None:
        self.home, self.started, self.alive, self.is_poor = place, [], True, False

    def check(self, call):
        if self.is_poor:
            raise UsageError("this will cost 28 core-hours, and 20 are left")

    def start(self, name, words):
        self.started.append((name, words))
        return Process(job=f"job-{len(self.started)}")

    def is_alive(self, submission, name):
        return self.alive and bool(submission.job)

    def stop(self, submission):
        self.alive = False


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    return Recorded(tmp_path)


def submit(cluster, **changed):
    return cluster.submit(raylab.train, "ards", "prepared", **{"smoke": True, "name": "first", **changed})


def record(cluster, status, name="first"):
    """A run as a process would have opened it."""
    directory = cluster.home / "runs" / name
    directory.mkdir(parents=True, exist_ok=True)
    made = RunRecord(name=name, uri="", experiment="", kind="train", task="ards", data="", synthetic=True)
    error = "no room" if status == "FAILED" else None
    home.describe(directory, made.model_copy(update={"status": status, "error": error}))
    return directory


def test_a_call_is_json_with_absolute_paths(cluster):
    recipe = shipped_recipe("ards", smoke=True)
    call = describe_call(raylab.train, (recipe, Path("prepared")), {"name": "a", "workers": (1, 2)})
    arguments = json.loads(json.dumps(call.to_json()))["arguments"]
    assert arguments["data"] == str(Path.cwd() / "prepared") and arguments["workers"] == [1, 2]
    assert parse_recipe(arguments["recipe"]) == recipe


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (raylab.compare, {}, "'compare' cannot be submitted"),
        (print, {}, "'print' cannot be submitted"),
        (raylab.train, {"recipe": "ards", "data": "d"}, "needs a name"),
        (raylab.train, {"recipe": "ards", "data": "d", "name": "a", "trials": 3}, "unexpected keyword argument"),
        (raylab.tune, {"recipe": "ards", "name": "a"}, "missing a required argument: 'data'"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted_is_refused_before_anything_starts(cluster, function, options, message):
    with pytest.raises(UsageError, match=message):
        cluster.submit(function, **options)
    with pytest.raises(UsageError, match="not a valid run name"):
        submit(cluster, name="../x")
    assert not cluster.started


def test_the_same_lines_come_back_to_the_same_run(cluster):
    run = submit(cluster)
    path = cluster.home / "submitted" / "first.json"
    assert cluster.started == [("first", ["-m", "jobs.common.submitted", str(path)])]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and run.status == "submitted"
    submit(cluster)
    assert len(cluster.started) == 1, "its job is about to open the run"
    directory = record(cluster, "RUNNING")
    with locked(directory / "lock"):
        cluster.alive = False  # as far as the cluster says: the run's own lock is held
        assert submit(cluster).status == "running"
    assert len(cluster.started) == 1
    assert run.status == "lost"
    submit(cluster)
    assert len(cluster.started) == 2, "nothing worked on it any more"
    record(cluster, "FINISHED")
    assert submit(cluster).status == "finished" and len(cluster.started) == 2


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_has_failed_or_was_stopped_is_started_again(cluster, status):
    run = submit(cluster)
    run.stop()
    record(cluster, status)
    with pytest.raises(RunError, match="no room" if status == "FAILED" else "was stopped"):
        run.watch()
    submit(cluster)
    assert len(cluster.started) == 2


def test_above_the_budget_nothing_is_submitted_but_a_run_that_has_begun_goes_on(cluster):
    cluster.is_poor = True
    with pytest.raises(UsageError, match="20 are left"):
        submit(cluster)
    assert not list((cluster.home / "submitted").glob("*.json")) and not cluster.started
    cluster.is_poor = False
    submit(cluster)
    record(cluster, "KILLED")
    cluster.is_poor, cluster.alive = True, False
    submit(cluster)
    assert len(cluster.started) == 2


def test_a_run_of_another_call_is_refused(cluster):
    record(cluster, "FINISHED")
    with pytest.raises(UsageError, match="was not submitted from Python"):
        submit(cluster)
    submit(cluster, name="second")
    record(cluster, "RUNNING", "second")
    with pytest.raises(UsageError, match=r"with other arguments: smoke=True"):
        submit(cluster, name="second", smoke=False)
    with pytest.raises(UsageError, match=r"with other arguments: workers=None"):
        submit(cluster, name="second", workers=2)
    with pytest.raises(UsageError, match=r"submitted with raylab\.train"):
        cluster.submit(raylab.tune, "ards", "prepared", smoke=True, name="second")
    cluster.name = "other"
    with pytest.raises(UsageError, match="submitted to cluster 'recorded'"):
        submit(cluster, name="second")
    assert len(cluster.started) == 1


def test_a_call_that_fails_before_its_run_exists_says_why(cluster):
    run = submit(cluster)
    with pytest.raises(DataError, match="prepared"):
        carry_out(run.submission_path)
    cluster.alive = False
    assert run.status == "lost"
    with pytest.raises(RunError, match="prepared"):
        run.result()
    submit(cluster)
    assert len(cluster.started) == 2, "the data may be there by now"
