"""What the runs of a home have cost: their work, the bills of its Slurm jobs, and how MLflow is told."""

import glob
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from cluster import bills, sites
from cluster.bills import Bill, JobRecord
from cluster.directory import Directory
from cluster.sites import Billing
from cluster.slurm import Slurm
from jobs.common import home
from jobs.common.split_bill import KINDS, PARTS, Line, Work, list_work, split_bill
from raylab.errors import RaylabError, SlurmError, UsageError
from raylab.files import write_json
from raylab.training import ledger
from raylab.training.run_record import RunRecord
from raylab.work import FILE as WORK_FILE
from raylab.work import WorkRecord, read_work
from tracking.outbox import Outbox

log = logging.getLogger(__name__)

FILE = "cost.json"  # of a run: the lines of bills that it pays, as a table of MLflow
JOULES = 3_600_000  # of a kWh
COLUMNS = ("job", "kind", "amount", "unit", "source")


@dataclass(frozen=True)
class RunWork:
    """A run or trial, and the records of its workers."""

    directory: Path
    record: RunRecord
    workers: list[WorkRecord]

    @property
    def name(self) -> str:
        """Its path below HOME/runs: NAME, or SEARCH/trials/NUMBER."""
        return str(self.directory.relative_to(home.home() / "runs"))

    def energy(self) -> dict[str, float]:
        """The kWh of its workers by "gpu" and "cpu": only where all of them measured it."""
        return {
            name: sum(worker.joules[name] for worker in self.workers) / JOULES
            for name in ("gpu", "cpu")
            if self.workers and all(name in worker.joules for worker in self.workers)
        }

    def core_hours(self) -> float:
        """The hours of its workers' CPUs, billed or not."""
        return sum(worker.cpus * (worker.end - worker.begin) for worker in self.workers) / 3600


@dataclass(frozen=True)
class Costs:
    """The bills of all jobs in which runs of a home worked, and of its clusters, and their lines."""

    runs: list[RunWork]
    bills: list[Bill]
    lines: list[Line]
    unbilled: set[str]
    """jobs with work for which there is neither accounting nor a record"""

    def total(self, unit: str, lines: Iterable[Line]) -> dict[str, int]:
        """The parts of `lines` in bills of this unit, by kind."""
        parts = dict.fromkeys(KINDS, 0)
        for line in lines:
            if self.of_job[line.job].unit == unit:
                parts[line.kind] += line.parts
        return parts

    @property
    def units(self) -> list[str]:
        return sorted({bill.unit for bill in self.bills})

    @cached_property
    def of_job(self) -> dict[str, Bill]:
        """The bill of one start of each job: the unit and the source of all of them are the same."""
        return {bill.job: bill for bill in self.bills}


def collect_costs(slurm: Slurm, only: Path | None = None) -> Costs:
    """The costs of this home up to now; with `only` those of the run or search in that directory, and of its jobs the
    lines that it pays alone."""
    runs = list(list_runs(only))
    works = [work for run in runs for work in works_of(run)]
    records = {(one.job, one.restarts): one for directory in list_clusters() for one in bills.read_jobs(directory.path)}
    worked = {work.job for work in works if work.job}
    jobs = worked if only else worked | {one.job for one in records.values()}
    of_site = {site: billing_of(site, Billing()) for site in dict.fromkeys(one.site for one in records.values())}
    billing = {one.job: of_site[one.site] for one in records.values()}
    heads = {one.job for one in records.values() if one.kind == "head"}
    try:
        found = bills.read_accounting(slurm, sorted(jobs), billing, heads)
    except SlurmError as error:
        log.info("Slurm's accounting does not answer: %s", error)
        found = []
        records |= {(one.job, one.restarts): one for one in list_present_jobs(slurm)}
    accounted = {bill.job for bill in found}
    for site in of_site:
        rest = [one for one in records.values() if one.site == site and one.job in jobs - accounted]
        found += bills.bill_records(rest, of_site[site])
    by_job: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        by_job[work.job].append(work)
    lines = [line for bill in found for line in split_bill(bill, by_job[bill.job])]
    return Costs(runs, found, lines, worked - {bill.job for bill in found})


def list_clusters() -> list[Directory]:
    """The directories of clusters of this home with a record of jobs, also of those that are down."""
    return [Directory(path.parent) for path in sorted((home.home() / "clusters").glob(f"*/{bills.FILE}"))]


def list_present_jobs(slurm: Slurm) -> list[JobRecord]:
    """What Slurm itself says about jobs of this home's clusters: the heads' records are minutes old."""
    found = []
    for directory in list_clusters():
        if (directory.path / "cluster.json").is_file():
            with suppress(SlurmError):
                found += bills.list_jobs(slurm, directory.spec)
    return found


