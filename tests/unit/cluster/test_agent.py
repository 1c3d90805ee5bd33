"""What the agent of a node records of a start that fails: only what says something of the node."""

import os
import signal

import pytest

from cluster import client
from cluster.directory import Directory
from cluster.node import agent
from cluster.node.ray_process import StartError


@pytest.fixture
def cluster(make_spec, slurm, tmp_path, monkeypatch) -> Directory:
    directory, _ = client.up(make_spec(), tmp_path, slurm)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the agent changes it
    monkeypatch.setattr("sys.argv", ["agent", str(directory.path), "worker", "--generation", "0"])
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield directory
    for number, handler in before.items():
        signal.signal(number, handler)


def fail_to_start(monkeypatch: pytest.MonkeyPatch, told: signal.Signals | None) -> None:
    """Let Ray not start, because this node is told to end meanwhile, or of its own."""

    def work(node: agent.RayNode, *arguments: object) -> int:
        if told is not None:
            signal.raise_signal(told)
        raise StartError("Ray did not start on this node")

    monkeypatch.setattr(agent.RayNode, "work", work)


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
def test_a_node_that_is_told_to_end_while_ray_starts_is_no_problem(cluster, monkeypatch, told):
    fail_to_start(monkeypatch, told)
    assert agent.main() == 0
    assert cluster.problems() == []


def test_a_node_on_which_ray_does_not_start_is_one(cluster, monkeypatch):
    fail_to_start(monkeypatch, None)
    assert agent.main() == 1
    assert [problem["job"] for problem in cluster.problems()] == ["7.0"]
