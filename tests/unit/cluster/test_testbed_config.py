"""What the test cluster tells Slurm, as text, and what it refuses before anything starts. tests/slurm runs it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import testbed
from cluster.testbed import config, control
from cluster.testbed.__main__ import main
from cluster.testbed.config import Plan
from cluster.testbed.faults import ABOUT, Fault
from raylab.errors import UsageError

PLAN = Plan(Path("/tmp/bed"), nodes=3, cpus=4, memory=6000, gpus=2)


def keys(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


def test_slurm_conf():
    conf = keys(config.slurm_conf(PLAN))
    assert conf["ProctrackType"] == "proctrack/cgroup", "it ends daemons too, and Ray makes daemons"
    assert conf["KillWait"] == "15"
    assert conf["NodeName"] == "n[1-3] NodeAddr=10.77.0.[1-3] CPUs=4 RealMemory=6000 Gres=gpu:fake:2"
    lines = config.slurm_conf(PLAN).splitlines()
    tiers = {line.split()[0]: line.split() for line in lines if line.startswith("PartitionName=")}
    assert (
        "PriorityTier=1" in tiers["PartitionName=preempt"] and "PreemptMode=REQUEUE" in tiers["PartitionName=preempt"]
    )
    assert "Default=YES" in tiers["PartitionName=batch"] and "PreemptMode=OFF" in tiers["PartitionName=debug"]


def test_slurm_conf_without_cgroups():
    conf = keys(config.slurm_conf(Plan(PLAN.root, cgroups=False)))
    assert conf["ProctrackType"] == "proctrack/linuxproc"
    assert conf["Epilog"] == "/tmp/bed/lib/epilog.sh"
    assert "cgroup=\n" in config.settings(Plan(PLAN.root, cgroups=False))


def test_other_sizes():
    plan = Plan(PLAN.root, nodes=2, cpus=8, memory=4000, gpus=1)
    assert "CPUs=8 RealMemory=4000 Gres=gpu:fake:1" in config.slurm_conf(plan)
    assert config.gres_conf(plan) == "NodeName=n[1-2] Name=gpu Type=fake File=/tmp/bed/etc/gpu[0-0]\n"
    assert config.hosts(plan).splitlines()[1:] == ["10.77.0.254 ctl", "10.77.0.1 n1", "10.77.0.2 n2"]


def render(plan: Plan) -> str:
    """All that the faults of a plan change."""
    files = (config.slurm_conf, config.gres_conf, config.job_submit, config.hosts, config.settings, config.task_prolog)
    return "\n".join(write(plan) for write in files) + repr(config.commands(plan))


EXPECTED = {
    Fault.ONE_CORE_AFFINITY: "TaskPlugin=task/affinity,task/cgroup\nTaskPluginParam=autobind=cores\n",
    Fault.WRONG_INTERFACE: "10.78.0.2 n2i\n",
    Fault.WHOLE_NODES: "GraceTime=0 OverSubscribe=EXCLUSIVE\n",
    Fault.TYPED_GRES: "Name=gpu Type=new File=/tmp/bed/etc/gpu[1-1]\n",
    Fault.MISSING_ACCOUNT: "return slurm.ESLURM_INVALID_ACCOUNT\n",
    Fault.JOB_LIMIT: "'MaxJobsPerUser=1'",
    Fault.NO_REQUEUE: "JobRequeue=0\n",
    Fault.QUOTA_FULL: "home_mb=1\n",
    Fault.MAINTENANCE: "'StartTime=now+10minutes'",
    Fault.TWO_PYTHONS: "python=/p/python3\nother_python=/usr/bin/python3\n",
    Fault.CLOCK_SKEW: "echo export LD_PRELOAD=/tmp/bed/lib/clock.so\n",
    Fault.LONG_SCRATCH: "echo export TMPDIR=/run/node-local-scratch/",
}


@pytest.mark.parametrize("fault", Fault)
def test_each_fault_changes_what_it_is_about(fault: Fault):
    plan = replace(
        PLAN,
        faults=frozenset({fault}),
        python=Path("/p/python3"),
        other_python=Path("/usr/bin/python3"),
    )
    assert EXPECTED[fault] in render(plan) and EXPECTED[fault] not in render(replace(plan, faults=frozenset()))
    assert ABOUT[fault]


def test_a_wrong_fault_is_answered_with_the_right_names(capsys: pytest.CaptureFixture[str]):
    assert main(["up", "--fault", "quota"]) == 2
    assert "quota-full" in capsys.readouterr().err
    assert main(["up", "--fault", "?"]) == 2
    names = capsys.readouterr().err
    assert all(fault in names for fault in Fault)


def test_a_fault_that_this_machine_cannot_produce_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(UsageError, match="cannot produce the fault one-core-affinity"):
        control.prepare(replace(PLAN, faults=frozenset({Fault.ONE_CORE_AFFINITY})))


def test_any_shared_path_survives_the_shell(tmp_path: Path):
    paths = (Path("/tmp/a b"), Path("/tmp/$HOME;'\"\n*"))
    (tmp_path / "settings.sh").write_text(config.settings(Plan(PLAN.root, shares=paths)))
    script = '. ./settings.sh; printf "%s\\0" "${shares[@]}" "${links[@]}"'
    told = subprocess.run(["bash", "-uc", script], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.split("\0")[:-1] == [*map(str, paths)]


def test_two_testbeds_have_two_cgroups():
    assert PLAN.cgroup != Plan(Path("/tmp/bed2")).cgroup
    assert PLAN.cgroup == Plan(Path("/tmp/bed"), nodes=1).cgroup


def test_shared_are_what_is_private_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkout below /tmp, the link to the data beside it and what it points to, what was asked for; each once."""
    for name in ("code/project/.venv", "store/data", "mine/inner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "code/shared").symlink_to(tmp_path / "store")
    monkeypatch.setattr(control, "PRIVATE", tmp_path)
    monkeypatch.setattr(control, "CHECKOUT", tmp_path / "code/project")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "code/project/.venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    asked = {"RAYLAB_TESTBED_SHARE": f"{tmp_path}/mine:{tmp_path}/mine/inner:/usr"}
    directories, links = control.shared(tmp_path / "bed", asked)
    assert directories == tuple(tmp_path / name for name in ("bed", "code/project", "mine", "store"))
    assert links == (tmp_path / "code/shared",)


@pytest.mark.parametrize("asked", ["relative", "/no/such/directory"])
def test_a_share_that_is_not_there_is_refused(asked):
    with pytest.raises(UsageError, match=f"'{asked}', which is not a directory"):
        control.shared(PLAN.root, {"RAYLAB_TESTBED_SHARE": asked})


@pytest.mark.parametrize("root", ["/tmp/" + "x" * 60, "/tmp/a b", "/tmp/a,b", "/dev/shm/bed", "/run/bed"])
def test_a_directory_that_slurm_cannot_use_is_refused(root):
    with pytest.raises(UsageError, match="directory"):
        control.check_name(Path(root))


def test_without_root_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert "only root" in control.obstacle()
    with pytest.raises(UsageError, match="only root"):
        control.up(tmp_path / "bed")
    assert not (tmp_path / "bed").exists()


def test_without_slurm_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slurmctld" in control.obstacle() and "apt-get install" in control.obstacle()


def test_a_pid_that_went_to_another_process_is_not_the_controller(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/ctl.pid").write_text(f"{os.getpid()}\n")
    assert testbed.controller(tmp_path) is None


def test_what_is_not_a_testbed_is_left_alone(tmp_path: Path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UsageError, match="was not changed"):
        control.down(tmp_path)
    control.down(tmp_path / "absent")
    assert (tmp_path / "precious").read_text() == "data"
