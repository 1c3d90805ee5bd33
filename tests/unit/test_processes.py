"""Finding processes that a file names, and ending them."""

import os
import subprocess

import psutil
import pytest

from raylab import processes
from raylab.processes import StartedProcess, end_tree, find_own


def test_what_ignores_its_end_is_killed_with_what_it_has_started():
    script = "trap '' TERM; sleep 60 & echo started; wait; sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as shell:
        assert shell.stdout.readline() == b"started\n"
        process = psutil.Process(shell.pid)
        started = [StartedProcess.of(one.pid) for one in (process, *process.children())]
        assert len(started) == 2 and all(map(find_own, started))
        end_tree(process, process.terminate, 0.2)
        assert not any(map(find_own, started))


def test_a_clock_that_is_set_changes_no_process():
    own = StartedProcess.of(os.getpid())
    assert own.start and find_own(own.model_copy(update={"started": own.started + 3600.0}))


@pytest.mark.parametrize("place", ["boot", "ticks"])
def test_a_later_process_with_the_same_id_is_another(place):
    own = StartedProcess.of(os.getpid())
    boot, ticks = own.start.split("/")
    start = f"{boot}/{int(ticks) - 1}" if place == "ticks" else f"{'0' * len(boot)}/{ticks}"
    assert find_own(own.model_copy(update={"start": start})) is None


@pytest.mark.parametrize(("seconds", "is_found"), [(0.0, True), (-1.0, True), (1.0, True), (2.0, False)])
def test_a_file_of_an_earlier_version_has_the_start_by_the_clock(seconds, is_found):
    """Such a clock may differ by a second from the one that is computed now."""
    own = StartedProcess.of(os.getpid())
    old = StartedProcess(pid=own.pid, started=own.started + seconds)
    assert (find_own(old) is not None) is is_found


def test_a_kernel_that_tells_no_start_leaves_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    own = StartedProcess.of(os.getpid())
    assert own.start == "" and find_own(own)


def test_a_name_with_parentheses_hides_no_start(tmp_path, monkeypatch):
    (tmp_path / "7").mkdir()
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("b-1\n")
    (tmp_path / "7" / "stat").write_text("7 (a) b (c) S " + " ".join(str(n) for n in range(4, 53)))
    monkeypatch.setattr(processes, "PROC", tmp_path)
    assert processes.read_start(7) == "b-1/22"
