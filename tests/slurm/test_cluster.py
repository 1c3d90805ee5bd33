"""A Ray cluster on real Slurm: it grows with the work, and what happens to its nodes changes no result."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


SHORT, MIDDLE, LONG = (f"loop.epochs={epochs}" for epochs in (200, 600, 1750))  # 2 steps an epoch
Undisturbed = dict[str, "Future[dict[str, Any]]"]


@pytest.fixture(scope="module")
def undisturbed(lab: Lab) -> Iterator[Undisturbed]:
    """The results of the same recipes in one process without Ray or Slurm, computed beside the tests."""

    def train(epochs: str) -> dict[str, Any]:
        name = epochs.replace("loop.epochs=", "undisturbed-")
        return lab.run("train", "ards", "--data", lab.data, "--workers", 0, "--name", name, *RECIPE, epochs)

    with ThreadPoolExecutor(1) as pool:
        yield {epochs: pool.submit(train, epochs) for epochs in (SHORT, MIDDLE, LONG)}
        pool.shutdown(cancel_futures=True)


def check(lab: Lab, undisturbed: "Future[dict[str, Any]]", run: str) -> dict[str, Any]:
    """The run ended as the undisturbed one did, with one MLflow run."""
    result, expected = lab.result(run), undisturbed.result()
    assert result["steps"] == result["planned_steps"] == expected["steps"]
    assert result["gaps"] == 0
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert lab.mlflow(run) == ["FINISHED"]
    return result


def test_runs_grow_and_share_the_cluster(lab: Lab, undisturbed: Undisturbed) -> None:
    """Workers come on demand. The first run has grown to all three nodes; the second gets its minimum from it, and
    neither waits for the other."""
    assert lab.status()["state"] == "ready"
    assert lab.workers() == []
    lab.train("first", "1:3", MIDDLE)
    lab.on_workers("first", 3)
    assert len({job["node"] for job in lab.workers()}) == 3
    lab.train("second", "1:3", SHORT)
    lab.on_workers("second", 1)
    assert lab.step("first") < 1200, "it is still there"
    assert check(lab, undisturbed[SHORT], "second")["steps_repeated"] == 0
    result = check(lab, undisturbed[MIDDLE], "first")
    assert result["steps_repeated"] == 0
    assert max(result["workers"]) == 3 and 2 in result["workers"][result["workers"].index(3) :]


@pytest.fixture(scope="module")
def run(lab: Lab) -> str:
    """The name of the run to which the faults below happen, one after the other."""
    lab.train("disturbed", "2", LONG)
    return "disturbed"


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
def test_a_worker_that_goes(lab: Lab, run: str, fault: Any) -> None:
    lab.on_workers(run, 2, steps=INTERVAL + 10)
    head = lab.status()["head"]["node"]
    victim = next(job for job in lab.workers() if job["node"] != head and lab.is_training(run, job["node"]))
    before = lab.facts(run)
    fault(lab.bed, victim["job"], victim["node"])
    try:
        wait_for(lambda: lab.facts(run)["attempts"] > before["attempts"], 300, "the next attempt")
        assert lab.facts(run)["steps_repeated"] - before["steps_repeated"] <= FAULTS[fault], lab.starts(run)
    finally:
        if fault is crashed:
            lab.bed.verb("boot", victim["node"])


def test_slurm_itself_away(lab: Lab, run: str) -> None:
    """Without slurmctld nothing new starts, and what runs goes on."""
    lab.on_workers(run, 2)
    attempts, step = len(lab.starts(run)), lab.step(run)
    lab.bed.verb("kill-controller")
    try:
        assert lab.call("cluster", "status", "--name", "ray").returncode == 1
        wait_for(lambda: lab.step(run) > step + 300, 120, "300 steps without Slurm")
    finally:
        lab.bed.verb("start-controller")
    assert len(lab.starts(run)) == attempts


def test_after_all_of_it_the_run_ends_as_the_undisturbed_one(lab: Lab, run: str, undisturbed: Undisturbed) -> None:
    check(lab, undisturbed[LONG], run)


def test_the_head_is_requeued(lab: Lab, undisturbed: Undisturbed) -> None:
    """A search and a run are in the middle; the new head resumes both into the MLflow runs that they had."""
    words = ("--data", lab.data, "--trials", 12, "--name", "search", "--smoke", "--set", "loop.epochs=8")
    search = ("python", "-m", "jobs.cli", "tune", "ards", *words)
    lab.run("cluster", "submit", "--name", "ray", "--detach", "--", *search)
    lab.train("over-the-head", "2", MIDDLE)
    lab.on_workers("over-the-head", 2)
    trials = lab.home / "runs" / "search" / "trials"
    wait_for(lambda: len(list(trials.glob("*/end.json"))) >= 2, 240, "two ended trials")
    before = lab.status()["head"]
    assert lab.step("over-the-head") < 1200 and len(list(trials.glob("*/end.json"))) < 12
    lab.bed.run(f"scontrol requeue {before['job']}")
    wait_for(
        lambda: (now := lab.status()["head"]) is not None and now["generation"] > before["generation"],
        120,
        "the new head",
    )
    assert check(lab, undisturbed[MIDDLE], "over-the-head")["steps_repeated"] <= INTERVAL + 1
    lab.result("search", 400)
    parameters = [path.read_text() for path in trials.glob("*/params.json")]
    assert len(parameters) == len(set(parameters)) == len(list(trials.glob("*/end.json"))) == 12
    assert lab.mlflow("search") == ["FINISHED"] * 13


def test_idle_nodes_are_given_back(lab: Lab) -> None:
    wait_for(lambda: not lab.workers(), 120, "idle nodes to be released")
