"""Real accounting: what Slurm bills is what raylab splits, and what it limits raylab refuses."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest

from cluster import bills
from cluster.bills import BILLING_HOURS, CORE_HOURS, Bill
from cluster.sites import NodeType
from cluster.slurm import Slurm
from cluster.testbed import accounting
from jobs.common.split_bill import PARTS
from tests.slurm.conftest import Bed, make_testbed
from tests.slurm.lab import ENDLESS, Lab
from tests.verbs import Verbs
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
# scancel would warn them, also with --signal=KILL. The brackets keep the pattern from matching this very command
KILL_WORKERS = "cd /proc; for pid in $(grep -l 'ray::[W]orker' [0-9]*/cmdline); do kill -9 ${pid%/cmdline}; done; true"


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    if absent := [tool for tool in accounting.TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(absent)} (Debian, Ubuntu: apt-get install {accounting.PACKAGES})")
    yield from make_testbed(accounts=True)


@pytest.fixture
def slurm(bed: Bed) -> Slurm:
    return Slurm(bed.root / "bin")


@contextmanager
def limit_account(bed: Bed, minutes: int) -> Iterator[None]:
    """The account has this limit of CPU minutes while open, and no limit afterwards."""
    limit = f"sacctmgr -i modify account {accounting.ACCOUNT} set GrpTRESMins=cpu="
    bed.run(f"{limit}{minutes}")
    try:
        yield
    finally:
        bed.run(f"{limit}-1")


def read_bills(slurm: Slurm, job: str) -> list[Bill]:
    return bills.read_accounting(slurm, [job], {}, set())


def test_each_start_of_a_requeued_job_is_billed(bed: Bed, slurm: Slurm) -> None:
    job = bed.submit(
        "--cpus-per-task=2", 'echo "start $SLURM_RESTART_COUNT"; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    )
    bed.wait_for_output(job, "start ")
    wait_for(lambda: bool(read_bills(slurm, job)), 30, "its first bill")
    bed.run(f"scontrol requeue {job}")
    bed.wait_for_output(job, "start 1", 60)
    bed.wait_for_state(job, "COMPLETED")
    wait_for(lambda: len(bed.run(f"sacct -nXD -j {job} -o State --parsable2").split()) == 2, 30, "both starts")
    listed = bed.run(f"sacct -nXD -j {job} -o ElapsedRaw,AllocCPUS --parsable2").split()
    cpu_seconds = [int(seconds) * int(cpus) for seconds, cpus in (line.split("|") for line in listed)]
    found = read_bills(slurm, job)
    assert [bill.amount * 3600 for bill in found] == [seconds for seconds in cpu_seconds if seconds]
    assert found[0].amount > 0 and {bill.unit for bill in found} == {CORE_HOURS}


def test_weights_are_billed_as_forecast(bed: Bed, slurm: Slurm) -> None:
    """raylab's sum of the partition's weights is the amount that Slurm bills."""
    job = bed.submit("--partition=debug --cpus-per-task=2 --mem=3000M --gres=gpu:1", "sleep 2")
    bed.wait_for_state(job, "COMPLETED")
    wait_for(lambda: bool(read_bills(slurm, job)), 30, "its bill")
    (bill,) = read_bills(slurm, job)
    node = NodeType(cpus=2, memory_mb=3000, gpus=1)
    expected = bills.parse_tres(bills.expected_tres(node, bills.read_weights(slurm, "debug")))
    assert (bill.rate, bill.unit) == (expected["billing"], BILLING_HOURS)
    assert bills.read_weights(slurm, None) == {}


def test_the_limit_of_the_account_is_what_is_left(bed: Bed, slurm: Slurm) -> None:
    assert "cpu" not in bills.remaining_hours(slurm, None)
    with limit_account(bed, 600):
        job = bed.submit("--cpus-per-task=4", "sleep 61")
        wait_for(lambda: bills.remaining_hours(slurm, None).get("cpu", 10) < 10, 120, "some minutes to be used")
        bed.run(f"scancel {job}")
        left = bills.remaining_hours(slurm, None)["cpu"]
        assert Fraction(9) < left < 10 and bills.remaining_hours(slurm, accounting.ACCOUNT)["cpu"] == left


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_the_bill_of_a_day_with_kills_and_requeues_adds_up(bed: Bed, ards_data: Path, verbs: Verbs) -> None:
    """Runs that grow, lose workers, lose all of them, and a search: every job's lines sum to what sacct says."""
    lab = Lab(bed, ards_data, verbs)
    lab.run("cluster", "up", "--site", "testbed", "--name", "ray", "--max", 2, "--node-type", "spot", "--wait")
    lab.train("first", "1:2", *ENDLESS)
    lab.on_workers("first", 2)
    gone, _ = lab.workers()
    bed.run(f"scontrol requeue {gone['job']}")  # a worker leaves, warned
    lab.on_workers("first", 1)
    lab.on_workers("first", 2)
    at, attempts = lab.step("first"), lab.facts("first")["attempts"]
    wait_for(lambda: lab.step("first") > at + 70, 120, "steps after a checkpoint")
    for job in lab.workers():  # all workers die without a warning, before another one can join: steps are lost
        bed.run(KILL_WORKERS, job["node"])
    wait_for(lambda: lab.facts("first")["attempts"] > attempts, 240, "another attempt")
    lab.stop("first")
    lab.run("cluster", "submit", "--name", "ray", "--", "python", "-m", "jobs.tune", "ards", "--data", lab.data,
            "--smoke", "--trials", 3, "--concurrent", 2, "--name", "search")  # fmt: skip
    head = lab.status()["head"]["job"]
    bed.run(f"scontrol requeue {head}")
    wait_for(lambda: (lab.status()["head"] or {}).get("generation") == 1, 240, "the next head")
    lab.train("second", "1:1", "loop.epochs=100")
    lab.on_workers("second", 1)
    lab.result("second")
    lab.run("cluster", "down", "--name", "ray")
    wait_for(lambda: not bed.run("squeue -h").strip(), 60, "the end of all jobs")

    found = lab.run("cost")
    print(lab.call("cost").stdout)
    print(lab.call("compare", "--out", lab.home / "report.html").stdout)
    listed = bed.run("sacct -nXD -S now-1hour -o JobIDRaw,ElapsedRaw,AllocCPUS,JobName --parsable2").splitlines()
    billed: dict[str, int] = {}
    for job, seconds, cpus, name in (line.split("|") for line in listed):
        if name.startswith("raylab-") and int(seconds):
            billed[job] = billed.get(job, 0) + int(seconds) * int(cpus) * PARTS // 3600
    assert len(billed) >= 4
    sums: dict[str, int] = {}
    for line in found["lines"]:
        sums[line["job"]] = sums.get(line["job"], 0) + line["parts"]
    assert sums == billed
    kinds = {(line["run"].split("/")[0], line["kind"]) for line in found["lines"]}
    assert {("first", "work"), ("first", "lost"), ("search", "work"), ("second", "work"), ("", "head"), ("", "idle"),
            ("", "start-up")} <= kinds  # fmt: skip
    record = json.loads((lab.home / "runs" / "second" / "cost.json").read_text())
    assert {row[4] for row in record["data"]} == {"sacct"}


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_above_the_limit_of_the_account_a_run_is_refused(bed: Bed, ards_data: Path, verbs: Verbs) -> None:
    lab = Lab(bed, ards_data, verbs, "budget")
    lab.run("cluster", "up", "--site", "testbed", "--name", "poor", "--wait")
    train = ("train", "ards", "--data", lab.data, "--workers", "2", "--name", "dear")
    words = ("cluster", "submit", "--name", "poor", "--", "python", "-m", "jobs.cli", *train)
    with limit_account(bed, 1):
        done = lab.call(*words, "--set", "loop.epochs=100000")
    assert done.returncode == 2 and "GrpTRESMins" in done.stderr, done.stdout + done.stderr
    assert not (lab.home / "runs" / "dear").exists()
    lab.run("cluster", "down", "--name", "poor")
