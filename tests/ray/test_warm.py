"""`raylab warm` on real Ray: a run trains in processes that were there before it."""

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from jobs.common.warm_ray import OF_SHELLS
from raylab.files import read_lines
from tests.ray.conftest import BIN
from tests.wait import wait_for


@pytest.mark.timeout(300)
def test_runs_use_the_workers_that_wait(ards_data: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    plain = {name: text for name, text in os.environ.items() if not OF_SHELLS.fullmatch(name)}
    environment = {**plain, "RAYLAB_HOME": str(home)}

    def raylab(*words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [f"{BIN}/raylab", *map(str, words)]
        return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, timeout=200)

    def train(name: str, workers: int) -> str:
        words = ("--data", ards_data, "--smoke", "--workers", workers, "--name", name, "--quiet")
        done = raylab("train", "ards", *words)
        assert done.returncode == 0, done.stderr
        return done.stderr

    started = raylab("warm", "--workers", 1, "--quiet")
    assert started.returncode == 0, started.stderr
    warm = json.loads(started.stdout)
    try:
        assert warm["memory_bytes"] > 1e8
        (record,) = home.glob("warm-ray-*.json")
        assert record.stat().st_mode & 0o777 == 0o600
        processes = psutil.Process(warm["pid"]).children(recursive=True)
        waiting = {process.pid for process in processes if "ray::" in process.cmdline()[0]}
        said = train("warm", 1)
        (pids,) = [entry["pids"] for entry in read_lines(home / "runs" / "warm" / "ledger.jsonl") if "pids" in entry]
        assert (set(pids) - waiting, said) == (set(), ""), "it trained in a process that was there before"
        other = raylab("warm", OMP_NUM_THREADS="3")
        assert other.returncode == 2 and "changed since its start: OMP_NUM_THREADS" in other.stderr
    finally:
        stopped = raylab("warm", "--stop")
    assert stopped.stdout == "stopped\n"
    wait_for(lambda: not any(process.is_running() for process in processes), 30, "the end of all its processes")
    assert not record.exists()
    assert raylab("warm", "--stop").stdout == "no Ray is kept running for this home\n"
