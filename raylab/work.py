"""work.jsonl of a run or trial: which worker held which part of which node, from when to when, and its energy.

Each worker process has a WorkMeter, whose records go to the one process that writes the run's directory. A record
replaces the earlier ones of its id, so that of a worker which was killed the last one remains.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from raylab.documents import Document, parse_document
from raylab.energy import open_counters
from raylab.files import read_lines

log = logging.getLogger(__name__)

FILE = "work.jsonl"
WRITE_SECONDS = 30.0  # between two records of a worker: what a kill of everyone can leave unaccounted


class WorkRecord(Document):
    """The time of one worker process; times are Unix times in seconds."""

    id: str
    worker: str
    job: str = ""
    """id of the Slurm job in which it ran; empty outside of Slurm"""
    node: str
    cpus: float
    share: float
    """the part of what raylab may use on the node that it held"""
    begin: float
    training: float | None = None
    """since when it trained; none if it never did"""
    end: float
    """the last time at which it is known to have been there"""
    joules: dict[str, float] = Field({})
    """by "gpu" and "cpu", of its share; what is missing was not measured"""


def append_work(directory: Path, record: dict[str, Any]) -> None:
    """Append a record to the run in `directory`."""
    with (directory / FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_work(directory: Path) -> list[WorkRecord]:
    """The records of a run, the last of each worker process, in the order in which they began."""
    path = directory / FILE
    last = {str(line.get("id")): line for line in read_lines(path)}
    return sorted((parse_document(line, WorkRecord, path) for line in last.values()), key=lambda one: one.begin)


class WorkMeter:
    """Reports this process as a worker while the context is open: at its begin, every WRITE_SECONDS, and at its end.

    `write` takes each record and may raise nothing. `share`: see WorkRecord; `gpus`: whether it trains on one.
    """

    def __init__(
        self, worker: str, cpus: float, share: float, gpus: bool, write: Callable[[dict[str, Any]], None]
    ) -> None:
        self.write, self.read_joules = write, open_counters(gpus, share)
        self.record = WorkRecord(
            id=secrets.token_hex(4),
            worker=worker,
            job=os.environ.get("SLURM_JOB_ID", ""),
            node=socket.gethostname(),
            cpus=cpus,
            share=share,
            begin=time.time(),
            end=time.time(),
        )
        self.has_ended = threading.Event()
        self.thread = threading.Thread(target=self._report, name="work-meter", daemon=True)

    def __enter__(self) -> Self:
        self._write()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.has_ended.set()
        self.thread.join()
        self._write()

    def note_training(self) -> None:
        """This process is in a group that trains."""
        if self.record.training is None:
            self.record = self.record.model_copy(update={"training": time.time()})

    def _report(self) -> None:
        while not self.has_ended.wait(WRITE_SECONDS):
            self._write()

    def _write(self) -> None:
        self.write(self.record.model_copy(update={"end": time.time(), "joules": self.read_joules()}).to_json())


def write_to(directory: Path) -> Callable[[dict[str, Any]], None]:
    """The `write` of a process that writes the run in `directory` itself. A full disk does not end the run."""

    def write(record: dict[str, Any]) -> None:
        try:
            append_work(directory, record)
        except OSError as error:
            log.warning("%s lacks a record: %s", directory / FILE, error)

    return write
