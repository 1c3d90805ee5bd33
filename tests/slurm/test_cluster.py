"""A Ray cluster on real Slurm: it grows with the work, and what happens to its nodes changes no result."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Bed
from tests.slurm.lab import INTERVAL, RECIPE, Lab
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def lab(testbed: Bed, ards_data: Path) -> Iterator[Lab]:
    """A cluster named ray, of preemptible nodes, that keeps none without work."""
    lab = Lab(testbed, ards_data)
    lab.run("cluster", "up", "--site", "testbed", "--name", "ray", "--max", 3, "--node-type", "spot", "--time",
            "01:00:00", "--wait")  # fmt: skip
    yield lab
    lab.call("cluster", "down", "--name", "ray")


@pytest.fixture(scope="module")
def calm(lab: Lab) -> dict[str, Any]:
    """The undisturbed run, in one process without Ray or Slurm."""
    return lab.run("train", "ards", "--data", lab.data, "--workers", 0, "--name", "calm", *RECIPE)


LONG = "loop.epochs=600"  # for what takes its time to happen: 1,200 steps


@pytest.fixture(scope="module")
def long_calm(lab: Lab) -> dict[str, Any]:
    return lab.run("train", "ards", "--data", lab.data, "--workers", 0, "--name", "long-calm", *RECIPE, LONG)


def check(lab: Lab, calm: dict[str, Any], run: str, repeated: int) -> dict[str, Any]:
    """The run ended as the undisturbed one, in one MLflow run, with at most so many steps computed twice."""
    result = lab.result(run)
    assert result["steps"] == result["planned_steps"] == calm["steps"]
    assert result["gaps"] == 0
    assert result["weights_sha256"] == calm["weights_sha256"]
    assert result["steps_repeated"] <= repeated, lab.starts(run)
    assert lab.mlflow(run) == ["FINISHED"]
    return result


def test_runs_grow_share_the_cluster_and_leave_it(lab: Lab, calm: dict[str, Any], long_calm: dict[str, Any]) -> None:
    """Workers come on demand. The first run has grown to all three nodes; the second gets its minimum from it, and
    neither waits for the other. Idle nodes are given back."""
    assert lab.status()["state"] == "ready"
    assert lab.workers() == []
    lab.train("first", "1:3", LONG)
    lab.on_workers("first", 3)
    assert len({job["node"] for job in lab.workers()}) == 3
    lab.train("second", "1:3")
    lab.on_workers("second", 1)
    assert lab.step("first") < 1200, "it is still there"
    check(lab, calm, "second", 0)
    result = check(lab, long_calm, "first", 0)
    assert max(result["workers"]) == 3 and 2 in result["workers"][result["workers"].index(3) :]
    wait_for(lambda: not lab.workers(), 90, "idle nodes to be released")


def cancelled(bed: Bed, job: str, node: str) -> None:
    bed.run(f"scancel {job}")


def told_to_end(bed: Bed, job: str, node: str) -> None:
    bed.run(f"scancel --signal=TERM {job}")


def out_of_time(bed: Bed, job: str, node: str) -> None:
    """A limit so near that USR1, due 60 s ahead of it as the site says, comes when Slurm next looks: every 30 s."""
    soon = bed.run("date --date='60 seconds' +%Y-%m-%dT%H:%M:%S").strip()
    bed.run(f"scontrol update jobid={job} EndTime={soon}")


def preempted(bed: Bed, job: str, node: str) -> None:
    bed.submit(f"--partition=batch --nodelist={node} --exclusive --time=1", "sleep 20")


def requeued(bed: Bed, job: str, node: str) -> None:
    bed.run(f"scontrol requeue {job}")


def crashed(bed: Bed, job: str, node: str) -> None:
    bed.verb("crash", node)


FAULTS = {
    # what happens to a worker's job -> steps that may be computed twice: none where there is a warning
    cancelled: 0,
    told_to_end: 0,
    out_of_time: 0,
    preempted: 0,
    requeued: 0,
    crashed: INTERVAL + 1,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_worker_that_goes(lab: Lab, calm: dict[str, Any], long_calm: dict[str, Any], fault: Any) -> None:
    name = fault.__name__.replace("_", "-")
    slow = fault is out_of_time
    lab.train(name, "2", *([LONG] if slow else []))
    lab.on_workers(name, 2, steps=INTERVAL + 10)
    head = lab.status()["head"]["node"]
    busy = lab.training_nodes()  # an earlier test's third node may still be there, idle
    victim = next(job for job in lab.workers() if job["node"] in busy and job["node"] != head)
    attempts = len(lab.starts(name))
    fault(lab.bed, victim["job"], victim["node"])
    try:
        wait_for(lambda: len(lab.starts(name)) > attempts, 300, "the next attempt")
        check(lab, long_calm if slow else calm, name, FAULTS[fault])
    finally:
        if fault is crashed:
            lab.bed.verb("boot", victim["node"])


def test_slurm_itself_away(lab: Lab, calm: dict[str, Any]) -> None:
    """Without slurmctld nothing new starts, and what runs goes on."""
    lab.train("without-slurm", "2")
    lab.on_workers("without-slurm", 2)
    attempts, step = len(lab.starts("without-slurm")), lab.step("without-slurm")
    lab.bed.verb("kill-controller")
    try:
        time.sleep(30)  # that long it is away: there is no condition to wait for
        assert lab.step("without-slurm") > step
        assert lab.call("cluster", "status", "--name", "ray").returncode == 1
    finally:
        lab.bed.verb("start-controller")
    check(lab, calm, "without-slurm", 0)
    assert len(lab.starts("without-slurm")) == attempts


def test_the_head_is_requeued(lab: Lab, calm: dict[str, Any]) -> None:
    """A run and a search are in the middle; the new head resumes both into the MLflow runs that they had."""
    lab.train("over-the-head", "2")
    search = (
        "tune",
        "ards",
        "--data",
        lab.data,
        "--trials",
        12,
        "--name",
        "search",
        "--smoke",
        "--set",
        "loop.epochs=8",
    )
    lab.run("cluster", "submit", "--name", "ray", "--detach", "--", "python", "-m", "jobs.cli", *search)
    lab.on_workers("over-the-head", 2)
    trials = lab.home / "runs" / "search" / "trials"
    wait_for(lambda: len(list(trials.glob("*/end.json"))) >= 2, 240, "two ended trials")
    before = lab.status()["head"]
    lab.bed.run(f"scontrol requeue {before['job']}")
    wait_for(lambda: (now := lab.status()["head"]) is not None and now["epoch"] > before["epoch"], 120, "the new head")
    check(lab, calm, "over-the-head", INTERVAL + 1)
    lab.result("search", 400)
    parameters = [path.read_text() for path in trials.glob("*/params.json")]
    assert len(parameters) == len(set(parameters)) == len(list(trials.glob("*/end.json"))) == 12
    assert lab.mlflow("search") == ["FINISHED"] * 13
