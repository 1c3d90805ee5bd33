"""Out of memory is named: with the process, what it used, and what there was."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from raylab import memory
from raylab.errors import OutOfMemoryError, RunError
from raylab.memory import explain_memory_error
from raylab.witness import read_death, witness
from tests.cgroup import Cgroup, memory_cgroup
from tests.wait import wait_for

MB = 1 << 20
GROW = """
import sys
import time
from pathlib import Path
from raylab.witness import witness
with witness(Path(sys.argv[1]), sys.argv[2:]):
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))
"""


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    with memory_cgroup("memory") as made:
        made.limit(100 * MB)
        yield made


def test_a_process_that_the_kernel_ends_for_memory_is_named(cgroup: Cgroup, tmp_path: Path) -> None:
    note, told = tmp_path / "deaths" / "worker-0.json", tmp_path / "told"
    words = [sys.executable, "-c", GROW, str(note), sys.executable, "-c", f"open({str(told)!r}, 'w')"]
    ended = subprocess.run(words, preexec_fn=cgroup.join, capture_output=True)
    assert ended.returncode == -signal.SIGKILL and ended.stderr == b""
    death = read_death(note, "first", seconds=20)
    assert isinstance(death, OutOfMemoryError)
    assert death.what.endswith(f"on {os.uname().nodename} ran out of memory")
    assert "0.10 GB are there" in death.why and "raylab resume first" in death.do
    assert not note.exists()
    wait_for(told.exists, 20, "the command that the witness runs")


def test_the_kernels_log_says_what_a_process_used(cgroup: Cgroup, tmp_path: Path) -> None:
    began = time.monotonic() - 5
    ended = subprocess.Popen([sys.executable, "-c", GROW, str(tmp_path / "note")], preexec_fn=cgroup.join)
    ended.wait(30)
    if not (used := memory.read_kernel_log(ended.pid, began)):
        pytest.skip("the kernel's log cannot be read here, or has lost it")
    assert 30 * MB < used <= 110 * MB


def test_a_process_that_is_killed_otherwise_did_not_run_out_of_memory(tmp_path: Path) -> None:
    ready = "with witness(Path(sys.argv[1])):\n    print('ready', flush=True)\n    sys.stdin.read()"
    words = [sys.executable, "-c", GROW.partition("with witness")[0] + ready, str(tmp_path / "note")]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stdout.readline()
        process.kill()
    death = read_death(tmp_path / "note", "first", seconds=20)
    assert type(death) is RunError and "without a word" in death.what


def test_of_a_process_that_ends_nothing_is_noted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its own"), witness(tmp_path / "note"):
        raise ValueError("its own")
    assert not list(tmp_path.iterdir())
    assert read_death(tmp_path / "note", "first") is None


def test_errors_of_allocators_are_named() -> None:
    for allocate in (lambda: torch.empty(1 << 58), lambda: np.empty(1 << 58), lambda: bytearray(1 << 62)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        failure = explain_memory_error(caught.value, "first")
        assert failure is not None
        assert f"process {os.getpid()}" in failure.what and "it used" in failure.why and "first" in failure.do
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
    assert explain_memory_error(on_gpu) is not None
    assert explain_memory_error(OSError(12, "Cannot allocate memory")) is not None
    assert explain_memory_error(RuntimeError("shapes do not match")) is None
    assert explain_memory_error(ValueError("out of memory")) is None


def test_limits_and_kills_of_both_versions_of_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    job = tmp_path / "job"
    job.mkdir()
    machine = memory.read_limit_bytes([])
    (job / "memory.max").write_text("max\n")
    assert memory.read_limit_bytes([job]) == machine > 0
    (job / "memory.max").write_text("1000\n")
    (job / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
    assert memory.read_limit_bytes([job]) == 1000 and memory.count_kills([job]) == 2
    old = tmp_path / "old"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (old / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    assert memory.read_limit_bytes([old]) == machine and memory.count_kills([old]) == 7
    assert json.loads(str(memory.count_kills([]))) >= 0
