"""A centre's Slurm: steps are bound to one core, nodes are allocated whole, and only ib0 connects them.

One testbed has all three, as such a centre has.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import jobscript
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from cluster.testbed.faults import Fault
from tests.slurm.conftest import ROOT, Bed, make_testbed
from tests.slurm.lab import ENDLESS, INTERVAL, Lab
from tests.verbs import Verbs
from tests.wait import wait_for

CPUS = len(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(CPUS < 2, reason="on one core nothing can be bound to one of several"),
]
SITES = """
[centre]
partition = "batch"
time = "00:30:00"
lead_seconds = 60
idle_seconds = 20
whole_nodes = true
hostname_suffix = "i"
head = { cpus = 1, memory_mb = 4000 }
[centre.nodes.whole]
cpus = 2
memory_mb = 8000
gpus = 2
pretended_gpus = true
"""
AFFINITY = "import os; print('affinity', sorted(os.sched_getaffinity(0)), flush=True)"
NODE = NodeType(cpus=2, memory_mb=1000)
TAG = JobTag("affinity", 0, "worker", "cpu")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    yield from make_testbed(Fault.ONE_CORE_AFFINITY, Fault.WHOLE_NODES, Fault.WRONG_INTERFACE)


@pytest.fixture(scope="module")
def lab(bed: Bed, ards_data: Path, verbs: Verbs) -> Iterator[Lab]:
    lab = Lab(bed, ards_data, verbs)
    (lab.home / "sites.toml").write_text(SITES)
    yield lab
    lab.call("cluster", "down", "--name", "ray")


def write_script(bed: Bed, name: str, *command: str) -> Path:
    """Write the script of a job that runs `command` as a job of raylab's."""
    path = bed.shared / f"{name}.sbatch"
    site = Site(name="here", nodes={"cpu": NODE})
    path.write_text(jobscript.script(site, NODE, TAG, name, "00:05:00", bed.shared, {}, command))
    return path


def find_affinity(bed: Bed, name: str) -> str:
    """The CPUs that the step of the job named `name` may use, from its output."""

    def lines() -> list[str]:
        return [line for path in bed.shared.glob(f"{name}-*.out") for line in path.read_text().splitlines()]

    return wait_for(lambda: [line for line in lines() if line.startswith("affinity")], 60, f"{name}'s affinity")[0]


def test_a_step_is_bound_to_one_core_unless_it_asks_for_those_of_its_job(bed: Bed) -> None:
    plain = f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {sys.executable} -c {AFFINITY!r}"
    job = bed.submit("--nodes=1 --cpus-per-task=2", plain)
    assert bed.wait_for_output(job, "affinity").splitlines()[-1] in ("affinity [0]", "affinity [1]")
    every = f"affinity {list(range(CPUS))}"
    # submitted from a step of one core, as a small head submits a worker, whose job would inherit the binding
    script = write_script(bed, "ours", sys.executable, "-c", AFFINITY)
    submit = f"from pathlib import Path; from cluster.slurm import Slurm; Slurm().submit(Path({str(script)!r}))"
    step = f'PYTHONPATH={ROOT} srun --cpus-per-task=1 {sys.executable} -c "{submit}"'
    bed.submit("--nodes=1 --cpus-per-task=1", step)
    assert find_affinity(bed, "ours") == every
    words = jobscript.step(Site(name="here", nodes={"cpu": NODE}), NODE, TAG, "step", "00:05:00", {},
                          [sys.executable, "-c", AFFINITY], 1)  # fmt: skip
    (bed.shared / "step.json").write_text(json.dumps(words))
    run = "import json, subprocess; print(subprocess.check_output(json.load(open('step.json')), text=True))"
    assert every in bed.run(f"{sys.executable} -c {run!r}")


def test_the_doctor_compares_cpus_and_measures_the_network(lab: Lab) -> None:
    code, bad, printed = doctor(lab)
    assert (code, bad) == (0, []), bad
    assert f"Slurm allocated {CPUS} CPU(s), this step may run on {CPUS} (affinity 0-{CPUS - 1})" in printed
    assert "ok  n1: traffic to n2 goes through ib0 at" in printed
    (lab.home / "sites.toml").write_text(SITES.replace('hostname_suffix = "i"', ""))
    code, bad, _ = doctor(lab)
    (lab.home / "sites.toml").write_text(SITES)
    assert code == 1
    assert "n1: n2 cannot be reached from here through eth0, but through ib0" in bad
    assert "set `interface` of the site to 'ib0'" in bad


def doctor(lab: Lab) -> tuple[int, list[str], str]:
    """(exit code, what failed and what to do about it, what was printed) of raylab doctor."""
    file = lab.home / "doctor.json"
    done = lab.call("doctor", "--site", "centre", "--json", file)
    lab.bed.wait_until_idle()
    failed = [one for one in json.loads(file.read_text())["findings"] if not one["ok"]]
    return done.returncode, [text for one in failed for text in (one["what"], one["do"])], done.stdout


def test_a_run_on_two_nodes_is_billed_two_and_its_head_is_one_of_them(lab: Lab) -> None:
    """Its node works, and what happens to a cluster's nodes changes no result there either."""
    lab.run("cluster", "up", "--site", "centre", "--max", 2, "--node-type", "whole", "--wait")
    lab.train("whole", "3", *ENDLESS)  # one worker fits beside the head, two on a node of their own
    lab.on_workers("whole", 3, steps=INTERVAL)
    billed = lab.bed.run("squeue --noheader --states=running --format='%D %C'").split()
    assert sum(map(int, billed[::2])) == 2 and sum(map(int, billed[1::2])) == 2 * CPUS
    status = lab.status()
    head = status["head"]
    assert head["address"].startswith("10.78.0.")
    assert {node["type"]: node["resources"]["CPU"] for node in status["nodes"]} == {"head": [1, 1], "whole": [2, 2]}
    assert lab.is_training("whole", head)
    worker = "pid=$(pgrep -f ray::Worker | head -n 1); tr '\\0' '\\n' </proc/$pid/environ | grep SOCKET_IFNAME | sort"
    assert lab.bed.run(worker, head["node"]).split() == ["GLOO_SOCKET_IFNAME=ib0", "NCCL_SOCKET_IFNAME==ib0"]


def test_its_worker_drains_and_the_head_s_node_goes_on_alone(lab: Lab) -> None:
    lab.bed.run(f"scancel {lab.workers()[0]['job']}")
    lab.on_workers("whole", 1)
    assert lab.facts("whole")["steps_repeated"] == 0


def test_its_head_is_requeued_and_the_workers_beside_it_save_first(lab: Lab) -> None:
    before, step = lab.status()["head"], lab.step("whole")
    lab.bed.run(f"scontrol requeue {before['job']}")
    wait_for(
        lambda: (now := lab.status()["head"]) is not None and now["generation"] > before["generation"],
        120,
        "the new head",
    )
    wait_for(lambda: lab.step("whole") > step + INTERVAL, 240, "steps after the requeue")
    assert lab.facts("whole")["steps_repeated"] == 0
    lab.jobs["whole"] = lab.status()["ray_jobs"][0]["id"]  # the head has submitted it again
    lab.stop("whole")
    lab.start_undisturbed("whole").compare()
