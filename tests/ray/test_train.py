"""Training on real Ray: the number of workers, kills and preemptions leave the result as it is."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from raylab.memory import KERNEL_LOG
from tests.cgroup import memory_cgroup
from tests.ray.conftest import Lab
from tests.unit.tasks.test_plugins import MODEL
from tests.wait import wait_for

RECIPE = (
    "--smoke", "--set", "loop.epochs=200", "loop.shards=4", "loop.ema_decay=0.9", "loop.checkpoint_steps=10",
    "model.dropout=0.2",
)  # fmt: skip


@pytest.fixture(scope="session")
def calm(lab: Lab, ards_data: Path) -> dict[str, Any]:
    """The undisturbed run, in one process without Ray."""
    return lab.run("train", "ards", "--data", ards_data, "--workers", 0, "--name", "calm", *RECIPE)


@pytest.mark.timeout(600)
@pytest.mark.fault(1)
def test_a_killed_worker_changes_nothing(lab: Lab, ards_data: Path, calm: dict[str, Any]) -> None:
    """Up to three workers, which do not divide the four shards; after the kill the others go on in place. The run is a
    job submitted with Ray's own command, to a cluster that asks for a token."""
    words = ("python", "-m", "jobs.train", "ards", "--data", ards_data, "--workers", "1:3", "--name", "killed")
    job = lab.submit(*words, *RECIPE)
    lab.at_step("killed", 15)

    def group() -> list[int]:
        pids: list[int] = [line["pids"] for line in lab.ledger("killed") if "workers" in line][-1]
        return pids if len(pids) > 1 else []

    os.kill(wait_for(group, 120, "a second worker")[-1], signal.SIGKILL)
    output, _ = job.communicate(timeout=250)
    assert job.returncode == 0 and "finished killed" in output, output
    result = lab.run("resume", "killed")
    assert result["weights_sha256"] == calm["weights_sha256"]
    assert result["val_loss"] == calm["val_loss"]
    assert result["steps"] == calm["steps"] == result["planned_steps"]
    assert result["attempts"] == 1 and result["regroups"] >= 1
    assert result["gaps"] == result["steps_repeated"] == 0
    runs = [run for run in lab.mlflow_runs() if run.info.run_name == "killed"]
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = {point.step for point in history_of(lab, runs[0].info.run_id, "train/loss")}
    assert history == set(range(1, calm["steps"] + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_preempted_node_repeats_nothing(lab: Lab, ards_data: Path) -> None:
    """SIGTERM to a node's `ray start --block`: warned ahead, its worker hands over before the node goes."""
    node = lab.cluster.add_node(cpus=2)
    # The head's 3 CPUs hold one worker; 400 epochs last until the drain is noticed
    recipe = (*RECIPE, "loop.epochs=400", "loop.checkpoint_steps=10000", "scaling.cpus_per_worker=2")
    undisturbed = lab.run("train", "ards", "--data", ards_data, "--workers", 0, *recipe)

    def size() -> int:
        return int([line["workers"] for line in lab.ledger("preempted") if "workers" in line][-1])

    run = lab.start("train", "ards", "--data", ards_data, "--workers", "1:2", "--name", "preempted", *recipe)
    wait_for(lambda: lab.ledger("preempted") and size() == 2, 120, "both workers")
    node.send_signal(signal.SIGTERM)
    output = run.communicate(400)
    assert run.returncode == 0, output
    result = lab.run("resume", "preempted")
    assert result["workers"][-2:] == [2, 1]
    assert result["attempts"] == 1 and result["steps_repeated"] == 0
    assert result["gaps"] == 0
    assert result["weights_sha256"] == undisturbed["weights_sha256"]
    wait_for(lambda: node.poll() is not None, 60, "the node's end")


@pytest.mark.fault(25)
def test_a_loss_that_is_no_number_fails_at_once(lab: Lab, ards_data: Path) -> None:
    failed = lab.run(
        "train", "ards", "--data", ards_data, "--smoke", "--workers", 2, "--name", "nan",
        "--set", "optim.lr=1e30", "optim.max_grad_norm=None", expect=1,
    )  # fmt: skip
    assert "lower optim.lr" in failed["output"]
    assert "Traceback" not in failed["output"]
    assert sum("start" in line for line in lab.ledger("nan")) == 1, "it was retried, though it would fail again"
    assert [run.info.status for run in lab.mlflow_runs() if run.info.run_name == "nan"] == ["FAILED"]


@pytest.mark.slow
def test_a_plugin_that_fails_on_a_worker_is_named_with_its_line(lab: Lab, ards_data: Path, tmp_path: Path) -> None:
    """At once, in a run as in a search: it would fail again."""
    text = MODEL.replace(
        "return self.head(", "if self.training and len(x) > 1: raise KeyError('patient-17')\n        return self.head("
    )
    plugin = tmp_path / "tiny.py"
    plugin.write_text(text)
    words = ("ards", "--plugin", plugin, "--data", ards_data, "--smoke", "--set", "model.name=tiny")
    for verb, more in (("train", ("--workers", "1:1")), ("tune", ("--trials", 2))):
        failed = lab.run(verb, *words, *more, "--name", f"{verb}-plugin", expect=1)
        assert "the code of the plugin tiny.py failed (line 25: KeyError)" in failed["output"], failed["output"]
        assert "'patient-17'" in failed["output"] and "Traceback" not in failed["output"]
        record = (lab.home / "runs" / f"{verb}-plugin" / "run.json").read_text()
        assert "line 25: KeyError" in record and "patient-17" not in record
    assert sum("start" in line for line in lab.ledger("train-plugin")) <= 1
    runs = [run for run in lab.mlflow_runs() if "-plugin" in run.info.run_name]
    assert {run.info.status for run in runs} == {"FAILED"}
    assert not any("patient-17" in text for run in runs for text in run.data.tags.values())


def test_a_signal_ends_a_run_and_a_search_on_ray(lab: Lab, ards_data: Path) -> None:
    words = ("--data", ards_data, "--smoke", "--set", "loop.epochs=100000")
    run = lab.start("train", "ards", *words, "--workers", "1:1", "--name", "ended")
    lab.at_step("ended", 10)
    os.kill(run.pid, signal.SIGHUP)
    output = run.communicate(120)
    assert run.returncode == 130 and "Traceback" not in output, output
    search = lab.start("tune", "ards", *words, "--trials", 2, "--scheduler", "fifo", "--name", "ended-search")
    trials = lab.home / "runs" / "ended-search" / "trials"

    def is_there() -> bool:
        """A trial trains, and the driver, which hears of its start a little later, has opened its run."""
        return any((path.parent / "run.json").is_file() for path in trials.glob("*/ledger.jsonl"))

    wait_for(lambda: is_there() or search.poll() is not None, 200, "a trial that trains")
    os.kill(search.pid, signal.SIGTERM)
    output = search.communicate(120)
    assert search.returncode == 130 and "Traceback" not in output, output
    states = {run.info.run_name: run.info.status for run in lab.mlflow_runs() if run.info.run_name.startswith("ended")}
    opened = {f"ended-search-{path.parent.name}" for path in trials.glob("*/run.json")}  # either may start first
    assert opened and states.keys() == {"ended", "ended-search", *opened} and set(states.values()) == {"KILLED"}


@pytest.mark.fault(4)
def test_a_worker_that_runs_out_of_memory_is_named(lab: Lab, ards_data: Path) -> None:
    """It is put into a cgroup in which there is no room for what it allocates next."""
    if not os.access(KERNEL_LOG, os.R_OK):
        pytest.skip("a process that has moved to another cgroup is recognised in the kernel's log alone")
    with memory_cgroup("ray") as cgroup:
        cgroup.limit(2 << 20)
        run = lab.start(
            "train", "ards", "--data", ards_data, "--smoke", "--workers", "1:1", "--name", "large",
            "--set", "loop.epochs=100000", "scaling.max_failures=0",
        )  # fmt: skip
        lines = lab.at_step("large", 10)
        (pid,) = next(line["pids"] for line in lines if "pids" in line)
        cgroup.take(pid)
        output = run.communicate(120)
    assert run.returncode == 1 and "Traceback" not in output, output
    assert f"process {pid} on" in output and "ran out of memory" in output and "loop.global_batch_size" in output
    (tracked,) = [run for run in lab.mlflow_runs() if run.info.run_name == "large"]
    assert tracked.info.status == "FAILED" and "ran out of memory" in tracked.data.tags["raylab.error"]


def history_of(lab: Lab, run_id: str, metric: str) -> list[Any]:
    from mlflow import MlflowClient

    return list(MlflowClient(f"sqlite:///{lab.home}/mlflow/mlflow.db").get_metric_history(run_id, metric))
