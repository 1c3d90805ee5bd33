"""Chunks of work on a real cluster: a worker killed in the middle costs its own chunk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from raylab.files import atomic_write
from tests.ray.conftest import ROOT, Cluster, wait_for

DRIVER = """
import sys
from pathlib import Path
import ray
from raylab.errors import RaylabError
from raylab.distributed.map import run_chunks
from tests.ray import test_map

ray.init(address="auto", log_to_driver=False)
work = getattr(test_map, sys.argv[1])
try:
    run_chunks(work, {Path(sys.argv[2]) / f"{i:02d}": i for i in range(8)})
except RaylabError as error:
    sys.exit(str(error))
"""


def slow_square(number: int, path: Path) -> None:
    (path.parent / "tries" / f"{path.name}.{os.getpid()}").touch()
    if number == 5:  # does not end until it was killed once
        while len(list((path.parent / "tries").glob("05.*"))) < 2:
            time.sleep(0.05)
    with atomic_write(path) as beside:
        beside.write_text(str(number**2))


def fail_at_three(number: int, path: Path) -> None:
    if number == 3:
        raise ValueError("three is refused")
    slow_square(number if number != 5 else 25, path)


def start(cluster: Cluster, work: str, directory: Path) -> "subprocess.Popen[str]":
    (directory / "tries").mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, work, str(directory)],
        cwd=ROOT,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_worker_costs_its_own_chunk(cluster: Cluster, tmp_path: Path) -> None:
    driver = start(cluster, "slow_square", tmp_path)
    victim = wait_for(lambda: list((tmp_path / "tries").glob("05.*")), 90, "chunk 5 to begin")
    os.kill(int(victim[0].suffix[1:]), signal.SIGKILL)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, output
    assert [(tmp_path / f"{i:02d}").read_text() for i in range(8)] == [str(i**2) for i in range(8)]
    tries = [path.name[:2] for path in (tmp_path / "tries").iterdir()]
    assert sorted(tries) == ["00", "01", "02", "03", "04", "05", "05", "06", "07"]


def test_an_exception_of_the_work_ends_the_map(cluster: Cluster, tmp_path: Path) -> None:
    driver = start(cluster, "fail_at_three", tmp_path)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == 1, output
    assert "chunk 03 failed\n  why:  ValueError: three is refused" in output
    assert "Traceback" not in output
    assert not (tmp_path / "03").exists()
