"""Records of one run for MLflow, kept on disk until they have been sent.

An outbox is a directory:

    outbox.jsonl    one record per line, append-only, fsynced, 0600
    target.json     where the records go, and the run to create there if MLflow does not have it yet
    sent.json       {"offset"}: bytes of outbox.jsonl that MLflow has (written by forwarder.py)
    rejected.jsonl  records that MLflow rejected permanently, with the reason (forwarder.py)

Records carry the time of the append, in ms since 1970, so a replay sends the same points again and
MLflow's primary key drops them. The kinds of record:

    {"kind": "metrics", "step": int, "values": {name: float}}
    {"kind": "params", "values": {name: text}}       {"kind": "tags", "values": {name: text}}
    {"kind": "artifact", "path": absolute local file or directory, "to": artifact directory}
    {"kind": "input", "name", "digest", "source", "context"}: a data set
    {"kind": "status", "status": "RUNNING" | "FINISHED" | "FAILED" | "KILLED"}
"""

import errno
import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raylab.documents import Document, read_document
from raylab.errors import DataError, TrackingError
from raylab.files import atomic_write, flock, parse_json, write_json
from tracking.access import login

log = logging.getLogger(__name__)

Record = dict[str, Any]
KINDS = {
    "metrics": {"step", "values"},
    "params": {"values"},
    "tags": {"values"},
    "artifact": {"path", "to"},
    "input": {"name", "digest", "source", "context"},
    "status": {"status"},
}


class RunRequest(Document):
    """A run to create in MLflow. One of its tags is an idempotency key (`runs.KEY`)."""

    experiment: str
    name: str
    tags: dict[str, str]
    time: int
    """when it began, in ms since 1970"""
    nested_in: str | None = None
    """outbox of the run under which MLflow shows it"""


class Target(Document):
    """target.json. The address has no credentials."""

    uri: str
    run_id: str | None = None
    """none until MLflow has the run"""
    request: RunRequest | None = None


class Outbox:
    """The writing end of one outbox. Any number of threads and processes may append."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = self.directory / "outbox.jsonl"

    def bind(self, uri: str, run_id: str | None, request: RunRequest | None = None) -> None:
        """Set where the records go: to the run `run_id`, or to `request`, which the first delivery creates.

        The address may change later, and the id may become known; another id raises TrackingError.
        """
        try:
            bound = target(self.directory)
        except DataError as error:
            log.warning("written again: %s", error)
            bound = None
        if bound is not None:
            if run_id is not None and bound.run_id not in (None, run_id):
                raise TrackingError(
                    f"{self.directory} belongs to run {bound.run_id}, not to {run_id}",
                    "records of two runs in one outbox cannot be told apart",
                    "give the new run a directory of its own",
                )
            run_id, request = run_id or bound.run_id, bound.request or request
        given = {"run_id": run_id, "request": request}
        bound = Target(uri=login.split(uri)[0], **{name: value for name, value in given.items() if value is not None})
        write_json(self.directory / "target.json", bound.to_json())

    def begin(self, uri: str, request: RunRequest, *records: Mapping[str, Any]) -> None:
        """Bind a new outbox and write its first records; after a kill the same call completes what is missing."""
        self.bind(uri, None, request)
        if not self.path.exists():
            with atomic_write(self.path) as beside:
                beside.write_bytes(_lines(records))

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write `records` to disk in one write: once this returns, a crash cannot lose them.

        Raises ValueError for a record of an unknown kind and OSError if the disk fails; failed records leave no trace
        in the file.
        """
        line = _lines(records)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # a crash tore the last line: end it, so that readers skip it
            try:
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, "the disk stored only part of the record", str(self.path))
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)  # also releases the lock


def read(directory: Path, offset: int = 0) -> Iterator[tuple[int, Record | None]]:
    """(offset of its end, record) of every complete line from byte `offset` on.

    A line that is not a record, such as one torn by a crash, yields None; an incomplete last line is not read yet.
    """
    path = Path(directory) / "outbox.jsonl"
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = _checked(parse_json(line))
            except (ValueError, TypeError, AttributeError):
                log.warning("%s: skipped a line that is not a record, ending at byte %d", path, offset)
                record = None
            yield offset, record


def target(directory: Path) -> Target | None:
    """Where the records of an outbox go, None if it is not bound yet. Raises DataError if the file is damaged."""
    path = Path(directory) / "target.json"
    if not path.exists():
        return None
    found = read_document(path, Target, f"raylab resume {path.parents[1].name}: it writes the file again")
    return found.model_copy(update={"uri": login.split(found.uri)[0]})


def append_new_metrics(outbox: Outbox, step: int, values: Mapping[str, float]) -> None:
    """Append the metrics that the outbox does not contain yet, so that a repeated score is logged only once."""
    recorded_values: dict[str, float] = {}
    for _, record in read(outbox.directory):
        if record is not None and record["kind"] == "metrics" and record["step"] == step:
            recorded_values |= record["values"]
    if new := {name: float(value) for name, value in values.items() if recorded_values.get(name) != value}:
        outbox.append({"kind": "metrics", "step": step, "values": new})


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_checked(record), allow_nan=False) + "\n" for record in records).encode()


def _checked(record: Mapping[str, Any]) -> Record:
    kind = record.get("kind")
    if kind not in KINDS:
        raise ValueError(f"a record must be one of {', '.join(KINDS)}, not {kind!r}")
    if missing := KINDS[kind] - record.keys():
        raise ValueError(f"a {kind} record needs {', '.join(sorted(missing))}")
    checked: Record = {"time": time.time_ns() // 1_000_000, **record}
    checked["time"] = int(checked["time"])
    if kind == "metrics":
        checked["step"] = int(record["step"])
        checked["values"] = {name: _number(float(value)) for name, value in record["values"].items()}
    elif kind in ("params", "tags"):
        checked["values"] = {name: str(value) for name, value in record["values"].items()}
    elif kind == "artifact":
        checked["path"] = str(Path(record["path"]).absolute())
    return checked


def _number(value: float) -> float | str:
    # JSON has no NaN and no infinity; as text, float() reads them back.
    return value if math.isfinite(value) else str(value)
