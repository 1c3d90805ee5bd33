"""What Slurm bills for jobs: from its accounting, or where there is none from the records of a cluster's head.

jobs.jsonl in a cluster's directory: a line whenever a job of the cluster starts, ends or is requeued, and every
RECORD_SECONDS; the last line of a job and restart counts. Written by the head, and at the end by `down`.
"""

import json
import logging
import os
import pwd
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from cluster.job_tag import JobTag
from cluster.sites import Billing, NodeType
from cluster.slurm import Slurm, parse_duration
from cluster.spec import ClusterSpec
from raylab.documents import Document, parse_document
from raylab.errors import SlurmError
from raylab.files import read_lines

log = logging.getLogger("raylab.bills")

FILE = "jobs.jsonl"
RECORD_SECONDS = 300.0
CORE_HOURS, BILLING_HOURS = "core-hours", "billing-hours"
ACCOUNTING, HEAD = "sacct", "the head's own records"
QUEUE = {"JobID": 20, "State": 20, "RestartCnt": 10, "TimeUsed": 20, "NumNodes": 10, "Partition": 60, "tres-alloc": 200,
         "Comment": 200}  # fmt: skip
SACCT = ("JobIDRaw", "Partition", "Start", "ElapsedRaw", "State", "NNodes", "AllocTRES")
EPOCH = {"SLURM_TIME_FORMAT": "%s"}


class JobRecord(Document):
    """A line of jobs.jsonl: one start of a job."""

    job: str
    restarts: int
    site: str
    kind: str
    """head, if no worker can be in it, or worker"""
    partition: str
    nodes: int
    tres: str
    """what Slurm has allocated, such as cpu=4,mem=8G,node=1,billing=4"""
    seconds: int
    """how long it has run"""
    start: float
    """Unix time in seconds"""
    state: str
    time: float
    """when this line was written"""


@dataclass(frozen=True)
class Bill:
    """One start of a job, and what it costs per hour in `unit`. Times are Unix times in whole seconds."""

    job: str
    start: int
    end: int
    nodes: int
    rate: Fraction
    unit: str
    is_priced: bool = False
    """whether the site file says what it costs, and not Slurm"""
    is_head: bool = False
    is_running: bool = False
    source: str = ACCOUNTING

    @property
    def amount(self) -> Fraction:
        """What it costs until `end`, in the unit."""
        return self.rate * (self.end - self.start) / 3600


def rate(tres: str, partition: str, nodes: int, billing: Billing) -> tuple[Fraction, str]:
    """What an hour of a job costs, and the unit: the site's rate of its partition for each whole node, else what Slurm
    bills by its TRES weights, else its CPUs."""
    if (of_node := billing.rate.get(partition)) is not None:
        return Fraction(of_node) * nodes, billing.unit
    amounts = parse_tres(tres)
    cpus = amounts.get("cpu", 0)
    weighted = amounts.get("billing", cpus)
    return Fraction(weighted), CORE_HOURS if weighted == cpus else BILLING_HOURS


def parse_tres(text: str) -> dict[str, int]:
    """The counts in Slurm's list of resources, cpu=4,node=1,billing=4; not of memory, which has a unit."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name: int(count) for name, _, count in pairs if count.isdigit()}


# --- from accounting ---


def read_accounting(slurm: Slurm, jobs: Sequence[str], billings: Mapping[str, Billing], heads: set[str]) -> list[Bill]:
    """Every start of these jobs, as `sacct` lists them. `billings`: by job, of its site; `heads`: jobs of heads.

    Raises SlurmError where Slurm has no accounting.
    """
    if not jobs:
        return []
    table = slurm.run(
        "sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={','.join(jobs)}",
        f"--format={','.join(SACCT)}", once=True, environment=EPOCH,
    )  # fmt: skip
    return parse_accounting(table, billings, heads)


def parse_accounting(table: str, billings: Mapping[str, Billing], heads: set[str]) -> list[Bill]:
    """Bills from the table of `sacct`; starts that took no time cost nothing and are left out."""
    bills = []
    for line in table.splitlines():
        job, partition, start, seconds, state, nodes, tres = line.split("|")
        if start.isdigit() and int(seconds):
            billing = billings.get(job, Billing())
            per_hour, unit = rate(tres, partition, int(nodes), billing)
            end, is_priced = int(start) + int(seconds), partition in billing.rate
            bills.append(
                Bill(job, int(start), end, int(nodes), per_hour, unit, is_priced, job in heads, state == "RUNNING")
            )
    return unify_units(bills)


def unify_units(bills: list[Bill]) -> list[Bill]:
    """Where Slurm weighs the resources of any of these jobs, all that it bills is in billing-hours."""
    if not any(bill.unit == BILLING_HOURS for bill in bills):
        return bills
    return [replace(bill, unit=BILLING_HOURS) if not bill.is_priced else bill for bill in bills]


# --- the head's own records ---


class JobBook:
    """Keeps jobs.jsonl of the cluster with this specification in `directory`."""

    def __init__(self, directory: Path, spec: ClusterSpec, slurm: Slurm) -> None:
        self.path, self.spec, self.slurm = directory / FILE, spec, slurm
        self.last = {(one.job, one.restarts): one for one in read_jobs(directory)}

    def note(self) -> None:
        """Ask Slurm for the cluster's jobs, those that have ended a moment ago too, and append what is new. A failure
        leaves a gap, with a warning."""
        try:
            for record in list_jobs(self.slurm, self.spec):
                self._note(record)
        except (SlurmError, OSError) as error:
            log.warning("%s has a gap: %s", self.path, error)

    def _note(self, record: JobRecord) -> None:
        now, before = record.time, self.last.get((record.job, record.restarts))
        if before is not None:
            # the first look at a start tells it best: later ones differ by the time that squeue takes
            record = record.model_copy(update={"start": before.start})
        earlier = self.last.get((record.job, record.restarts - 1))
        if before is None and earlier is not None and earlier.state == "RUNNING":
            self._append(earlier.model_copy(update={"state": "REQUEUED", "time": now}))
        is_new = before is None or before.state != record.state or now - before.time >= RECORD_SECONDS
        self.last[record.job, record.restarts] = (
            record if is_new or before is None else record.model_copy(update={"time": before.time})
        )
        if is_new:
            self._append(record)

    def _append(self, record: JobRecord) -> None:
        self.last[record.job, record.restarts] = record
        with self.path.open("a") as file:
            file.write(json.dumps(record.to_json()) + "\n")


def list_jobs(slurm: Slurm, spec: ClusterSpec) -> list[JobRecord]:
    """The cluster's jobs that run or have ended a moment ago. Raises SlurmError if Slurm does not answer."""
    return parse_queue(slurm.read_queue(QUEUE, "--states=all"), spec, time.time())


