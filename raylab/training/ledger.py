"""ledger.jsonl: one line per step of a run, with the attempt that computed it, and one per start, change of workers,
average over sites, checkpoint, handover and end.

Lines are only appended, never changed. Readers skip a line that a crash has truncated. Each line ends with `chain`, the
SHA-256 of the head before it and of its own text: the head of the last line depends on every line. After lines without
a chain, which earlier versions wrote, the head is the SHA-256 of the file so far.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from raylab.documents import Document, parse_document
from raylab.errors import DataError
from raylab.files import parse_json, read_lines

FILE = "ledger.jsonl"
RESTORE = "restore it from a copy; it alone says what the run has computed"


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
    cpus: tuple[str, ...] = ()
    """kind of the CPU of each worker, by rank (cpu.py)"""
    recipe_sha256: str = ""
    """of the recipe (`hash_recipe`)"""


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
    cpus: tuple[str, ...] = ()
    """kind of the CPU of each worker, by rank"""


Group = Start | Regroup
"""A line with which a group of workers begins."""


class Step(Entry):
    step: int
    loss: float


class Average(Entry):
    """The weights were averaged over several sites. The line of its step may follow it, because that has the scores of
    the average."""

    average: int
    """step after which"""
    sites: tuple[str, ...]
    """names of the sites whose weights were averaged"""
    weights_sha256: str
    """of the network that is scored, the same at all these sites"""


class Checkpoint(Entry):
    checkpoint: int
    """its step"""
    time: float = 0.0
    """Unix time in seconds of its state; what is trained later is lost if the next attempt starts from it"""
    state_sha256: str = ""
    """of its state (`checkpoint.hash_state`)"""


class HandOver(Entry):
    moved: int
    """step of the checkpoint after which the attempt handed over to the next one"""
    why: str


class Finish(Entry):
    """The run is over, and its model is written."""

    finished: int
    """the last step"""
    weights_sha256: str
    """of the network as it was then"""
    model_sha256: str
    """of model.safetensors, the network of the best epoch"""


ENTRIES: dict[str, type[Entry]] = {
    "start": Start,
    "regroup": Regroup,
    "step": Step,
    "average": Average,
    "checkpoint": Checkpoint,
    "moved": HandOver,
    "finished": Finish,
}
"""The type of a line, by the field that no other type has."""


CHAINED = re.compile(rb'(\{.*), "chain": "([0-9a-f]{64})"\}')


def render_line(entry: Entry, head: str) -> tuple[bytes, str]:
    """Return the line of `entry` after the head `head`, and the head of the ledger with it."""
    content = json.dumps(entry.to_json()).encode()[:-1]
    head = _link(head, content)
    return content + f', "chain": "{head}"}}\n'.encode(), head


def _link(head: str, content: bytes) -> str:
    return hashlib.sha256(head.encode() + content).hexdigest()


def read_content(path: Path) -> bytes:
    """Return the content of a finished run's ledger; DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} could not be read", error.strerror or str(error), RESTORE) from error


def complete_lines(content: bytes) -> bytes:
    """Return the content of a ledger without the lines at its end that a crash has truncated."""
    lines = content.split(b"\n")[:-1]
    while lines and not _is_object(lines[-1]):
        del lines[-1]
    return b"".join(line + b"\n" for line in lines)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


class Chain(NamedTuple):
    """The chain of a ledger."""

    head: str
    lines: int
    unchained: int
    """lines without a chain, of an earlier version"""
    broken: tuple[int, ...]
    """numbers of lines, from 1, whose chain does not follow from the lines before and their own text"""


def follow_chain(content: bytes) -> Chain:
    """Return the chain of a ledger with complete lines; its head is what the next line is chained to."""
    so_far, unchained, broken = hashlib.sha256(), 0, []
    head = so_far.hexdigest()
    lines = content.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        so_far.update(line + b"\n")
        if match := CHAINED.fullmatch(line):
            if _link(head, match[1]) != match[2].decode():
                broken.append(number)
            head = match[2].decode()
        else:
            unchained += 1
            head = so_far.hexdigest()
    return Chain(head, len(lines), unchained, tuple(broken))


def find_head(content: bytes) -> str:
    """Return the head of a ledger with complete lines, by its last line if that has a chain."""
    match = CHAINED.fullmatch(content[:-1].rpartition(b"\n")[2])
    return match[2].decode() if match else follow_chain(content).head


def parse_entry(line: dict[str, Any], path: Path) -> Entry:
    """Parse one line of the ledger at `path`; DataError names the missing or invalid field."""
    kind = next((kind for field, kind in ENTRIES.items() if field in line), None)
    if kind is None:
        raise DataError(f"{path} has a line of an unknown kind", f"it has none of: {', '.join(ENTRIES)}", RESTORE)
    return parse_document(line, kind, path, RESTORE)


def read_ledger(path: Path) -> list[Entry]:
    """Return all entries of a ledger in the order written; an empty list if there is no file."""
    return [parse_entry(line, path) for line in read_lines(path)]


def steps(entries: Iterable[Entry]) -> list[int]:
    """Return the computed steps; a step that was computed twice appears twice."""
    return [entry.step for entry in entries if isinstance(entry, Step)]


def count_gaps(numbers: set[int]) -> int:
    """Return how many numbers from 1 to the largest are missing; a damaged ledger may have any number."""
    positive = [number for number in numbers if number > 0]
    return max(positive, default=0) - len(positive)


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
    """Return {"attempts", "regroups", "workers": of each group, "cpus": their kinds, "steps_repeated", "gaps",
    "damaged_checkpoints"} of a ledger.

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
        "cpus": sorted({kind for group in groups(entries) for kind in group.cpus}),
        "steps_repeated": repeated,
        "gaps": count_gaps(seen),
        "damaged_checkpoints": sum(len(start.damaged) for start in begun),
    }