def list_runs(only: Path | None = None) -> Iterator[RunWork]:
    """The runs and trials of this home that have records of work; with `only`, those in that directory."""
    name = "[!.]*" if only is None else glob.escape(only.name)
    for pattern in (name, f"{name}/trials/*"):
        for directory, record in home.records(pattern):
            if only in (None, directory, directory.parents[1]) and (workers := read_work(directory)):
                yield RunWork(directory, record, workers)


def works_of(run: RunWork) -> list[Work]:
    return list_work(run.name, run.workers, ledger.read_ledger(run.directory / ledger.FILE))


def billing_of(site: str, otherwise: Billing) -> Billing:
    """How a site charges by the present site file; `otherwise`, with a warning, if it is not described there."""
    try:
        return sites.site(site).billing
    except UsageError as error:
        log.warning("how site '%s' bills jobs may be out of date: %s", site, error.what)
        return otherwise


def owner_of(run: RunWork) -> Path:
    """The directory of the run itself, or of the search that the trial belongs to."""
    return run.directory.parents[1] if run.record.kind == "trial" else run.directory


# --- for MLflow ---


def tell_end(directory: Path) -> None:
    """Put the cost of a run or search that has just trained into its outbox, if it ran in Slurm jobs."""
    trials = (path.parent for path in directory.glob(f"trials/*/{WORK_FILE}"))
    try:
        if any(worker.job for place in (directory, *trials) for worker in read_work(place)):
            tell_mlflow(collect_costs(Slurm(), directory), is_ending=True)
    except RaylabError as error:  # the run itself has succeeded
        log.warning("the cost of this run is not recorded, run raylab cost later: %s", error)


def tell_mlflow(costs: Costs, is_ending: bool = False) -> list[Path]:
    """Put the cost of each run, trial and search into its outbox, as tags and as a table, where it has changed, and
    return their directories. A running one is left to its own process, which calls this with `is_ending` at its end."""
    of_run: dict[str, list[Line]] = defaultdict(list)
    for line in costs.lines:
        of_run[line.run].append(line)
    lines: dict[Path, list[Line]] = defaultdict(list)
    energy: dict[Path, list[dict[str, float]]] = defaultdict(list)
    for run in costs.runs:
        for directory in {run.directory, owner_of(run)}:  # a search pays what its trials pay
            lines[directory] += of_run[run.name]
            energy[directory].append(run.energy())
    return [
        directory
        for directory, own in lines.items()
        if own
        and (is_ending or home.note(directory).status != "RUNNING")
        and _tell_run(costs, directory, own, energy[directory])
    ]


def _tell_run(costs: Costs, directory: Path, lines: list[Line], energy: list[dict[str, float]]) -> bool:
    rows = [
        [line.job, line.kind, to_hours(line.parts), costs.of_job[line.job].unit, costs.of_job[line.job].source]
        for line in sorted(lines)
    ]
    units = sorted({str(row[3]) for row in rows})
    amounts = [to_hours(sum(line.parts for line in lines if costs.of_job[line.job].unit == unit)) for unit in units]
    cost = " + ".join(f"{amount:.6g} {unit}" for amount, unit in zip(amounts, units, strict=True))
    table, path = {"columns": list(COLUMNS), "data": rows}, directory / FILE
    if home.note(directory).cost == cost and path.is_file() and json.loads(path.read_text()) == table:
        return False
    write_json(path, table)
    tags = {
        "raylab.cost": cost,
        "raylab.cost_source": ", ".join(sorted({str(row[4]) for row in rows})),
        "raylab.energy": show_energy(energy),
        "mlflow.loggedArtifacts": json.dumps([{"path": FILE, "type": "table"}]),
    }
    outbox = Outbox(directory / "outbox")
    outbox.append({"kind": "tags", "values": tags}, {"kind": "artifact", "path": str(path), "to": ""})
    home.annotate(directory, cost=cost)  # last: after a kill before it, the next call tells it again
    return True


def show_energy(energy: Iterable[dict[str, float]]) -> str:
    """`GPU 0.12 kWh, CPU not measured`: the sum over runs, if all of them measured it."""
    every = list(energy)
    texts = []
    for name in ("gpu", "cpu"):
        is_known = every and all(name in one for one in every)
        amount = f"{sum(one[name] for one in every):.3g} kWh" if is_known else "not measured"
        texts.append(f"{name.upper()} {amount}")
    return ", ".join(texts)


def to_hours(parts: int) -> float:
    return float(Fraction(parts, PARTS))