def parse_queue(rows: Iterable[Mapping[str, str]], spec: ClusterSpec, now: float) -> list[JobRecord]:
    """The jobs of a cluster that have run, from rows of squeue (see QUEUE)."""
    records = []
    for row in rows:
        tag, seconds = JobTag.parse(row["Comment"]), parse_duration(row["TimeUsed"])
        if tag is None or tag.cluster != spec.id or not seconds:
            continue
        records.append(
            JobRecord(
                job=row["JobID"],
                restarts=int(row["RestartCnt"] or 0),
                site=spec.site.name,
                kind="head" if tag.kind == "head" and not tag.type else "worker",
                partition=row["Partition"],
                nodes=int(row["NumNodes"] or 1),
                tres=row["tres-alloc"],
                seconds=int(seconds),
                start=now - seconds,
                state=row["State"],
                time=now,
            )
        )
    return records


def read_jobs(directory: Path) -> list[JobRecord]:
    """The last line of each start of a job of the cluster in `directory`."""
    path = directory / FILE
    records = [parse_document(line, JobRecord, path) for line in read_lines(path)]
    return list({(one.job, one.restarts): one for one in records}.values())


def bill_records(records: Iterable[JobRecord], billing: Billing) -> list[Bill]:
    """What the jobs in a head's records cost, as far as it has seen them run."""
    bills = []
    for one in records:
        per_hour, unit = rate(one.tres, one.partition, one.nodes, billing)
        start = round(one.start)
        bills.append(
            Bill(
                one.job, start, start + one.seconds, one.nodes, per_hour, unit, one.partition in billing.rate,
                one.kind == "head", one.state == "RUNNING", HEAD,
            )
        )  # fmt: skip
    return unify_units(bills)


# --- what a job will cost, and what is left ---


def read_weights(slurm: Slurm, partition: str | None) -> dict[str, Fraction]:
    """The weights with which Slurm bills resources in a partition (None: the default one): for each CPU, MB of memory,
    node, gres/gpu. Empty where it has none: then CPUs count. Raises SlurmError if Slurm does not answer."""
    table = slurm.run("scontrol", "--oneliner", "show", "partition", *([partition] if partition else []))
    for line in table.splitlines():
        found = re.search(r"TRESBillingWeights=(\S+)", line)
        if found is not None and (partition or "Default=YES" in line):
            return parse_weights(found[1])
    return {}


def parse_weights(text: str) -> dict[str, Fraction]:
    """CPU=1.0,Mem=0.25G,GRES/gpu=2.0 as a number for each CPU, MB and GPU."""
    weights = {}
    for name, number, suffix in re.findall(r"([\w/:-]+)=([\d.]+)([KMGTP]?)", text):
        megabytes = Fraction(1024) ** ("KMGTP".index(suffix or "M") - 1)
        weights[name.lower()] = Fraction(number) / megabytes
    return weights


def expected_tres(node: NodeType, weights: Mapping[str, Fraction]) -> str:
    """What Slurm will allocate and bill for a node, in its own words."""
    counts = {"cpu": node.cpus, "mem": node.memory_mb, "node": 1, "gres/gpu": node.gpus}
    billing = sum((counts.get(name, 0) * weight for name, weight in weights.items()), Fraction(0))
    return f"cpu={node.cpus},node=1,billing={int(billing) if weights else node.cpus}"


def parse_limits(text: str) -> dict[str, Fraction]:
    """The hours left by resource, from `scontrol show assoc_mgr`: the least over all associations with a limit."""
    left: dict[str, Fraction] = {}
    for limits in re.findall(r"GrpTRESMins=(\S+)", text):
        for name, limit, used in re.findall(r"([\w/:.-]+)=(\d+)\((\d+)\)", limits):
            hours = Fraction(int(limit) - int(used), 60)
            left[name] = min(hours, left.get(name, hours))
    return left


def remaining_hours(slurm: Slurm, account: str | None) -> dict[str, Fraction]:
    """The hours that Slurm leaves an account (None: the user's default one) by resource, such as cpu and billing. Empty
    where there is no limit, or nobody says so."""
    try:
        if account is None:
            name = pwd.getpwuid(os.getuid()).pw_name
            account = slurm.run("sacctmgr", "--noheader", "--parsable2", "show", "user", name, "format=DefaultAccount")
        if not account.strip():
            return {}
        return parse_limits(slurm.run("scontrol", "show", "assoc_mgr", f"accounts={account.strip()}", "flags=assoc"))
    except SlurmError as error:
        log.info("no budget is known: %s", error)
        return {}
