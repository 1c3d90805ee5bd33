"""What others rely on the test cluster for. Slurm's own times are in cluster/testbed/config.py."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import testbed as place
from cluster.testbed import control
from raylab.errors import UsageError
from tests.slurm.conftest import ROOT, Bed, make_testbed
from tests.wait import wait_for

pytestmark = pytest.mark.slurm
slow = pytest.mark.slow

STARTS = 'echo "start ${SLURM_RESTART_COUNT:-0}"\n'
# a daemon as Ray makes them: a session of its own, no parent, no terminal, deaf to polite signals
DAEMON = """
    deaf='trap : TERM HUP INT; while :; do bash -c "exec -a a-daemon sleep 997"; done'
    (setsid bash -c "$deaf" >/dev/null 2>&1 </dev/null &)
"""


def test_a_job_on_three_nodes(testbed: Bed):
    """Host names, home, the project and its Python, /tmp of their own, GPUs: what each node of one job tells."""
    script = f"""
        touch /tmp/of-$(hostname) /dev/shm/of-$(hostname); sleep .3
        cd {ROOT}
        .venv/bin/python -c 'import os, cluster.testbed as t; print(os.uname().nodename, t.root(), t.bin_directory())'
        echo $(hostname) $HOME $(pwd) $CUDA_VISIBLE_DEVICES $(ls -d /tmp/of-* /dev/shm/of-*)
    """
    file = testbed.shared / "three.sh"
    file.write_text(script)
    job = testbed.submit("--nodes=3 --gres=gpu:2", f"srun bash {file}\necho done $HOME")
    told = testbed.wait_for_output(job, "done").splitlines()
    for node in ("n1", "n2", "n3"):
        assert f"{node} {testbed.root} {testbed.root}/bin" in told
        assert f"{node} {testbed.shared}/home {ROOT} 0,1 /dev/shm/of-{node} /tmp/of-{node}" in told
    assert told[-1] == f"done {testbed.shared}/home"


def test_a_verb_without_a_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAYLAB_TESTBED", str(tmp_path / "none"))
    assert place.bin_directory() is None
    control.down(place.root())
    with pytest.raises(UsageError, match="no testbed is up"):
        control.crash(place.root(), "n1")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="was not changed"):
        control.down(place.root())
    assert (tmp_path / "none").is_dir()


@slow
def test_two_steps_on_one_node_have_different_gpus(testbed: Bed):
    one = "srun --nodes=1 --ntasks=1 --nodelist=n1 --mem=100 --gres=gpu:1 sh -c 'echo $CUDA_VISIBLE_DEVICES; sleep 1'"
    assert sorted(testbed.run(f"{one} & {one} & wait").split()) == ["0", "1"]


@slow
def test_a_job_over_its_memory_is_killed(testbed: Bed):
    greedy = f"{ROOT}/.venv/bin/python -c 'import time; held = bytearray(600 * 2**20); time.sleep(60)'"
    job = testbed.submit("--nodes=1 --mem=200", greedy)
    testbed.wait_for_state(job, "OUT_OF_MEMORY" if testbed.has_cgroups() else "FAILED")


@slow
def test_what_slurm_does_to_a_job(testbed: Bed):
    """A warning ahead of the time limit, a requeue and a preemption, at once on three nodes: each takes its time."""
    deaf = "trap 'echo warned' TERM\n" + STARTS + "while :; do sleep 1; done"
    limited = testbed.submit(
        "--nodes=1 --nodelist=n1 --time=1 --signal=B:USR1@50", "trap 'echo warned; exit 0' USR1\nsleep 100 & wait"
    )
    preempted = testbed.submit("--partition=preempt --nodes=1 --nodelist=n2 --exclusive", deaf)
    requeued = testbed.submit("--nodes=1 --nodelist=n3", STARTS + "sleep 100")
    testbed.wait_for_output(preempted, "start 0")
    stronger = testbed.submit("--nodes=1 --nodelist=n2 --exclusive", "true")
    testbed.wait_for_output(requeued, "start 0")
    testbed.run(f"scontrol requeue {requeued}")

    testbed.wait_for_output(requeued, "start 1", 60)
    told = testbed.wait_for_output(preempted, "start 1", 60)
    assert "warned" in told and "PREEMPTION" in told
    assert testbed.job_state(stronger) == "COMPLETED"
    testbed.wait_for_output(limited, "warned", 60)
    testbed.wait_for_state(limited, "COMPLETED")
    testbed.run(f"scancel {requeued} {preempted}")


@slow
def test_a_cancelled_job_leaves_no_daemon(testbed: Bed):
    leaves_none(testbed)


def leaves_none(bed: Bed) -> None:
    job = bed.submit("--nodes=1 --nodelist=n3", DAEMON + "sleep 100")
    wait_for(lambda: "a-daemon" in bed.processes("n3"), 20, "the daemon")
    bed.run(f"scancel {job}")
    wait_for(lambda: not bed.run(f"squeue --noheader --jobs={job}"), 45, "the job's end")
    wait_for(lambda: "a-daemon" not in bed.processes("n3"), 5, "the daemon's end")


@slow
def test_a_crash_ends_or_requeues_the_node_s_jobs(testbed: Bed):
    again = testbed.submit("--nodes=1 --nodelist=n1 --mem=100 --ntasks=1", STARTS + "sleep 100")
    once = testbed.submit("--no-requeue --nodes=1 --nodelist=n1 --mem=100 --ntasks=1", STARTS + "sleep 100")
    other = testbed.submit("--nodes=1 --nodelist=n2 --mem=100 --ntasks=1", STARTS + "sleep 100")
    for job in (again, once, other):
        testbed.wait_for_output(job, "start 0")
    testbed.run("touch /tmp/before", on="n1")
    testbed.verb("crash", "n1")
    testbed.verb("boot", "n1")
    assert not testbed.run("ls /tmp/before 2>/dev/null || true", on="n1")
    testbed.wait_for_state(once, "NODE_FAIL")
    testbed.wait_for_output(again, "start 1")
    assert testbed.output(other) == "start 0\n"
    testbed.run(f"scancel {again} {other}")


@slow
def test_jobs_go_on_without_the_controller_or_the_network(testbed: Bed):
    job = testbed.submit("--nodes=1 --nodelist=n1", "for i in $(seq 100); do echo $i; sleep .2; done")
    testbed.wait_for_output(job, "1")
    testbed.verb("kill-controller")
    with pytest.raises(AssertionError, match="Unable to contact slurm controller"):
        testbed.run("squeue")
    before = testbed.output(job)
    wait_for(lambda: len(testbed.output(job)) > len(before), 5, "the job's next line")
    testbed.verb("start-controller")
    wait_for(lambda: testbed.job_state(job) == "RUNNING", 20, "the controller")
    reach = "timeout 2 bash -c ': </dev/tcp/n1/6818' && echo reached || true"
    assert testbed.run(reach) == "reached\n"
    testbed.verb("netdown", "n1")
    assert testbed.run(reach) == ""
    testbed.verb("netup", "n1")
    wait_for(lambda: testbed.run(reach), 10, "n1 on the network again")
    testbed.run(f"scancel {job}")


@slow
def test_a_command_ends_with_its_caller(testbed: Bed):
    """A time-out that kills `srun` here ends the step there."""
    caller = subprocess.Popen(
        [f"{testbed.root}/bin/srun", "--nodelist=n1", "sleep", "998"],
        env=testbed.environment,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: "sleep 998" in testbed.processes("n1"), 20, "the step")
    caller.kill()
    caller.wait(10)
    wait_for(lambda: "sleep 998" not in testbed.processes("n1"), 20, "the step's end")


@slow
def test_a_second_testbed_without_cgroups(testbed: Bed, monkeypatch: pytest.MonkeyPatch):
    """It is not mixed up with the first, daemons end with their job there too, and nothing is left of it."""
    monkeypatch.setattr(control, "has_cgroups", lambda name: False)
    make = contextlib.contextmanager(make_testbed)
    job = testbed.submit("--nodes=1 --nodelist=n3", "sleep 100")
    testbed.wait_for_state(job, "RUNNING")
    with make() as second:
        assert not second.has_cgroups()
        assert second.submit("--nodes=1", "sleep 100") == "1", "its numbers begin anew"
        leaves_none(second)
        assert str(second.root) in "".join(command_lines())
    left = [line for line in command_lines() if str(second.root) in line]
    assert not left
    assert str(second.root) not in Path("/proc/mounts").read_text()
    assert testbed.job_state(job) == "RUNNING"
    testbed.run(f"scancel {job}")


def command_lines() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield (process / "cmdline").read_text(errors="replace").replace("\0", " ")


@slow
def test_down_leaves_nothing(testbed: Bed):
    make = contextlib.contextmanager(make_testbed)
    with make() as second:
        job = second.submit("--nodes=3", DAEMON + "srun sleep 100")
        second.wait_for_state(job, "RUNNING")
        assert bool(cgroups_of(second)) == second.has_cgroups()
        control.down(second.root)
        assert not second.root.exists() and not cgroups_of(second)
        assert place.controller(second.root) is None
        assert not [line for line in command_lines() if str(second.root) in line]
    assert testbed.run("true") == ""


def cgroups_of(bed: Bed) -> list[Path]:
    return list(control.CGROUPS.glob(f"*/{control.Plan(bed.root).cgroup}"))
