"""What Slurm bills, from its own words and from the head's records."""

from decimal import Decimal
from fractions import Fraction

import pytest

from cluster import bills
from cluster.bills import (
    BILLING_HOURS,
    CORE_HOURS,
    HEAD,
    QUEUE,
    JobBook,
    bill_records,
    expected_tres,
    parse_accounting,
    parse_limits,
    parse_weights,
    rate,
    read_jobs,
    read_weights,
    remaining_hours,
)
from cluster.job_tag import JobTag
from cluster.sites import Billing, NodeType, site
from cluster.slurm import Slurm
from raylab.errors import SlurmError, UsageError

TRES = "billing=4,cpu=4,mem=8000M,node=1"


@pytest.mark.parametrize(
    ("tres", "billing", "expected"),
    [
        (TRES, Billing(), (4, CORE_HOURS)),
        ("billing=9,cpu=4,mem=8G,node=1", Billing(), (9, BILLING_HOURS)),
        ("cpu=4,mem=8G,node=1", Billing(), (4, CORE_HOURS)),
        (TRES, Billing(rate={"gpus": Decimal("40")}), (4, CORE_HOURS)),
        (TRES, Billing(rate={"batch": Decimal("48")}), (96, CORE_HOURS)),
        (TRES, Billing(unit="node-hours", rate={"batch": Decimal("1.5")}), (3, "node-hours")),
    ],
)
def test_the_rate_is_the_sites_else_slurms_else_that_of_the_cpus(tres, billing, expected):
    assert rate(tres, "batch", 2, billing) == expected


SACCT = """\
7|batch|1795700000|60|PREEMPTED|1|billing=4,cpu=4,mem=8000M,node=1
7|batch|1795700100|3600|RUNNING|1|billing=4,cpu=4,mem=8000M,node=1
8|batch|Unknown|0|CANCELLED by 0|1|
9|batch|1795700000|0|PENDING|1|
"""


def test_each_start_of_a_requeued_job_has_its_bill_and_a_job_that_never_ran_has_none():
    first, second = parse_accounting(SACCT, {}, {"7"})
    assert (first.job, first.start, first.end, first.amount) == ("7", 1795700000, 1795700060, Fraction(4, 60))
    assert (second.amount, second.unit, second.is_running, second.is_head) == (4, CORE_HOURS, True, True)


def test_where_one_job_is_weighed_all_that_slurm_bills_are_in_its_unit_but_not_what_the_site_does():
    weighed = "6|debug|1795700000|3600|COMPLETED|1|billing=7,cpu=4,node=1\n"
    priced = "5|big|1795700000|3600|COMPLETED|1|billing=4,cpu=4,node=1\n"
    found = parse_accounting(SACCT + weighed + priced, {"5": Billing(rate={"big": Decimal(48)})}, set())
    assert {bill.job: bill.unit for bill in found} == {"7": BILLING_HOURS, "6": BILLING_HOURS, "5": CORE_HOURS}


def test_without_accounting_slurm_says_so(commands):
    directory = commands(sacct='echo "Slurm accounting storage is disabled" >&2; exit 1')
    with pytest.raises(SlurmError, match="sacct refused"):
        bills.read_accounting(Slurm(directory), ["7"], {}, set())


def test_no_job_asks_nobody():
    assert bills.read_accounting(Slurm(), [], {}, set()) == []


# the head's records


def row(job, tag, state="RUNNING", restarts=0, used="1:00", nodes=1, tres="cpu=1,mem=2G,node=1,billing=1"):
    fields = {"JobID": job, "State": state, "RestartCnt": restarts, "TimeUsed": used, "NumNodes": nodes,
              "Partition": "batch", "tres-alloc": tres, "Comment": tag}  # fmt: skip
    return "".join(str(value).ljust(QUEUE[name]) for name, value in fields.items()) + "\n"


@pytest.fixture
def book(commands, directory, tmp_path):
    """Keeps jobs.jsonl; `answer(rows)` is what squeue says next."""
    (tmp_path / "queue").write_text("")
    made = JobBook(directory.path, directory.spec, Slurm(commands(squeue=f"cat {tmp_path}/queue")))
    tag = str(JobTag(directory.spec.id, 0, "worker", "cpu", "1"))

    def answer(*rows: dict[str, object]) -> list[bills.JobRecord]:
        (tmp_path / "queue").write_text("".join(row(**{"tag": tag, **one}) for one in rows))
        made.note()
        return read_jobs(directory.path)

    return answer


def test_the_head_records_starts_requeues_and_ends(book):
    (first,) = book({"job": "7"})
    assert (first.seconds, first.state, first.site, first.kind) == (60, "RUNNING", "here", "worker")
    book({"job": "7", "used": "1:15"})
    ended, again = sorted(book({"job": "7", "restarts": 1, "used": "0:05"}), key=lambda one: one.restarts)
    assert (ended.state, ended.seconds, ended.start) == ("REQUEUED", 75, first.start)
    last = book({"job": "7", "restarts": 1, "used": "2:00:00", "state": "COMPLETED"})[-1]
    assert (last.state, last.seconds, last.start) == ("COMPLETED", 7200, again.start)


