"""What the supervisor of a run does without Ray; Ray itself is in tests/ray and tests/slurm."""

import subprocess
import sys
from pathlib import Path

import pytest

from raylab.distributed import train
from raylab.distributed.train import Running, Supervisor, first_on_node
from raylab.errors import RunError


def test_a_runs_supervisor_and_its_helpers_load_neither_torch_nor_ray_train():
    """What Ray's actors beside the workers import: torch is 500 MB and half of a start."""
    code = (
        "import sys; from raylab.distributed import allocation, membership, train, worker; "
        "print([name for name in ('torch', 'ray.train') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_one_worker_of_each_node_speaks_for_its_load():
    nodes = {"worker-0": "n1", "worker-1": "n1", "worker-2": "n2"}
    assert first_on_node(nodes) == {"worker-0", "worker-2"}
    del nodes["worker-0"]
    assert first_on_node(nodes) == {"worker-1", "worker-2"}, "another takes over from one that died"


def test_a_run_goes_on_without_a_node_that_differs():
    warnings: list[str] = []
    run = Supervisor.__new__(Supervisor)
    run.directory, run.on_warning = Path("runs/first"), warnings.append
    run.refused, run.step, run.workers = {}, 7, {"worker-0": None}
    run.note_refusal("n2", "its version of torch is 2.14")
    assert warnings == ["a new worker was refused: its version of torch is 2.14; training goes on without its node"]
    run.step = 0
    with pytest.raises(RunError, match=r"(?s)workers of run first differ.*torch is 2\.14.*raylab resume first"):
        run.note_refusal("n3", "its version of torch is 2.14")


def test_a_slow_start_is_told_once_with_worker_and_node(monkeypatch):
    warnings: list[str] = []
    run = Supervisor.__new__(Supervisor)
    run.on_warning, run.told = warnings.append, set()
    run.workers = {name: Running(None, None, "n7") for name in ("worker-0", "worker-1")}
    monkeypatch.setattr(train.ray, "nodes", lambda: [{"NodeID": "n7", "NodeManagerHostname": "node7"}])
    run.tell_slow({"worker-0": 10.0, "worker-1": 250.0, "dropped": 900.0})
    assert not warnings
    for seconds in (301.0, 302.0):
        run.tell_slow({"worker-0": 10.0, "worker-1": seconds})
    (warning,) = warnings
    assert warning.startswith("worker-1 on node7 is not ready after 301 s")
