"""Slurm is a few executables here; its srun runs the step in this process's place, on this machine."""

import ast
import dataclasses
import errno
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cluster import image, scripts
from cluster.directory import versions
from cluster.doctor import first_look, node_checks, site_checks, slurm_checks, traffic
from cluster.doctor.node_checks import Finding
from cluster.doctor.traffic import Traffic
from cluster.inventory import Limit, Maintenance, Node
from cluster.node.allocation import Allocation
from cluster.sites import NodeType, Site
from cluster.slurm import Slurm

CODE = Path(__file__).parents[3]
CPUS = len(os.sched_getaffinity(0))
NOW = datetime(2026, 11, 26, 12)
CONFIG = "KillWait = 30 sec\nProctrackType = proctrack/cgroup\nSLURM_VERSION = 23.11.1\nJobRequeue = 1"
PARTITION = "PartitionName=batch State=UP MaxTime=1-00:00:00 PreemptMode=OFF GraceTime=0 OverSubscribe=NO"
# words until `bash` are srun's; as the step on node n1 of one
STEP = f"""while [ "$1" != bash ]; do shift; done
export SLURM_CPUS_ON_NODE={CPUS} SLURM_MEM_PER_NODE=4000
exec "$@" """


def scontrol(partition: str = PARTITION, reservation: str = "No reservations in the system") -> str:
    """The script of a scontrol that shows these."""
    return f'''case "$*" in
      *config) echo "{CONFIG}" ;; *partition) echo "{partition}" ;; *reservation) echo "{reservation}" ;;
      *hostnames*) echo n1 ;;
    esac'''


@pytest.fixture
def local(tmp_path) -> Site:
    return Site(name="here", partition="batch", nodes={"cpu": NodeType(cpus=CPUS, memory_mb=4000)})


@pytest.fixture
def fakes(commands):
    def make(**other: str) -> Slurm:
        scripts = {
            "scontrol": scontrol(),
            "sinfo": f"echo 'n1|{CPUS}|8000|(null)'",
            "sbatch": "echo 'sbatch: Job 1 to start at once' >&2",
            "squeue": "true",
            "scancel": "true",
            "srun": STEP,
            **other,
        }
        return Slurm(commands(**scripts))

    return make


def examine(site, tmp_path, slurm, command=None, **other) -> list[Finding]:
    words = command or [sys.executable, "-m", "jobs.doctor", "--here"]
    facts = {"nodes": 1, "wait": 60.0, "tracking": "", **other}
    return list(site_checks.examine(site, tmp_path, CODE, slurm, words, **facts))


def bad(findings) -> list[Finding]:
    return [finding for finding in findings if not finding.ok]


def texts(findings) -> str:
    return "\n".join(finding.what for finding in findings)


def test_a_site_on_which_all_is_well(local, tmp_path, fakes):
    found = examine(local, tmp_path, fakes())
    # this machine may have no network, and another Ray
    here = [one for one in found if "other nodes cannot reach" not in one.what and ", the default of" not in one.what]
    assert not bad(here), bad(here)
    host = socket.gethostname()
    for said in (
        "Slurm 23.11.1 answers",
        "30 s to save",
        "Slurm accepts jobs of type cpu",
        f"{host}: Python and packages are the same as on the login node",
        f"{host}: shared storage: replacing a file is atomic",
        f"{host}: shared storage: file locks of the login node work here",
        f"{host}: Ray reads its token from a private file",
        f"{host}: scratch /tmp can hold Ray's sockets",
        f"and Ray counts {CPUS}",
        f"files of {host} are visible on the login node",
        f"{host}: clock within",
    ):
        assert said in texts(found)
    assert not list((tmp_path / "clusters").iterdir()), "the probe is gone"


def test_what_the_step_asks_of_slurm_is_what_a_job_of_the_site_would(local, tmp_path, fakes):
    slurm = fakes(srun="exit 0")
    examine(local, tmp_path, slurm)
    (line,) = (slurm.directory / "srun.calls").read_text().splitlines()[:1]
    for option in ("--partition=batch", f"--cpus-per-task={CPUS}", "--mem=4000M", "--nodes=1", "--time=00:05:00"):
        assert option in line


