"""Ending processes."""

import subprocess

import psutil

from raylab.processes import end_tree, find_own


def test_what_ignores_its_end_is_killed_with_what_it_has_started():
    script = "trap '' TERM; sleep 60 & echo started; wait; sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as shell:
        assert shell.stdout.readline() == b"started\n"
        process = psutil.Process(shell.pid)
        started = {one.pid: one.create_time() for one in (process, *process.children())}
        end_tree(process, process.terminate, 0.2)
        assert len(started) == 2 and not any(find_own(*one) for one in started.items())
