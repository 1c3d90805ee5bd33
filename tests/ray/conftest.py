"""One real Ray cluster for all tests here: token-protected, on loopback, three logical CPUs. Its processes are
started in groups of their own and ended by id."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.node.ray_process import COMMON
from raylab.files import read_lines
from tests.verbs import MODULES, Verb, Verbs
from tests.wait import wait_for

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A head and the nodes added to it, each the process group of one `ray start --block`."""

    def __init__(self, temp: Path) -> None:
        self.temp = temp
        self.port, self.dashboard_port = free_port(), free_port()
        self.token = temp / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.address = f"127.0.0.1:{self.port}"
        self.environment = {
            **os.environ,
            **COMMON,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_ADDRESS": self.address,
        }
        self.groups: list[subprocess.Popen[bytes]] = []
        head = f"--head --port {self.port} --dashboard-port {self.dashboard_port} --include-dashboard true --num-cpus 3"
        # Ray's fixed ports may be another Ray's: without its agent, jobs are refused
        head += f" --dashboard-agent-listen-port {free_port()} --ray-client-server-port {free_port()}"
        self.start(f"{head} --temp-dir {temp}/ray --object-store-memory 150000000")
        wait_for(self.ready, 90, "Ray's dashboard")

    def start(self, options: str) -> "subprocess.Popen[bytes]":
        always = "--node-ip-address 127.0.0.1 --include-log-monitor false --disable-usage-stats --block"
        command = f"{BIN}/ray start {options} {always}"
        with (self.temp / f"start-{len(self.groups)}.log").open("wb") as log:
            group = subprocess.Popen(
                command.split(), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self.groups.append(group)
        return group

    def add_node(self, cpus: int) -> "subprocess.Popen[bytes]":
        """It has a directory of its own, as nodes on machines of their own have: Ray's agent of each node unpacks a
        job's code anew, and would remove it below the processes of the other."""
        temp = f"{self.temp}/node-{len(self.groups)}"
        return self.start(
            f"--address {self.address} --num-cpus {cpus} --object-store-memory 100000000 --temp-dir {temp}"
        )

    def ready(self) -> bool:
        assert self.groups[0].poll() is None, (self.temp / "start-0.log").read_text()[-3000:]
        with socket.socket() as probe:
            probe.settimeout(1)
            return probe.connect_ex(("127.0.0.1", self.dashboard_port)) == 0

    def stop(self) -> None:
        for group in reversed(self.groups):
            try:
                os.killpg(group.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            group.wait(10)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    temp = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))  # short: Ray's socket paths have 107 bytes at most
    running = Cluster(temp)
    yield running
    running.stop()
    shutil.rmtree(temp, ignore_errors=True)


class Lab:
    """raylab's command line on the cluster, with a home of its own."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home = cluster, home
        self.environment = {
            **cluster.environment, "RAYLAB_HOME": str(home), "XDG_CONFIG_HOME": str(home / "config")
        }  # fmt: skip
        self.verbs = Verbs(self.environment, (*MODULES, "raylab.distributed.train", "raylab.distributed.tune"))

    def start(self, *words: object) -> Verb:
        return self.verbs.start(words, self.environment, self.home / f"output-{secrets.token_hex(4)}.txt")

    def run(self, *words: object, expect: int = 0) -> dict[str, Any]:
        """The verb's JSON result; {"output": text} when it failed as expected."""
        file = self.home / f"result-{secrets.token_hex(4)}.json"
        verb = self.start(*words, "--json", file)
        output = verb.communicate(280)
        assert verb.returncode == expect, output + self.newest_ray_log()
        return {"output": output} if expect else {**json.loads(file.read_text()), "output": output}

    def newest_ray_log(self) -> str:
        """What Ray said last: it may have ended the verb without a word of the verb's own."""
        logs = sorted(self.home.glob("runs/*/ray.log"), key=lambda path: path.stat().st_mtime)
        return "".join(f"\n{log}:\n{log.read_text()[-2000:]}" for log in logs[-1:])

    def submit(self, *words: object, **environment: str) -> "subprocess.Popen[str]":
        """Ray's own command, which ends with the job."""
        command = [f"{BIN}/ray", "job", "submit", "--address", f"http://127.0.0.1:{self.cluster.dashboard_port}"]
        variables = json.dumps({"env_vars": {"RAYLAB_HOME": str(self.home)}})
        command += ["--working-dir", ".", "--runtime-env-json", variables, "--", *map(str, words)]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ledger(self, name: str) -> list[dict[str, Any]]:
        return read_lines(self.home / "runs" / name / "ledger.jsonl")

    def at_step(self, name: str, step: int) -> list[dict[str, Any]]:
        """Wait until the run has computed `step`; its ledger."""

        def there() -> list[dict[str, Any]] | None:
            lines = self.ledger(name)
            return lines if any(line.get("step", 0) >= step for line in lines) else None

        found: list[dict[str, Any]] = wait_for(there, 250, f"step {step} of {name}")
        return found

    def mlflow_runs(self) -> list[Any]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.home}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("raylab")
        return list(client.search_runs([experiment.experiment_id], max_results=1000))


@pytest.fixture(scope="session")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(cluster, tmp_path_factory.mktemp("ray-home"))
    yield made
    made.verbs.stop()