def test_a_machine_without_slurm_is_said_and_nothing_else_is_tried(local, tmp_path):
    found = examine(local, tmp_path, Slurm(tmp_path))
    assert [one.what.split(" (")[0] for one in bad(found)] == ["scontrol was not found"]
    assert "login node" in bad(found)[0].do


def test_a_queue_that_does_not_start_is_said_with_slurms_reason_and_the_job_is_cancelled(local, tmp_path, fakes):
    comment = 'c=$(sed -n "s/.*--comment=\\([^ ]*\\).*/\\1/p" "$(dirname "$0")/srun.calls" | head -n 1)'
    row = 'printf "%-20s%-20s%-10s%-20s%-120s%-60s%-200s\\n" 77 PENDING 0 5:00 "" Priority "$c"'
    slurm = fakes(srun="exec sleep 60", squeue=f"{comment}\n{row}")
    began = time.monotonic()
    found = examine(local, tmp_path, slurm, wait=0.5)
    assert time.monotonic() - began < 30
    (late,) = bad(found)
    assert late.what == "no node of type cpu within 0 s: other jobs have a higher priority" and "--wait" in late.do
    assert (slurm.directory / "scancel.calls").read_text().split() == ["77"]
    assert "Slurm accepts jobs of type cpu" in texts(found), "the login node's findings are reported"


def test_a_job_that_could_not_be_cancelled_is_named(local, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr("cluster.slurm.TRIES", 1)
    slurm = fakes(srun="exit 0", squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert any("may still exist" in one.what and "scancel" in one.do for one in bad(examine(local, tmp_path, slurm)))


def test_a_node_without_our_python_says_what_it_said(local, tmp_path, fakes):
    (found,) = bad(examine(local, tmp_path, fakes(), command=["/p/none/python", "-m", "x"]))
    assert "1 of 1 nodes of type cpu did not answer" in found.what and "/p/none/python" in found.what
    assert "`python`" in found.do


def test_a_refused_job_keeps_slurms_words_and_no_step_is_tried(local, tmp_path, fakes):
    slurm = fakes(sbatch="echo 'sbatch: error: invalid partition specified: batch' >&2; exit 1")
    found = bad(examine(local, tmp_path, slurm))
    assert len(found) == 2 and all("invalid partition specified: batch" in one.what for one in found)
    assert all("`partition`" in one.do for one in found)
    assert not (slurm.directory / "srun.calls").exists()


def test_a_partition_that_slurm_does_not_know(local, fakes):
    slurm = fakes(scontrol=scontrol(PARTITION.replace("=batch", "=main")))
    (found,) = slurm_checks.partitions(slurm, local, {}, NOW)
    assert not found.ok and "'batch'" in found.what and "main" in found.do


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"State": "DOWN"}, "partition p is DOWN"),
        ({"MaxTime": "00:30:00"}, "time limit of 00:30:00"),
        ({"PreemptMode": "SUSPEND"}, "can be suspended"),
        ({"PreemptMode": "GANG,SUSPEND"}, "can be suspended"),
        ({"OverSubscribe": "FORCE:4"}, "several jobs on the same cores"),
    ],
)
def test_partitions_on_which_a_cluster_would_not_do(local, changed, said):
    facts = {"State": "UP", "MaxTime": "UNLIMITED", "PreemptMode": "OFF", "OverSubscribe": "NO"}
    assert not bad(slurm_checks.partition("p", facts, local))
    assert said in texts(bad(slurm_checks.partition("p", {**facts, **changed}, local)))


def test_preemption_and_its_grace_are_told(local):
    facts = {"State": "UP", "MaxTime": "UNLIMITED", "PreemptMode": "REQUEUE", "GraceTime": "60"}
    assert "a grace time of 60 s" in texts(slurm_checks.partition("p", facts, local))


def test_settings_of_slurm_that_cost_work(local):
    config = {"KillWait": "5 sec", "ProctrackType": "proctrack/linuxproc", "Epilog": "(null)"}
    kill, track = bad(slurm_checks.settings(config, local))
    assert "5 s after" in kill.what and "daemons survive" in track.what
    assert not bad(slurm_checks.settings({**config, "KillWait": "30 sec", "Epilog": "/etc/slurm/epilog.sh"}, local))


