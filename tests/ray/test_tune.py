"""Searches on real Ray Tune."""

import json
import signal
from pathlib import Path

import pytest

from raylab.files import read_lines
from tests.ray.conftest import Lab
from tests.wait import wait_for

SMALL = ("--smoke", "--set", "loop.epochs=4")


@pytest.mark.fault(10)
def test_a_killed_search_resumes_without_losing_or_doubling_a_trial(lab: Lab, ards_data: Path) -> None:
    trials = lab.home / "runs" / "search" / "trials"
    search = lab.start("tune", "ards", "--data", ards_data, "--trials", 6, "--name", "search", *SMALL)
    wait_for(lambda: len(list(trials.glob("*/end.json"))) >= 2, 200, "two ended trials")
    search.kill()
    search.wait(20)
    before = {path.parent.name: path.read_text() for path in trials.glob("*/params.json")}
    ended = len(list(trials.glob("*/end.json")))
    assert ended < 6
    result = lab.run("resume", "search")
    after = {path.parent.name: path.read_text() for path in trials.glob("*/params.json")}
    assert before.items() <= after.items()
    assert len(after) == len(set(after.values())) == result["trials"] == 6
    runs = [run for run in lab.mlflow_runs() if run.info.run_name.startswith("search")]
    assert len({run.info.run_name for run in runs}) == len(runs) == 7
    assert {run.info.status for run in runs} == {"FINISHED"}
    best = max(json.loads(path.read_text())["objective"] for path in trials.glob("*/end.json"))
    assert result["best_objective"] <= best
    assert result["registered"].startswith("raylab-ards-synthetic/")


@pytest.mark.fault(25)
def test_population_based_training_and_a_trial_that_fails(lab: Lab, ards_data: Path) -> None:
    result = lab.run(
        "tune", "ards", "--data", ards_data, "--trials", 3, "--scheduler", "pbt", "--search", "random",
        "--concurrent", 3, "--name", "population", "--space", "optim.lr=loguniform(1e-4,1e-2)",
        "optim.weight_decay=loguniform(1e-3,1e-1)", *SMALL,
    )  # fmt: skip
    assert result["trials"] == 3
    result = lab.run(
        "tune", "ards", "--data", ards_data, "--trials", 3, "--scheduler", "hyperband", "--name", "with-failures",
        "--space", "optim.lr=choice(1e-3,2e-3,1e30)", *SMALL, "optim.max_grad_norm=None",
    )  # fmt: skip
    assert result["trials"] == 3
    assert set(result["ended"]) <= {"planned", "stopped", "failed"}
    failures = [path.read_text() for path in (lab.home / "runs" / "with-failures" / "ray").rglob("error.txt")]
    assert len(failures) == result["ended"]["failed"] > 0
    assert all(text.count("Failure #") == 1 for text in failures), "what would fail again was started again"


@pytest.mark.slow
def test_distributed_trials(lab: Lab, ards_data: Path) -> None:
    result = lab.run(
        "tune", "ards", "--data", ards_data, "--trials", 1, "--workers-per-trial", 2, "--concurrent", 1,
        "--scheduler", "fifo", "--name", "distributed", *SMALL,
    )  # fmt: skip
    assert result["ended"] == {"planned": 1}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_whose_node_leaves_repeats_nothing(lab: Lab, ards_data: Path) -> None:
    """Of two trials, each on a node of its own, one is told to leave; it goes on where there is room."""
    node = lab.cluster.add_node(cpus=2)
    search = lab.start(
        "tune", "ards", "--data", ards_data, "--trials", 2, "--concurrent", 2, "--scheduler", "fifo", "--name", "moves",
        *SMALL, "loop.epochs=300", "loop.checkpoint_steps=100000", "scaling.cpus_per_worker=2",
        "scaling.max_failures=0",
    )  # fmt: skip
    trials = lab.home / "runs" / "moves" / "trials"

    def ledgers() -> list[list[dict[str, int]]]:
        return [read_lines(path) for path in sorted(trials.glob("*/ledger.jsonl"))]

    def is_training() -> bool:
        return len(ledgers()) == 2 and all(len(lines) > 20 for lines in ledgers())

    wait_for(lambda: is_training() or search.poll() is not None, 200, "both trials")
    node.send_signal(signal.SIGTERM)
    output = search.communicate(400)
    assert search.returncode == 0, output
    handed_over = [lines for lines in ledgers() if any("moved" in line for line in lines)]
    assert len(handed_over) == 1
    for lines in ledgers():
        steps = [line["step"] for line in lines if "step" in line]
        assert steps == list(range(1, 601)), "2 steps an epoch, each of them once"
    assert {json.loads(path.read_text())["how"] for path in trials.glob("*/end.json")} == {"planned"}
    wait_for(lambda: node.poll() is not None, 60, "the node's end")
