"""ledger.jsonl: one line a step of a run, with the attempt that computed it; and every start, change of workers,
checkpoint and handover.

Lines are appended and never changed. A line that a crash has cut short is left out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raylab.documents import Document, parse_document
from raylab.errors import DataError
from raylab.files import read_lines

FILE = "ledger.jsonl"


class Entry(Document):
    attempt: int
    """counted from 0"""


class Start(Entry):
    start: int
    """step of the checkpoint that the attempt begins from; 0 without one"""
    workers: int
    pids: tuple[int, ...] = ()
    """process of each worker, by rank"""
    time: float = 0.0
    """Unix time in seconds"""
    damaged: tuple[str, ...] = ()
    """newer checkpoints that could not be read"""


class Regroup(Entry):
    """The workers of an attempt have changed."""

    regroup: int
    """last step before the change"""
    workers: int
    pids: tuple[int, ...]
    """process of each worker, by rank"""
    time: float
    """Unix time in seconds"""


Group = Start | Regroup
"""A line with which a group of workers begins."""


class Step(Entry):
    step: int
    loss: float


class Checkpoint(Entry):
    checkpoint: int
    """its step"""


class HandOver(Entry):
    moved: int
    """step of the checkpoint after which the attempt made way for the next one"""
    why: str


ENTRIES: dict[str, type[Entry]] = {
    "start": Start,
    "regroup": Regroup,
    "step": Step,
    "checkpoint": Checkpoint,
    "moved": HandOver,
}
"""The type of a line, by the field that no other type has."""


def parse_entry(line: dict[str, Any], path: Path) -> Entry:
    """One line of the ledger at `path`; DataError names what is missing or wrong in it."""
    kind = next((kind for field, kind in ENTRIES.items() if field in line), None)
    if kind is None:
        raise DataError(f"{path} has a line of no known kind", f"it has none of: {', '.join(ENTRIES)}")
    return parse_document(line, kind, path)


def read_ledger(path: Path) -> list[Entry]:
    """All entries of a ledger, in the order in which they were written; none where there is no file."""
    return [parse_entry(line, path) for line in read_lines(path)]


def steps(entries: Iterable[Entry]) -> list[int]:
    """The steps that were computed, one for every time."""
    return [entry.step for entry in entries if isinstance(entry, Step)]


def starts(entries: Iterable[Entry]) -> list[Start]:
    """The beginnings of the attempts."""
    return [entry for entry in entries if isinstance(entry, Start)]


def groups(entries: Iterable[Entry]) -> list[Group]:
    """The beginnings of the groups of workers, of new attempts or not."""
    return [entry for entry in entries if isinstance(entry, Group)]


def is_handed_over(entries: list[Entry]) -> bool:
    """Whether the last attempt made way for another, which has not begun."""
    return bool(entries) and isinstance(entries[-1], HandOver)


def summarise_ledger(path: Path) -> dict[str, Any]:
    """{"attempts", "regroups", "workers": of each group, "steps_repeated", "gaps", "damaged_checkpoints"} of a ledger.

    A gap is a step that no attempt computed: there must be none.
    """
    entries = read_ledger(path)
    repeated, reached = 0, 0
    for entry in entries:
        if isinstance(entry, Start):
            repeated += max(0, reached - entry.start)
            reached = entry.start
        elif isinstance(entry, Step):
            repeated += entry.step <= reached
            reached = entry.step
    begun, seen = starts(entries), set(steps(entries))
    return {
        "attempts": len(begun),
        "regroups": sum(isinstance(entry, Regroup) for entry in entries),
        "workers": [group.workers for group in groups(entries)],
        "steps_repeated": repeated,
        "gaps": len(set(range(1, max(seen, default=0) + 1)) - seen),
        "damaged_checkpoints": sum(len(start.damaged) for start in begun),
    }