def test_what_raylab_does_about_settings_by_itself_is_said(local):
    config = {"KillWait": "30 sec", "ProctrackType": "proctrack/cgroup"}
    odd = slurm_checks.settings({**config, "JobRequeue": "0", "TaskPluginParam": "Verbose,autobind=Cores"}, local)
    assert "--requeue" in texts(odd) and "SRUN_CPUS_PER_TASK" in texts(
        slurm_checks.settings({**config, "TaskPluginParam": "autobind=cores"}, local)
    )
    assert "SRUN" not in texts(slurm_checks.settings(config, local))


def test_whole_nodes_that_a_job_uses_in_part(local, fakes):
    """A head of its own, and a node type that is less than a node."""
    slurm = fakes(scontrol=scontrol(PARTITION.replace("OverSubscribe=NO", "OverSubscribe=EXCLUSIVE")))
    (head,) = bad(slurm_checks.partitions(slurm, local, {}, NOW))
    assert "a head would be billed one of its own" in head.what and "`whole_nodes = true`" in head.do
    assert not bad(slurm_checks.partitions(slurm, local.model_copy(update={"whole_nodes": True}), {}, NOW))
    nodes = [Node("n1", 16, 64000, {"": 2}), Node("n2", 16, 60000, {"": 2})]
    (part,) = bad(slurm_checks.whole_nodes("p", nodes, {"head": local.head, **local.nodes}, True))
    assert f"node type cpu uses {CPUS} CPUs, 4000 MB, 0 GPUs" in part.what and "billed in full" in part.what
    assert part.do == "describe the whole node: cpus = 16, memory_mb = 60000, gpus = 2"
    assert list(slurm_checks.whole_nodes("p", [], local.nodes, False)) == []


@pytest.mark.parametrize(
    ("gpu_type", "said"),
    [(None, "several types (a100, v100)"), ("h100", "no node of partition p has GPUs of type 'h100'"), ("v100", "")],
)
def test_gpus_of_several_types_must_be_named(gpu_type, said):
    nodes = [Node("n1", 16, 64000, {"a100": 4}), Node("n2", 16, 64000, {"v100": 4})]
    types = {
        "gpu": NodeType(cpus=4, memory_mb=4000, gpus=1, gpu_type=gpu_type),
        "head": NodeType(cpus=1, memory_mb=1000),
    }
    found = list(slurm_checks.gpu_types("p", nodes, types))
    assert said in texts(found) and bool(found) == bool(said)
    assert all(one.do == "set `gpu_type` of node type gpu to one of: a100, v100" for one in found)


def test_gpus_of_one_type_need_no_name():
    types = {"gpu": NodeType(cpus=4, memory_mb=4000, gpus=1)}
    assert not list(slurm_checks.gpu_types("p", [Node("n1", 16, 64000, {"a100": 4})], types))


@pytest.mark.parametrize(
    ("minutes", "nodes", "said", "do"),
    [
        (30, {"n1", "n2"}, "jobs of 02:00:00 would wait for its end", "raylab cluster up --time 00:30:00"),
        (2, {"n1", "n2"}, "jobs wait until then", "start after 2026-11-26 14:02"),
        (-5, {"n1", "n2", "n3"}, "jobs wait until then", "start after"),
        (30, {"n1"}, "", ""),  # the other node is free
        (150, {"n1", "n2"}, "", ""),  # after the end of a job
    ],
)
def test_a_maintenance_before_a_job_would_end(local, minutes, nodes, said, do):
    start = NOW + timedelta(minutes=minutes)
    upgrade = Maintenance("upgrade", start, start + timedelta(hours=2), frozenset(nodes))
    found = list(slurm_checks.maintenance("p", [Node("n1", 1, 1), Node("n2", 1, 1)], [upgrade], local, NOW))
    assert bool(found) == bool(said) and said in texts(found) and all(do in one.do for one in found)


