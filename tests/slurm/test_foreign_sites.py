"""The first hour at a foreign site: a test cluster that differs as centres do, and what `raylab doctor` says there."""

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.testbed import config, control
from cluster.testbed.config import Plan
from cluster.testbed.faults import Fault
from raylab.errors import UsageError
from tests.slurm.conftest import ROOT, Bed, make_testbed

pytestmark = pytest.mark.slurm
start = contextlib.contextmanager(make_testbed)
HOME = "raylab"  # below the shared directory


def examine(bed: Bed, sites: str, home: str = HOME, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings of the doctor on the login node, with these lines in the section of the test cluster.

    `home`: RAYLAB_HOME below the shared directory.
    """
    (bed.shared / "sites.toml").write_text(f"[testbed]\n{sites}\n")
    out = bed.shared / "doctor.json"
    out.unlink(missing_ok=True)
    variables = [f"RAYLAB_HOME={bed.shared / home}", f"RAYLAB_SITES={bed.shared}/sites.toml"]
    line = [sys.executable, "-m", "jobs.cli", "doctor", "--site", "testbed", "--json", str(out), *words]
    done = subprocess.run(
        control.command(bed.root, ["env", *variables, *line]), cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    print(done.stdout)
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())["findings"]


def tell(findings: list[dict[str, Any]], ok: bool) -> str:
    return "\n".join(f"{one['what']}: {one['do']}" for one in findings if one["ok"] is ok)


@dataclass(frozen=True)
class Case:
    """What the doctor says about a fault: a pattern of the finding and its remedy.

    `sites`: lines of the site as its user wrote them; `remedy`: as the finding says (None: only the centre can).
    `is_harmless`: raylab deals with it by itself, and the doctor says how.
    """

    said: str
    sites: str = ""
    remedy: str | None = None
    home: str = HOME
    is_harmless: bool = False


TWO_CPUS = "nodes.cpu.cpus = 2"
CPUS = min(Plan.cpus, len(os.sched_getaffinity(0)))
NODE = f"{{ cpus = {CPUS}, memory_mb = 8000, gpus = 2, pretended_gpus = true }}"
CASES = {
    Fault.ONE_CORE_AFFINITY: Case(
        r"allocated 2 CPU\(s\), this step may run on 2 \(affinity 0-1\), and Ray counts 2", TWO_CPUS, is_harmless=True
    ),
    Fault.WRONG_INTERFACE: Case(
        r"n2 cannot be reached from here through eth0, but through ib0: set `interface` of the site to 'ib0'",
        remedy='interface = "ib0"',
    ),
    Fault.WHOLE_NODES: Case(
        r"node type cpu uses 1 CPUs.* which is billed in full: describe the whole node: cpus = \d, memory_mb = 8000, ",
        remedy=f"whole_nodes = true\nnodes.cpu = {NODE}\nnodes.gpu = {NODE}",
    ),
    Fault.TYPED_GRES: Case(
        r"GPUs of several types \(new, old\), and node type gpu names none: set `gpu_type` .* one of: new, old",
        remedy='nodes.gpu.gpu_type = "old"',
    ),
    Fault.MISSING_ACCOUNT: Case(
        r"every job needs the account of a project with compute time.*: correct `account`",
        remedy=f'account = "{config.ACCOUNT}"',
    ),
    Fault.JOB_LIMIT: Case(
        r"QOS normal lets you run 1 job\(s\) at a time.*: set `qos` of the site to one of: large",
        remedy='qos = "large"',
    ),
    Fault.NO_REQUEUE: Case(r"does not requeue jobs by default .*; raylab's jobs request it", is_harmless=True),
    Fault.QUOTA_FULL: Case(
        r"home/raylab has no room for 64 MB: no space is left on the disk: .*export RAYLAB_HOME=", home="home/raylab"
    ),
    Fault.MAINTENANCE: Case(
        r"reserved for maintenance \(upgrade\) from .* would wait for its end: raylab cluster up --time 00:0[5-9]:00",
        remedy='time = "00:04:00"',
    ),
    Fault.TWO_PYTHONS: Case(r"instead of |is Python .* here and .* on the login node.*: load the same Python"),
    Fault.CLOCK_SKEW: Case(r"n1: its clock is (8[5-9]|9[0-5]) s ahead of the login node's: ask for NTP"),
    Fault.LONG_SCRATCH: Case(
        r"scratch /run/node-local-scratch\S* cannot hold Ray's sockets .*: correct `scratch` of the site; suited here: "
        r"/dev/shm",
        sites=f'scratch = "{config.LONG_SCRATCH}"',
        remedy='scratch = "/dev/shm"',
    ),
}


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", Fault)
def test_the_doctor_names_a_fault_and_its_remedy_heals_it(fault: Fault) -> None:
    case = CASES[fault]
    try:
        control.prepare(Plan(Path("/tmp/none"), faults=frozenset({fault})))
    except UsageError as error:
        pytest.skip(str(error))
    with start(fault) as bed:
        code, findings = examine(bed, case.sites, case.home)
        assert re.search(case.said, tell(findings, ok=case.is_harmless)), tell(findings, ok=False)
        assert code == (0 if case.is_harmless else 1), tell(findings, ok=False)
        bed.wait_until_idle()
        if case.remedy is not None or case.home != HOME:
            code, findings = examine(bed, case.remedy or "")
            assert code == 0, tell(findings, ok=False)


def test_what_the_login_node_can_see_is_named_before_anything_is_submitted() -> None:
    """Six faults at once: Slurm refuses the jobs, so no step runs."""
    seen = [
        Fault.WHOLE_NODES, Fault.TYPED_GRES, Fault.MISSING_ACCOUNT, Fault.NO_REQUEUE,
        Fault.QUOTA_FULL, Fault.MAINTENANCE,
    ]  # fmt: skip
    with start(*seen) as bed:
        code, findings = examine(bed, "", "home/raylab")
        assert code == 1
        for fault in seen:
            case = CASES[fault]
            assert re.search(case.said, tell(findings, ok=case.is_harmless)), f"{fault}:\n{tell(findings, ok=False)}"
        assert not bed.run("squeue --noheader --states=all")
