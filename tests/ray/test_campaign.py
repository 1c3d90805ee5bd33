"""Faults on real Ray that `make test-faults` adds to those of the other files here."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.ray.conftest import Lab
from tests.ray.test_train import RECIPE
from tests.wait import wait_for

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(600)]
WINDOW_SECONDS = 1.0


@pytest.mark.fault(2)
def test_workers_that_always_die_end_the_run(lab: Lab, ards_data: Path) -> None:
    """Each worker is killed before its first step: the run gives up after its budget, says so, and can be resumed."""
    recipe = (*RECIPE, "scaling.max_failures=2")
    run = lab.start("train", "ards", "--data", ards_data, "--workers", 1, "--name", "doomed", *recipe)
    killed: set[int] = set()

    def kill_new_workers() -> bool:
        for group in lab.cluster.groups:
            with suppress(psutil.Error):  # the node of an earlier test is gone
                for process in psutil.Process(group.pid).children(recursive=True):
                    if process.pid not in killed and process.cmdline()[0].startswith("ray::Worker"):
                        process.kill()
                        killed.add(process.pid)
        return run.poll() is not None

    wait_for(kill_new_workers, 250, "the end of the run")
    said = run.communicate(10)
    assert run.returncode == 1 and len(killed) == 3, said
    assert "died 3 times without a step between" in said and "raylab resume doomed" in said
    assert "Traceback" not in said
    assert [one.info.status for one in lab.mlflow_runs() if one.info.run_name == "doomed"] == ["FAILED"]
    undisturbed = lab.run("train", "ards", "--data", ards_data, "--workers", 0, *recipe)
    assert lab.run("resume", "doomed")["weights_sha256"] == undisturbed["weights_sha256"]
    assert [one.info.status for one in lab.mlflow_runs() if one.info.run_name == "doomed"] == ["FINISHED"]


@pytest.mark.fault(6)
def test_a_node_that_goes_before_it_could_save(lab: Lab, ards_data: Path) -> None:
    """The only worker has a second between the notice and the kill; the run goes on elsewhere from what is complete."""
    node = lab.cluster.add_node(cpus=4)
    recipe = (*RECIPE, "loop.epochs=400", "loop.checkpoint_steps=100")
    undisturbed = lab.run("train", "ards", "--data", ards_data, "--workers", 0, *recipe)
    # More CPUs than the head has: the worker must be on the node, until another node comes
    words = ("train", "ards", "--data", ards_data, "--workers", 1, "--name", "rushed", *recipe)
    run = lab.start(*words, "scaling.cpus_per_worker=4")
    lab.at_step("rushed", 150)
    node.send_signal(signal.SIGTERM)
    time.sleep(WINDOW_SECONDS)
    os.killpg(node.pid, signal.SIGKILL)
    lab.cluster.add_node(cpus=4)
    output = run.communicate(400)
    assert run.returncode == 0, output
    result = lab.run("resume", "rushed")
    assert result["steps_repeated"] <= 100 + 1 and result["gaps"] == 0
    assert result["damaged_checkpoints"] == 0
    assert result["weights_sha256"] == undisturbed["weights_sha256"]


def test_scenes_give_the_same_weights_on_any_number_of_workers(lab: Lab, landcover_data: Path) -> None:
    words = ("train", "landcover", "--data", landcover_data, "--smoke", "--set", "loop.epochs=2")
    alone, *others = (lab.run(*words, "--workers", n)["weights_sha256"] for n in range(4))
    assert others == [alone] * 3