def test_the_smallest_limit_of_jobs_decides():
    (few,) = slurm_checks.job_limits([Limit(8, "account a"), Limit(1, "QOS normal")])
    assert not few.ok and "QOS normal lets you run 1 job(s)" in few.what
    assert few.do.startswith("ask for more") and "--static" in few.do
    (other,) = slurm_checks.job_limits([Limit(1, "QOS normal", ("large", "long"))])
    assert other.do.startswith("set `qos` of the site to one of: large, long")
    (enough,) = slurm_checks.job_limits([Limit(8, "account a")])
    assert enough.ok and "at most 7 workers" in enough.what
    assert not list(slurm_checks.job_limits([]))


def test_an_account_of_others_is_named_with_ones_own(local, fakes):
    slurm = fakes(sacctmgr="echo lungs; echo hearts")
    site = local.model_copy(update={"account": "kidneys"})
    config = {"AccountingStorageType": "accounting_storage/slurmdbd"}
    (found,) = slurm_checks.accounting(slurm, config, site)
    assert "no account 'kidneys'" in found.what and "lungs, hearts" in found.do
    assert not list(slurm_checks.accounting(slurm, {"AccountingStorageType": "accounting_storage/none"}, site))
    assert not list(slurm_checks.accounting(fakes(sacctmgr="exit 1"), config, site)), "sbatch decides"


def test_a_full_disk_is_named_once_with_other_storage(local, fakes, tmp_path, monkeypatch):
    def full(path, room):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))

    monkeypatch.setattr("raylab.storage.check_writable", full)
    (tmp_path / "clusters").write_text("no directory")  # the probe fails as well
    (found,) = bad(examine(local.model_copy(update={"shared": str(tmp_path)}), tmp_path, fakes()))
    assert "no room for 64 MB: the disk quota is used up" in found.what
    assert "raylab rm" in found.do and f"{tmp_path}/raylab" in found.do


def test_a_time_limit_shorter_than_the_lead_is_said(local, tmp_path, fakes):
    short = local.model_copy(update={"time": "00:02:00"})
    assert "too short" in texts(bad(examine(short, tmp_path, fakes(srun="exit 0"))))


def test_a_home_that_cannot_be_written(local, fakes, tmp_path):
    (tmp_path / "clusters").write_text("no directory")
    (found,) = bad(examine(local, tmp_path, fakes()))
    assert "cannot be written" in found.what and "RAYLAB_HOME" in found.do


def test_what_several_nodes_say_is_said_once():
    same, own = Finding("well"), Finding("sick", False, "mend it")
    assert site_checks.merge_findings({"n2": [same], "n1": [same, own]}) == [
        Finding("n1, n2: well"),
        Finding("n1: sick", False, "mend it"),
    ]


# --- on a node ---


def run_first_look(*words: str, version: str) -> "subprocess.CompletedProcess[str]":
    facts = json.dumps({"versions": {"python": version}})
    return subprocess.run(
        [sys.executable, "-m", "cluster.doctor.first_look", *words, facts], cwd=CODE, capture_output=True, text=True
    )


@pytest.mark.parametrize(("version", "do"), [("2.7.18", "the same Python in `setup`"), ("", "shared storage")])
def test_a_python_that_cannot_run_the_doctor_is_a_finding(version, do, tmp_path):
    here = ".".join(map(str, sys.version_info[:3]))
    done = run_first_look("no_such_module", version=version or here)
    assert done.returncode == 0, done.stderr
    begun: dict[str, str] = {}
    notes = [note for line in done.stdout.splitlines() if (note := first_look.join(line, begun)[1])]
    (found,) = notes[1]["findings"]
    assert "no_such_module" in found["what"] and do in found["do"]
    assert (f"is Python {here} here and 2.7.18" in found["what"]) == bool(version)


def test_a_python_that_can_runs_the_module_with_its_options():
    done = run_first_look("json.tool", "--help", version="x")
    assert done.returncode == 0 and "usage:" in done.stdout and first_look.MARK not in done.stdout


