"""raylab on a test cluster: its command line outside, Slurm inside, and what a run left behind."""

import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raylab.files import read_lines
from raylab.training import checkpoint
from raylab.training.ledger import summarise_ledger
from tests import paced
from tests.paced import PACED
from tests.slurm.conftest import Bed
from tests.verbs import Verb, Verbs
from tests.wait import wait_for

SITES = """
[testbed]
idle_seconds = 40
[testbed.nodes.spot]
cpus = 1
memory_mb = 2500
partition = "preempt"
"""
INTERVAL = 50
RECIPE = (
    "--smoke", "--set", f"loop.checkpoint_steps={INTERVAL}", "loop.ema_decay=0.9", "model.dropout=0.2",
)  # fmt: skip
# Until it is stopped. Under a constant rate the state after a step does not depend on how many are planned
CONSTANT = "schedule.kind=constant"
ENDLESS = (PACED, CONSTANT, "loop.epochs=100000")


class Lab:
    """A RAYLAB_HOME on the testbed's shared storage, with prepared data, and raylab's verbs over it."""

    def __init__(self, bed: Bed, data: Path, verbs: Verbs, name: str = "raylab") -> None:
        self.bed, self.home, self.verbs = bed, bed.shared / name, verbs
        self.data = self.home / "ards"
        self.jobs: dict[str, str] = {}  # run -> its Ray job
        self.home.mkdir()
        shutil.copytree(data, self.data)
        (self.home / "sites.toml").write_text(SITES)
        self.environment = {
            **bed.environment,
            "RAYLAB_HOME": str(self.home),
            "RAYLAB_SITES": str(self.home / "sites.toml"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
        }

    def call(self, *words: object, seconds: float = 600) -> "subprocess.CompletedProcess[str]":
        output, errors = (self.home / f"said-{number}.txt" for number in (1, 2))
        # a session of its own: Linux shares a machine between sessions, and the nodes' processes have their own
        code = self.verbs.start(words, self.environment, output, errors).wait(seconds)
        return subprocess.CompletedProcess(words, code, output.read_text(), errors.read_text())

    def run(self, *words: object, seconds: float = 600) -> dict[str, Any]:
        """The verb's JSON result; it must succeed."""
        file = self.home / f"result-{secrets.token_hex(4)}.json"
        cut = words.index("--") if "--" in words else len(words)
        done = self.call(*words[:cut], "--json", file, *words[cut:], seconds=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(file.read_text())
        return result

    def status(self, name: str = "ray") -> dict[str, Any]:
        return self.run("cluster", "status", "--name", name)

    def train(self, name: str, workers: str, *more: str) -> None:
        """Submit a training to the cluster `ray`; returns at once."""
        words = (*self._words(name), "--workers", workers, *RECIPE, *more)
        sent = self.run("cluster", "submit", "--name", "ray", "--detach", "--", "python", "-m", "jobs.cli", *words)
        self.jobs[name] = sent["job"]

    def train_alone(self, name: str, *more: str) -> Verb:
        """Begin to train in one process, without Ray and Slurm."""
        words = (*self._words(name), "--workers", 0, *RECIPE, *more)
        return self.verbs.start(words, self.environment, self.home / f"said-{name}.txt")

    def _words(self, name: str) -> tuple[object, ...]:
        return ("train", "ards", "--plugin", paced.__file__, "--data", self.data, "--name", name)

    def stop(self, run: str) -> None:
        """Stop a run as its user would, and wait until its driver has ended."""
        self.run("cluster", "stop", "--name", "ray", self.jobs[run])
        path = self.home / "runs" / run / "run.json"
        wait_for(lambda: json.loads(path.read_text())["status"] == "KILLED", 120, f"the end of {run}")

    def ledger(self, run: str) -> list[dict[str, Any]]:
        return read_lines(self.home / "runs" / run / "ledger.jsonl")

    def facts(self, run: str) -> dict[str, Any]:
        """Attempts and repeated steps up to now."""
        return summarise_ledger(self.home / "runs" / run / "ledger.jsonl")

    def groups(self, run: str) -> list[dict[str, Any]]:
        """The ledger's lines of a start or a change of workers."""
        return [line for line in self.ledger(run) if "workers" in line]

    def step(self, run: str) -> int:
        return max((line["step"] for line in self.ledger(run) if "step" in line), default=0)

    def on_workers(self, run: str, workers: int, steps: int = 15, seconds: float = 300) -> None:
        """Wait until the run is `steps` into a group of so many workers."""

        def there() -> bool:
            lines = self.ledger(run)
            at = max((number for number, line in enumerate(lines) if "workers" in line), default=None)
            return at is not None and lines[at]["workers"] == workers and len(lines) - at > steps

        wait_for(there, seconds, f"{run} on {workers} workers", lambda: self.describe(run))

    def describe(self, run: str) -> str:
        """What a wait that was in vain leaves to look at: the run's last groups, the cluster, and Slurm's own view."""
        slurm = self.bed.run("squeue --format='%i %j %T %r %N %M'; sinfo --Node --format='%n %t %E'; date +%T")
        logs = sorted((self.home / "clusters" / "ray" / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime)
        ends = [f"{log.name}: {log.read_text(errors='replace')[-600:]}" for log in logs[-4:]]
        return "\n".join([*map(str, self.groups(run)[-3:]), json.dumps(self.status(), indent=1), slurm, *ends])

    def start_undisturbed(self, run: str) -> "Undisturbed":
        """Begin to train as many steps as the run's newest checkpoint has in one process, without Ray and Slurm."""
        here, damaged = checkpoint.find_newest(self.home / "runs" / run / "checkpoints")
        assert here is not None and not damaged
        facts = self.facts(run)
        assert facts["gaps"] == facts["damaged_checkpoints"] == 0
        step, alone = int(here.name.removeprefix("step-")), f"{run}-undisturbed"
        epochs = -(-step // 2)  # of 2 steps
        verb = self.train_alone(alone, PACED, CONSTANT, f"loop.epochs={epochs}", f"loop.checkpoint_steps={step}")
        return Undisturbed(verb, here, self.home / "runs" / alone / "checkpoints" / here.name)

    def result(self, run: str, seconds: float = 600) -> dict[str, Any]:
        """result.json of a run that has reached its last step, and its MLflow runs."""
        path = self.home / "runs" / run
        # the driver ends after the scores: only then is the run marked
        wait_for(lambda: json.loads((path / "run.json").read_text())["status"] == "FINISHED", seconds, f"{run}'s end")
        result: dict[str, Any] = json.loads((path / "result.json").read_text())
        return result

    def mlflow(self, name: str) -> list[str]:
        """States of the MLflow runs whose name begins so, which have ended, once what waits has been sent."""
        from mlflow import MlflowClient

        self.call("sync")
        client = MlflowClient(f"sqlite:///{self.home}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("raylab")
        assert experiment is not None

        def states() -> list[str]:
            found = client.search_runs([experiment.experiment_id], max_results=1000)
            return [run.info.status for run in found if run.info.run_name.startswith(name)]

        # `sync` leaves to the driver and to the head's forwarder what they are sending
        wait_for(lambda: "RUNNING" not in states(), 60, f"the end of {name} in MLflow")
        return states()

    def workers(self) -> list[dict[str, Any]]:
        """The worker jobs that run now, as `status` tells them."""
        return [job for job in self.status()["jobs"] if job["kind"] == "worker" and job["state"] == "running"]

    def is_training(self, run: str, job: dict[str, Any]) -> bool:
        """Whether a worker of the run's newest group computes in this job. A node that drains may still have one of
        the group before, and a node may hold two jobs."""
        pids = " ".join(map(str, self.groups(run)[-1]["pids"]))
        parent = "/proc/$(sed -n 's/^PPid:\\t//p' /proc/$pid/status)"  # Ray's agent: a worker has lost its environment
        tell = f"tr '\\0' '\\n' <{parent}/environ | grep -x SLURM_JOB_ID={job['job']}"
        found = f"for pid in {pids}; do grep -q ray::Worker /proc/$pid/cmdline && {tell}; done; true"
        return bool(self.bed.run(f"{{ {found}; }} 2>/dev/null", job["node"]).strip())


@dataclass
class Undisturbed:
    """A training that has not ended, with which the checkpoint of another is compared."""

    verb: Verb
    disturbed: Path
    own: Path

    def compare(self) -> None:
        """Weights, moments and averages are the same, to the bit."""
        assert self.verb.wait(600) == 0, self.verb.errors.read_text()
        state, expected = checkpoint.load(self.disturbed), checkpoint.load(self.own)
        for part in ("model", "average", "optim"):
            torch.testing.assert_close(state[part], expected[part], rtol=0, atol=0)


@contextmanager
def preemptible_cluster(testbed: Bed, data: Path, verbs: Verbs, name: str = "raylab") -> Iterator[Lab]:
    """A cluster named ray, of up to three preemptible nodes, that keeps none without work."""
    lab = Lab(testbed, data, verbs, name)
    lab.run("cluster", "up", "--site", "testbed", "--name", "ray", "--max", 3, "--node-type", "spot", "--time",
            "01:00:00", "--wait")  # fmt: skip
    yield lab
    lab.call("cluster", "down", "--name", "ray")
