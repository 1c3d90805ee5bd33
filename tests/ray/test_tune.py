"""Searches on real Ray Tune."""

import json
from pathlib import Path

import pytest

from tests.ray.conftest import Lab
from tests.wait import wait_for

SMALL = ("--smoke", "--set", "loop.epochs=4")


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


@pytest.mark.slow
def test_distributed_trials(lab: Lab, ards_data: Path) -> None:
    result = lab.run(
        "tune", "ards", "--data", ards_data, "--trials", 1, "--workers-per-trial", 2, "--concurrent", 1,
        "--scheduler", "fifo", "--name", "distributed", *SMALL,
    )  # fmt: skip
    assert result["ended"] == {"planned": 1}