def test_others_jobs_and_those_that_wait_are_not_recorded(book):
    waits = {"job": "7", "used": "0:00", "state": "PENDING"}
    assert book(waits, {"job": "8", "tag": "raylab:other:0:worker:cpu:1"}, {"job": "9", "tag": "(null)"}) == []


def test_a_running_job_is_written_again_only_now_and_then(book, directory):
    for used in ("1:00", "1:15", "1:30"):
        book({"job": "7", "used": used})
    assert len((directory.path / bills.FILE).read_text().splitlines()) == 1


def test_a_silent_slurm_leaves_a_gap_and_no_error(commands, directory, caplog):
    JobBook(directory.path, directory.spec, Slurm(commands(squeue="echo no >&2; exit 1"))).note()
    assert "has a gap" in caplog.text


def test_bills_from_the_heads_records_are_marked(book):
    (bill,) = bill_records(book({"job": "7", "used": "1:00:00", "state": "COMPLETED"}), Billing())
    assert (bill.amount, bill.unit, bill.source, bill.is_running) == (1, CORE_HOURS, HEAD, False)
    (bill,) = bill_records(book({"job": "7", "used": "1:00:00", "state": "COMPLETED"}),
                           Billing(unit="node-hours", rate={"batch": Decimal(1)}))  # fmt: skip
    assert (bill.amount, bill.unit) == (1, "node-hours")


# what is left

ASSOC = """\
ClusterName=c Account=lungs UserName= Partition= Priority=0 ID=4
    GrpTRESMins=cpu=600(90),mem=N(2),billing=120(100),gres/gpu=N(0)
    GrpTRESRunMins=cpu=N(0),billing=N(3)
ClusterName=c Account=lungs UserName=me(0) Partition= Priority=0 ID=5
    GrpTRESMins=cpu=60(90),mem=N(2)
"""


def test_the_least_of_all_limits_counts_and_may_be_overdrawn():
    assert parse_limits(ASSOC) == {"cpu": Fraction(-30, 60), "billing": Fraction(20, 60)}
    assert parse_limits("GrpTRESMins=cpu=N(4),mem=N(2)") == {}


def test_the_users_account_is_asked_for_where_the_site_names_none(commands):
    directory = commands(sacctmgr="echo lungs", scontrol=f"cat <<'END'\n{ASSOC}END")
    assert remaining_hours(Slurm(directory), None)["cpu"] == Fraction(-1, 2)
    assert "accounts=lungs" in (directory / "scontrol.calls").read_text()


def test_without_accounting_no_budget_is_known(commands):
    assert remaining_hours(Slurm(commands(sacctmgr="exit 1", scontrol="exit 1")), None) == {}
    assert remaining_hours(Slurm(commands(sacctmgr="exit 1", scontrol="exit 1")), "lungs") == {}


def test_weights_are_per_cpu_megabyte_and_gpu():
    weights = parse_weights("CPU=1.0,Mem=0.5G,GRES/gpu=2.0")
    assert weights == {"cpu": 1, "mem": Fraction(1, 2048), "gres/gpu": 2}
    assert expected_tres(NodeType(cpus=4, memory_mb=8192, gpus=1), weights) == "cpu=4,node=1,billing=10"
    assert expected_tres(NodeType(cpus=4, memory_mb=8192), {}) == "cpu=4,node=1,billing=4"


def test_weights_are_those_of_the_partition_or_of_the_default_one(commands):
    table = "PartitionName=a Default=NO TRESBillingWeights=CPU=3\\nPartitionName=b Default=YES TRESBillingWeights=CPU=2"
    assert read_weights(Slurm(commands(scontrol=f"printf '{table}\\n'")), None) == {"cpu": 2}
    assert read_weights(Slurm(commands(scontrol="echo PartitionName=a Default=YES")), "a") == {}


def test_a_wrong_key_of_billing_names_the_right_ones(own_sites):
    own_sites("[here]\nbilling = { rates = { batch = 48 } }\n[here.nodes.cpu]\ncpus = 1\nmemory_mb = 1000\n")
    with pytest.raises(UsageError, match=r"billing\.rates") as caught:
        site("here")
    assert "rate" in caught.value.do


def test_a_rate_has_at_most_three_decimals(own_sites):
    own_sites("[here]\nbilling.rate.batch = 0.12345\n[here.nodes.cpu]\ncpus = 1\nmemory_mb = 1000\n")
    with pytest.raises(UsageError, match=r"billing\.rate\.batch.*3 decimal places"):
        site("here")
