"""A Ray cluster on real Slurm: it grows with the work, and what happens to its nodes changes no result."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paced import PACED
from tests.slurm.conftest import Bed
from tests.slurm.lab import ENDLESS, INTERVAL, Lab, Undisturbed, preemptible_cluster
from tests.verbs import Verbs
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def lab(testbed: Bed, ards_data: Path, verbs: Verbs) -> Iterator[Lab]:
    """A cluster named ray, of preemptible nodes, that keeps none without work."""
    with preemptible_cluster(testbed, ards_data, verbs) as lab:
        yield lab


SHORT = ("loop.epochs=100",)  # 2 steps an epoch
LONG = (PACED, "loop.epochs=400")  # at rest for 72 s


def check(lab: Lab, run: str, settings: tuple[str, ...]) -> dict[str, Any]:
    """The run ended as one did that nothing disturbed, in one process without Ray and Slurm, with one MLflow run."""
    alone = f"{run}-undisturbed"
    verb = lab.train_alone(alone, *settings)
    assert verb.wait(600) == 0, verb.errors.read_text()
    expected, result = lab.result(alone), lab.result(run)
    assert result["steps"] == result["planned_steps"] == expected["steps"]
    assert result["gaps"] == 0
    assert result["weights_sha256"] == expected["weights_sha256"]
    assert lab.mlflow(run) == ["FINISHED"] * 2  # the other is `alone`
    return result


@pytest.mark.fault(8)
def test_runs_grow_and_share_the_cluster(lab: Lab) -> None:
    """Workers come on demand. The first run has grown to all three nodes; the second gets its minimum from it, and
    neither waits for the other."""
    assert lab.status()["state"] == "ready"
    assert lab.workers() == []
    lab.train("first", "1:3", *ENDLESS)
    lab.on_workers("first", 3)
    assert len({job["node"] for job in lab.workers()}) == 3
    lab.train("second", "1:3", *SHORT)
    lab.on_workers("second", 1)
    lab.result("second")
    lab.stop("first")
    undisturbed = lab.start_undisturbed("first")
    assert check(lab, "second", SHORT)["steps_repeated"] == 0
    sizes = lab.facts("first")["workers"]
    assert 2 in sizes[sizes.index(3) :]
    assert lab.facts("first")["steps_repeated"] == 0
    undisturbed.compare()


@pytest.fixture(scope="module")
def run(lab: Lab) -> str:
    """The name of the run to which the faults below happen, one after the other."""
    lab.train("disturbed", "2", *ENDLESS)
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


def unplugged(bed: Bed, job: str, node: str) -> None:
    """A node that falls silent: no connection is reset, and its worker goes on by itself."""
    bed.verb("netdown", node)


FAULTS = {
    # what happens to a worker's job -> steps that may be computed twice
    cancelled: 0,
    told_to_end: 0,
    out_of_time: 0,
    preempted: 0,
    requeued: 0,
    unplugged: 0,
    crashed: 0,
}
MENDED_BY = {unplugged: "netup", crashed: "boot"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.fault(5, 7, 11, 12, 13, 16)
def test_a_worker_that_goes(lab: Lab, run: str, fault: Any) -> None:
    lab.bed.resume_drained()
    lab.on_workers(run, 2, steps=INTERVAL + 10)
    head = lab.status()["head"]["node"]
    victim = next(job for job in lab.workers() if job["node"] != head and lab.is_training(run, job))
    before = lab.facts(run)
    fault(lab.bed, victim["job"], victim["node"])
    try:
        wait_for(lambda: lab.facts(run)["regroups"] > before["regroups"], 300, "the next group")
        assert lab.facts(run)["steps_repeated"] - before["steps_repeated"] <= FAULTS[fault], lab.groups(run)
    finally:
        if fault in MENDED_BY:
            lab.bed.verb(MENDED_BY[fault], victim["node"])


@pytest.mark.fault(14)
def test_slurm_itself_away(lab: Lab, run: str) -> None:
    """Without slurmctld nothing new starts, and what runs goes on."""
    lab.bed.resume_drained()
    lab.on_workers(run, 2)
    groups, step = len(lab.groups(run)), lab.step(run)
    lab.bed.verb("kill-controller")
    try:
        assert lab.call("cluster", "status", "--name", "ray").returncode == 1
        wait_for(lambda: lab.step(run) > step + 150, 120, "150 steps without Slurm")
    finally:
        lab.bed.verb("start-controller")
    assert len(lab.groups(run)) == groups


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, run: str) -> Undisturbed:
    """The run to which all of that happened is stopped; what it is compared with computes while the next test waits."""
    lab.stop(run)
    return lab.start_undisturbed(run)


@pytest.mark.fault(9, 13)
def test_the_head_is_requeued(lab: Lab, undisturbed: Undisturbed) -> None:
    """A search and a run are in the middle; the new head resumes both into the MLflow runs that they had."""
    lab.train("over-the-head", "2", *LONG)
    lab.on_workers("over-the-head", 2)
    words = ("--data", lab.data, "--trials", 4, "--name", "search", "--smoke", "--set", "loop.epochs=20")
    search = ("python", "-m", "jobs.cli", "tune", "ards", *words)
    lab.run("cluster", "submit", "--name", "ray", "--detach", "--", *search)
    trials = lab.home / "runs" / "search" / "trials"
    wait_for(lambda: list(trials.glob("*/end.json")), 240, "an ended trial")
    before = lab.status()["head"]
    assert lab.step("over-the-head") < 800 and len(list(trials.glob("*/end.json"))) < 4
    lab.bed.run(f"scontrol requeue {before['job']}")
    wait_for(
        lambda: (now := lab.status()["head"]) is not None and now["generation"] > before["generation"],
        120,
        "the new head",
    )
    assert check(lab, "over-the-head", LONG)["steps_repeated"] <= INTERVAL + 1
    lab.result("search")
    parameters = [path.read_text() for path in trials.glob("*/params.json")]
    assert len(parameters) == len(set(parameters)) == len(list(trials.glob("*/end.json"))) == 4
    assert lab.mlflow("search") == ["FINISHED"] * 5


@pytest.mark.fault(5, 7, 11, 12, 13, 14, 16)
def test_after_all_of_it_the_weights_are_those_of_an_undisturbed_run(undisturbed: Undisturbed) -> None:
    undisturbed.compare()


def test_idle_nodes_are_given_back(lab: Lab) -> None:
    wait_for(lambda: not lab.workers(), 120, "idle nodes to be released")
