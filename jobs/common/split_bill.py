"""The bill of a Slurm job, split over the runs that worked in it: pure functions, exact to the last unit.

At each moment every node of a job costs the same. A worker pays for the part of its node that it held; what nobody held
is idle, and before the first worker came start-up. What a run trained and had to train again is lost.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from cluster.bills import Bill
from raylab.training import ledger
from raylab.training.ledger import Entry
from raylab.work import WorkRecord

log = logging.getLogger(__name__)

WORK, LOST, START_UP, IDLE, HEAD = "work", "lost", "start-up", "idle", "head"
KINDS = (WORK, START_UP, LOST, IDLE, HEAD)
PARTS = 3_600_000  # of an amount: the cost of a thousandth of a second at a rate of 1 per hour
WHOLE = 1_000_000  # parts of a node


@dataclass(frozen=True)
class Work:
    """What a worker of `run` did on a node: `kind` is WORK, LOST or START_UP. Times in ms; share in parts of WHOLE."""

    job: str
    node: str
    begin: int
    end: int
    share: int
    run: str
    kind: str


class Line(NamedTuple):
    """A line of a job's bill; `run` is empty where no run pays. `parts`: PARTS of one of the bill's unit."""

    job: str
    run: str
    kind: str
    parts: int


def list_work(run: str, records: Iterable[WorkRecord], entries: Sequence[Entry]) -> list[Work]:
    """What the workers of a run did, from its records of work and its ledger."""
    found = []
    windows = find_lost(entries)
    for one in records:
        training = one.end if one.training is None else one.training
        found += _pieces(run, one, START_UP, one.begin, training)
        at = training
        for since, until in windows:
            if since < training and until < one.end:  # a worker of the next attempt, which has just begun
                continue
            since, until = max(since, at), min(until, one.end)
            if since < until:
                found += _pieces(run, one, WORK, at, since) + _pieces(run, one, LOST, since, until)
                at = until
        found += _pieces(run, one, WORK, at, one.end)
    return found


def _pieces(run: str, one: WorkRecord, kind: str, begin: float, end: float) -> list[Work]:
    first, last = round(begin * 1000), round(end * 1000)
    node = one.node.partition(".")[0]
    return [Work(one.job, node, first, last, round(one.share * WHOLE), run, kind)] if first < last else []


def find_lost(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """(since, until) of the times whose steps were trained again, in Unix seconds: from the state that an attempt
    starts from until it starts."""
    lost = []
    saved: dict[int, float] = {}  # time of each checkpoint
    reached, begun = 0, 0.0  # by the attempt before, and since when
    for entry in entries:
        if isinstance(entry, ledger.Start):
            if reached > entry.start:
                known = [at for step, at in saved.items() if step <= entry.start]
                lost.append((max(known, default=begun), entry.time))
            reached, begun = entry.start, entry.time
            saved = {step: at for step, at in saved.items() if step <= entry.start}
        elif isinstance(entry, ledger.Step):
            reached = entry.step
        elif isinstance(entry, ledger.Checkpoint) and entry.time:
            saved[entry.checkpoint] = entry.time
    return lost


def split_bill(bill: Bill, works: Iterable[Work]) -> list[Line]:
    """The lines of a bill, whose parts sum to the bill's exactly. Work outside of the job's time is cut off."""
    begin, end = bill.start * 1000, bill.end * 1000
    nodes: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        if work.job == bill.job and max(work.begin, begin) < min(work.end, end):
            nodes[work.node].append(work)
    amounts: dict[tuple[str, str], Fraction] = defaultdict(Fraction)  # in ms of one node
    count = max(bill.nodes, len(nodes))
    if count > bill.nodes:
        log.warning("job %s has %d node(s), but its workers name %s", bill.job, bill.nodes, ", ".join(sorted(nodes)))
    for one in nodes.values():
        for key, amount in _split_node(one, begin, end, bill.is_head).items():
            amounts[key] += amount
    amounts["", HEAD if bill.is_head else IDLE] += (count - len(nodes)) * (end - begin)
    total = count_parts(bill)
    scale = Fraction(total, count * (end - begin)) if end > begin else Fraction(0)
    exact = {key: amount * scale for key, amount in amounts.items() if amount}
    return [Line(bill.job, run, kind, parts) for (run, kind), parts in apportion(exact, total).items()]


def count_parts(bill: Bill) -> int:
    """The amount of a bill in PARTS of its unit."""
    parts = bill.amount * PARTS
    if parts.denominator != 1:
        raise ValueError(f"the rate of job {bill.job} has more than three decimals: {bill.rate}")
    return parts.numerator


def _split_node(works: Sequence[Work], begin: int, end: int, is_head: bool) -> dict[tuple[str, str], Fraction]:
    """The milliseconds of one node between `begin` and `end`, by run and kind."""
    amounts: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    changes: dict[int, list[tuple[Work, bool]]] = defaultdict(list)
    for work in works:
        changes[max(work.begin, begin)].append((work, True))
        changes[min(work.end, end)].append((work, False))
    active: dict[tuple[str, str], int] = defaultdict(int)
    at, nobody = begin, HEAD if is_head else START_UP
    for moment in [*sorted(changes), end]:
        held = sum(active.values())
        for key, share in active.items():
            amounts[key] += Fraction((moment - at) * share, max(held, WHOLE))
        amounts["", nobody] += Fraction((moment - at) * max(0, WHOLE - held), WHOLE)
        at, nobody = moment, HEAD if is_head else IDLE
        for work, begins in changes.get(moment, ()):
            active[work.run, work.kind] += work.share if begins else -work.share
    return amounts


def apportion(exact: Mapping[tuple[str, str], Fraction], total: int) -> dict[tuple[str, str], int]:
    """Integers that sum to `total`, each less than 1 from its exact amount: by largest remainders."""
    parts = {key: amount.numerator // amount.denominator for key, amount in exact.items()}
    by_remainder = sorted(exact, key=lambda key: (parts[key] - exact[key], key))
    for key in by_remainder[: total - sum(parts.values())]:
        parts[key] += 1
    return parts
