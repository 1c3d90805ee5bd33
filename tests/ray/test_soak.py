"""Many small runs and searches, each with random faults: one hash each, no trial lost or doubled, nothing left RUNNING.

RAYLAB_SOAK says how many runs are tried (`make soak`: 50, and two searches), RAYLAB_SOAK_SEED which; the faults of each
are printed.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from raylab.files import read_lines
from tests.ray.conftest import Lab
from tests.verbs import Verb
from tests.wait import wait_for

COUNT = int(os.environ.get("RAYLAB_SOAK", "1"))
SEED = int(os.environ.get("RAYLAB_SOAK_SEED", "0"))
STEPS = 400
RECIPE = (
    "--smoke", "--set", f"loop.epochs={STEPS // 2}", "loop.checkpoint_steps=20", "loop.ema_decay=0.9",
    "model.dropout=0.2", "scaling.silence_seconds=5", "scaling.max_failures=5",
)  # fmt: skip
WORKERS = ("0", "1", "2", "1:3", "3")


@dataclass
class Disturbed:
    """A run that is started again whenever its driver has ended before its last step; `told`: what happened to it."""

    lab: Lab
    name: str
    words: tuple[object, ...]
    driver: Verb
    told: list[str] = field(default_factory=list)

    def lines(self) -> list[dict[str, Any]]:
        return self.lab.ledger(self.name)

    def step(self) -> int:
        return max((line.get("step", 0) for line in self.lines()), default=0)

    def wait_for_step(self, step: int) -> bool:
        """Whether the run has got there before its driver ended."""
        wait_for(lambda: self.step() >= step or self.driver.poll() is not None, 240, f"step {step} of {self.name}")
        return self.driver.poll() is None

    def workers(self) -> list[psutil.Process]:
        """The processes of the newest group that are alive."""
        pids = [line["pids"] for line in self.lines() if "pids" in line][-1]
        found = []
        for pid in pids:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if "ray::" in process.cmdline()[0]:
                    found.append(process)
        return found

    def go_on(self) -> None:
        """Resume it if its driver has ended too early."""
        if self.driver.poll() is not None and not (self.lab.home / "runs" / self.name / "result.json").is_file():
            has_begun = (self.lab.home / "runs" / self.name / "run.json").is_file()
            words = ("resume", self.name) if has_begun else self.words
            self.driver = self.lab.start(*words)


def send_to_worker(number: signal.Signals) -> Callable[[Disturbed, random.Random], None]:
    def send(run: Disturbed, chance: random.Random) -> None:
        if workers := run.workers():
            chance.choice(workers).send_signal(number)

    return send


def kill_all_workers(run: Disturbed, chance: random.Random) -> None:
    for worker in run.workers():
        worker.kill()


def send_to_driver(number: signal.Signals) -> Callable[[Disturbed, random.Random], None]:
    def send(run: Disturbed, chance: random.Random) -> None:
        os.kill(run.driver.pid, number)
        run.driver.wait(120)

    return send


TO_DRIVER = {
    "driver terminated": send_to_driver(signal.SIGTERM),
    "driver interrupted": send_to_driver(signal.SIGINT),
    "driver killed": send_to_driver(signal.SIGKILL),
}
TO_WORKERS = {
    "worker killed": send_to_worker(signal.SIGKILL),
    "worker stopped": send_to_worker(signal.SIGSTOP),
    "all workers killed": kill_all_workers,
}


@pytest.fixture(scope="module")
def expected(lab: Lab, ards_data: Path) -> str:
    """The weights of a run that nothing disturbed, in one process without Ray."""
    words = ("train", "ards", "--data", ards_data, "--workers", 0, "--name", "soak-undisturbed", *RECIPE)
    return str(lab.run(*words)["weights_sha256"])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", range(COUNT))
def test_a_run_under_random_faults(lab: Lab, ards_data: Path, expected: str, number: int) -> None:
    chance = random.Random(f"{SEED} {number}")
    workers = chance.choice(WORKERS)
    faults = {**TO_DRIVER, **(TO_WORKERS if workers != "0" else {})}
    name = f"soak-{number:03d}"
    words = ("train", "ards", "--data", ards_data, "--workers", workers, "--name", name, *RECIPE)
    run = Disturbed(lab, name, words, lab.start(*words))
    since = time.monotonic()
    for step in sorted(chance.sample(range(1, STEPS - 10), chance.randint(1, 3))):
        fault = chance.choice(sorted(faults))
        if run.wait_for_step(step):
            faults[fault](run, chance)
            run.told.append(f"{fault} at {run.step()}")
        run.go_on()
    wait_for(lambda: run.driver.poll() is not None, 240, f"the end of {name}")
    print(f"{name}  workers {workers:4} {time.monotonic() - since:5.1f} s  {', '.join(run.told)}")
    assert run.driver.returncode == 0, run.driver.output.read_text()[-3000:]
    result = json.loads((lab.home / "runs" / name / "result.json").read_text())
    assert result["weights_sha256"] == expected and result["steps"] == STEPS and result["gaps"] == 0
    assert [one.info.status for one in lab.mlflow_runs() if one.info.run_name == name] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(min(2, COUNT // 25)))
def test_a_search_under_random_faults(lab: Lab, ards_data: Path, number: int) -> None:
    """Its driver and one of its trials are killed at random moments."""
    chance = random.Random(f"{SEED} search {number}")
    recipe = ("--smoke", "--set", "loop.epochs=40", f"seed={number}")
    options = ("--trials", 6, "--search", "random", "--scheduler", "fifo", "--concurrent", 2, *recipe)
    calm = lab.run("tune", "ards", "--data", ards_data, "--name", f"calm-search-{number}", *options)
    name = f"soak-search-{number}"
    trials = lab.home / "runs" / name / "trials"

    def ended() -> int:
        return len(list(trials.glob("*/end.json")))

    driver = lab.start("tune", "ards", "--data", ards_data, "--name", name, *options)
    for count in sorted(chance.sample(range(5), 2)):
        wait_for(lambda count=count: ended() >= count and list(trials.glob("*/ledger.jsonl")), 200, "its trials")
        time.sleep(chance.random())  # anywhere in a trial
        if chance.random() < 0.5:
            pids = {
                line["pids"][0] for path in trials.glob("*/ledger.jsonl") for line in read_lines(path) if "pids" in line
            }
            for pid in pids:
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "ray::" in process.cmdline()[0]:
                        process.kill()
                        print(f"{name}  trial's process killed after {ended()} trials")
        else:
            driver.kill()
            driver.wait(20)
            print(f"{name}  driver killed after {ended()} trials")
            driver = lab.start("resume", name)
    output = driver.communicate(400)
    assert driver.returncode == 0, output
    again = lab.run("resume", name)
    assert again["trials"] == 6 and again["best_objective"] == calm["best_objective"]
    for trial in sorted(trials.glob("*")):
        other = lab.home / "runs" / f"calm-search-{number}" / "trials" / trial.name
        for file in ("params.json", "result.json"):
            ours, theirs = (json.loads((folder / file).read_text()) for folder in (trial, other))
            if file == "params.json":
                assert ours == theirs
            else:
                assert ours["weights_sha256"] == theirs["weights_sha256"]
    runs = [one for one in lab.mlflow_runs() if one.info.run_name.startswith(name)]
    assert len({one.info.run_name for one in runs}) == len(runs) == 7
    assert {one.info.status for one in runs} == {"FINISHED"}