def test_long_answers_of_several_nodes_may_be_mixed(monkeypatch):
    """By line: srun passes on no more than 1024 bytes of one node before those of another."""
    facts = {"findings": ['a "quoted" \\ line\u00e9' * 200]}
    answers = {}
    for host in ("n1", "n2"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        answers[host] = first_look.answer(**facts).splitlines()
    assert all(len(line) < 1000 for lines in answers.values() for line in lines) and len(answers["n1"]) > 5
    begun: dict[str, str] = {}
    mixed = [line for pair in zip(answers["n1"], answers["n2"], strict=True) for line in pair]
    notes = [note for line in mixed if (note := first_look.join(line, begun))[1] is not None]
    assert notes == [("n1", facts), ("n2", facts)] and not begun


def test_the_first_look_is_of_python_3_6():
    ast.parse(Path(first_look.__file__).read_text(), feature_version=(3, 6))


def test_scratch_that_is_small_names_places_that_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SCRATCH_BYTES", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("s" * 100)))
    assert "/dev/shm" in node_checks.suggest_scratch("/tmp") and "sss" not in node_checks.suggest_scratch("/tmp")
    monkeypatch.setattr(node_checks, "SCRATCH_BYTES", 1 << 60)
    (found,) = node_checks.scratch("/tmp")
    assert not found.ok and found.do.endswith("ask for a short, node-local directory")


def test_storage_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SEE_SECONDS", 0.2)
    found, shared = node_checks.storage(tmp_path / "clusters" / ".doctor-1", "word")
    assert not shared and f"{tmp_path} are not visible here" in found[0].what and "RAYLAB_HOME" in found[0].do


def test_another_word_is_another_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SEE_SECONDS", 0.2)
    with site_checks.probe(tmp_path) as (directory, word):
        assert not node_checks.storage(directory, word + "x")[1]


def test_modes_and_locks_that_a_file_system_does_not_keep(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "token", lambda path, word: Finding("token"))
    with site_checks.probe(tmp_path) as (directory, word):
        (directory / "login").chmod(0o644)
        (directory / "lock").unlink()  # another file, as a file system without locks would have it
        found, shared = node_checks.storage(directory, word)
    assert shared
    assert [("0644" in one.what, "lock" in one.what) for one in bad(found)] == [(True, False), (False, True)]


def test_a_file_that_is_seen_half_and_one_that_never_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SEE_SECONDS", 0.3)
    path = tmp_path / "swap"
    path.write_text("a" * node_checks.LETTERS)
    assert "not visible here within" in node_checks._check_replacement(path).what
    texts_read = iter(["a" * node_checks.LETTERS, "ab"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(texts_read))
    assert "not atomic" in node_checks._check_replacement(path).what


def test_scratch_that_cannot_hold_rays_sockets(tmp_path):
    long = tmp_path / ("s" * 100)
    long.mkdir()
    for path in (long, tmp_path / "absent"):
        (found,) = node_checks.scratch(str(path))
        assert not found.ok and "`scratch`" in found.do
    assert list(long.iterdir()) == [], "what was tried is gone"


def test_an_interface_that_is_not_here_names_those_there_are(local):
    (found,) = node_checks.network(local.model_copy(update={"interface": "ib77"}), None, 1)
    assert not found.ok and "'ib77'" in found.what and "lo" in found.what and "`interface`" in found.do


def test_a_loopback_address_is_none_for_other_nodes(local):
    (found,) = node_checks.network(local.model_copy(update={"interface": "lo"}), None, 1)
    assert not found.ok and "127.0.0.1" in found.what


def test_nodes_that_do_not_meet_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(node_checks, "SEE_SECONDS", 0.5)
    assert "1 of 2 nodes" in node_checks._meet("127.0.0.1", tmp_path, 2)[0].what
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        note = {"interface": "lo", "places": {"lo": closed.getsockname()}}
        (tmp_path / "peer-n9.json").write_text(json.dumps(note))
        (found,) = node_checks._meet("127.0.0.1", tmp_path, 2)
    assert not found.ok and found.what == "n9 cannot be reached from here"


def test_what_is_sent_to_a_node_is_measured_where_it_leaves_and_only_if_that_node_answers():
    with traffic.Listener({"lo": "127.0.0.1"}, "n2") as there:
        sent = traffic.send(there.places["lo"], "n2")
        assert sent is not None and sent.carrier == "lo" and sent.rate > 1e6
        assert traffic.send(there.places["lo"], "n3") is None, "another node has this address as well"
    assert traffic.send(there.places["lo"], "n2") is None


SLOW, FAST = 1e8, 2e9


@pytest.mark.parametrize(
    ("used", "others", "ok", "what", "do"),
    [
        (Traffic("ib0", FAST), {"eth0": Traffic("eth0", SLOW)}, True, "goes through ib0 at 2.0 GB/s", ""),
        (Traffic("ib0", FAST), {"eth0": Traffic("eth0", 2 * FAST)}, True, "goes through ib0 at 2.0 GB/s", ""),
        (
            Traffic("eth0", FAST),
            {},
            False,
            "goes through eth0 at 2.0 GB/s, though the address is that of ib0",
            "routes",
        ),
        (Traffic("ib0", SLOW), {"hsn0": Traffic("hsn0", FAST)}, False, "through hsn0, at 2.0 GB/s", "'hsn0'"),
        (None, {"hsn0": Traffic("hsn0", FAST)}, False, "cannot be reached from here through ib0, but", "'hsn0'"),
        (None, {}, False, "n2 cannot be reached from here", "ports between nodes"),
    ],
)
def test_the_interface_that_carries_traffic_is_judged(used, others, ok, what, do):
    found = node_checks.judge_traffic("n2", "ib0", used, others)
    assert found.ok == ok and what in found.what and do in found.do


def test_a_default_port_that_somebody_holds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(node_checks, "DEFAULT_PORTS", {server.getsockname()[1]: "Ray's head"})
        (found,) = node_checks.default_ports()
    assert not found.ok and "Ray's head" in found.what and "RAY_ADDRESS" in found.do


def test_another_ray_is_said_and_harmless(tmp_path):
    """A process of that name, as a neighbour's Ray has one."""
    raylet = tmp_path / "raylet"
    raylet.symlink_to("/bin/sleep")
    with subprocess.Popen([str(raylet), "60"]) as process:
        try:
            (found,) = node_checks.other_rays()
        finally:
            process.kill()
    assert found.ok and f"pid {process.pid}" in found.what and "raylab uses its own ports" in found.what


@pytest.mark.parametrize(
    ("allocated", "affinity", "ok", "what", "do"),
    [
        (4, [0, 1, 2, 3], True, "allocated 4 CPU(s), this step may run on 4 (affinity 0-3), and Ray counts 4", ""),
        (4, [0, 1, 2, 3, 8, 10, 11], True, "may run on 7 (affinity 0-3,8,10-11), and Ray counts 4", ""),
        (4, [5], False, "the site has 4 CPU(s), Slurm allocated 4 CPU(s), this step may run on 1", "`sbatch`"),
        (2, [0, 1, 2, 3], False, "the site has 4 CPU(s), Slurm allocated 2 CPU(s)", "`cpus`"),
    ],
)
def test_cpus_of_the_site_of_the_allocation_of_the_step_and_of_ray(allocated, affinity, ok, what, do):
    given = Allocation(allocated_cpus=allocated, usable_cpus=len(affinity), gpus=0, memory=10**9)
    found = node_checks.cpus(NodeType(cpus=4, memory_mb=1000), given, affinity)
    assert found.ok == ok and what in found.what and do in found.do


@pytest.mark.parametrize(("given", "visible", "well"), [("2", "0,1", True), ("1", "0", False), ("2", "0", False)])
def test_gpus_promised_given_and_visible(monkeypatch, tmp_path, given, visible, well):
    import torch

    monkeypatch.setenv("SLURM_GPUS_ON_NODE", given)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (found,) = node_checks.gpus(NodeType(cpus=1, memory_mb=1000, gpus=2))
    assert found.ok == well
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (found,) = node_checks.gpus(NodeType(cpus=1, memory_mb=1000, gpus=2))
    assert not found.ok
    (found,) = node_checks.gpus(NodeType(cpus=1, memory_mb=1000, gpus=2, pretended_gpus=True))
    assert found.ok == well == ("fake" in found.what)
    assert node_checks.gpus(NodeType(cpus=1, memory_mb=1000)) == []


def test_other_versions_than_the_login_nodes_are_said(local, tmp_path):
    with site_checks.probe(tmp_path) as (directory, word):
        facts = {
            "site": local.model_dump(mode="json"), "kind": "cpu", "nodes": 1, "probe": str(directory), "word": word,
            "versions": {**versions(), "torch": "1.0.0"},
        }  # fmt: skip
        assert "instead of 1.0.0" in texts(bad(node_checks.here(facts)))


def test_an_image_of_another_lock_is_said(local, tmp_path, monkeypatch):
    """On a node, too: the login node may have no Apptainer."""
    monkeypatch.setattr(image, "LOCK", tmp_path / "built.lock")
    for place, text in (("built", "a==1"), ("requirements", "a==2")):
        (tmp_path / f"{place}.lock").write_text(text)
    with site_checks.probe(tmp_path) as (directory, word):
        facts = {
            "site": local.model_copy(update={"image": "/p/raylab.sqsh"}).model_dump(mode="json"), "kind": "cpu",
            "nodes": 1, "probe": str(directory), "word": word, "versions": versions(), "code": str(tmp_path),
        }  # fmt: skip
        assert "/p/raylab.sqsh was built from another requirements.lock" in texts(bad(node_checks.here(facts)))
        image.LOCK.write_text("a==2")
        assert "requirements.lock" not in texts(bad(node_checks.here(facts)))


# --- the command ---


def command(*words: str, verb: str = "doctor", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *verb.split(), *words],
        cwd=CODE, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(("verb", "words"), [("doctor", ["--site", "juwels"]), ("site check", ["juwels"])])
def test_blanks_are_lines_of_their_own_with_where_to_write_them(tmp_path, verb, words):
    done = command(*words, "--json", str(tmp_path / "out.json"), verb=verb)
    assert done.returncode == 1
    assert "!!  `account` of site juwels is blank: your compute project: write it into" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert not result["ok"] and all(not finding["ok"] and finding["do"] for finding in result["findings"])


@pytest.mark.parametrize(
    ("line", "right"), [("acount = 'x'", "account"), ("lead_seconds = '2min'", "(in seconds: lead_seconds = 120)")]
)
def test_a_wrong_key_or_unit_is_refused_with_the_right_one(own_sites, line, right):
    own_sites(f"[local]\n{line}\n")
    done = command("local", verb="site check")
    assert done.returncode == 2 and right in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_site_prints_the_right_ones():
    done = command("--site", "juwel")
    assert done.returncode == 2 and "juwels" in done.stderr


def test_mlflow_from_a_node():
    from jobs.doctor import check_mlflow, format_finding

    assert check_mlflow("").ok
    found = check_mlflow("http://127.0.0.1:1")
    assert not found.ok and found.do
    assert format_finding(found).startswith("!!  ") and format_finding(Finding("x")) == "ok  x"
    assert [field.name for field in dataclasses.fields(found)] == ["what", "ok", "do"]


class Refuses(http.server.BaseHTTPRequestHandler):
    """As MLflow answers to a Host header that it does not know."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Invalid Host header - possible DNS rebinding attack detected")

    def log_message(self, *words: object) -> None:
        pass


def test_a_server_that_refuses_our_name_for_it_says_allowed_hosts():
    from jobs.doctor import check_mlflow

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = check_mlflow(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert not found.ok and f"--allowed-hosts 127.0.0.1:{server.server_port}" in found.do


def test_nodes_get_the_login_by_the_path_of_a_private_file(local, tmp_path, fakes, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2-Z9")
    slurm = fakes()
    look = f'cd {tmp_path}; stat -c %a "$RAYLAB_MLFLOW_LOGIN" > mode; cp "$RAYLAB_MLFLOW_LOGIN" login; env > env'
    files = {scripts.LOGIN: '{"http://t": {"token": "hunter2-Z9"}}'}
    examine(local, tmp_path, slurm, ["bash", "-c", look], tracking="http://t", files=files)
    assert (tmp_path / "mode").read_text() == "600\n" and "hunter2-Z9" in (tmp_path / "login").read_text()
    assert "MLFLOW_TRACKING_URI=http://t\n" in (tmp_path / "env").read_text()
    for seen in (tmp_path / "env", *slurm.directory.glob("*.calls")):
        assert "hunter2" not in seen.read_text(), seen
