"""ledger.jsonl: one line per step of a run, with the attempt that computed it, and one per start, change of workers,
checkpoint and handover.

Lines are only appended, never changed. Readers skip a line that a crash has truncated.
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
    """step of the checkpoint that the attempt starts from; 0 without one"""
    workers: int
    pids: tuple[int, ...] = ()
    """process id of each worker, by rank"""
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
    left: tuple[int, ...] = ()
    """processes that had been told to leave, and did"""


Group = Start | Regroup
"""A line with which a group of workers begins."""


class Step(Entry):
    step: int
    loss: float


class Checkpoint(Entry):
    checkpoint: int
    """its step"""
    time: float = 0.0
    """Unix time in seconds of its state; what is trained later is lost if the next attempt starts from it"""


class HandOver(Entry):
    moved: int
    """step of the checkpoint after which the attempt handed over to the next one"""
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
    """Parse one line of the ledger at `path`; DataError names the missing or invalid field."""
    kind = next((kind for field, kind in ENTRIES.items() if field in line), None)
    if kind is None:
        raise DataError(f"{path} has a line of an unknown kind", f"it has none of: {', '.join(ENTRIES)}")
    return parse_document(line, kind, path)


def read_ledger(path: Path) -> list[Entry]:
    """Return all entries of a ledger in the order written; an empty list if there is no file."""
    return [parse_entry(line, path) for line in read_lines(path)]


def steps(entries: Iterable[Entry]) -> list[int]:
    """Return the computed steps; a step that was computed twice appears twice."""
    return [entry.step for entry in entries if isinstance(entry, Step)]


def starts(entries: Iterable[Entry]) -> list[Start]:
    """Return the start entries of all attempts."""
    return [entry for entry in entries if isinstance(entry, Start)]


def groups(entries: Iterable[Entry]) -> list[Group]:
    """Return the entries with which groups of workers start, in new attempts or not."""
    return [entry for entry in entries if isinstance(entry, Group)]


def is_handed_over(entries: list[Entry]) -> bool:
    """Whether the last attempt handed over and the next one has not started."""
    return bool(entries) and isinstance(entries[-1], HandOver)


def summarise_ledger(path: Path) -> dict[str, Any]:
    """Return {"attempts", "regroups", "workers": of each group, "steps_repeated", "gaps", "damaged_checkpoints"} of a
    ledger.

    A gap is a step that no attempt computed; a correct run has none.
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
