"""How a run and a trial ended: result.json and end.json, checked when read."""

from pathlib import Path
from typing import Any

from pydantic import Field

from raylab.documents import Document, read_json

FILE = "result.json"
END = "end.json"


class Best(Document):
    """The metrics of the best epoch."""

    step: int
    loss: float


class RunResult(Document):
    """What every finished run has; the metrics of `val` are those of the last epoch."""

    steps: int
    best: Best
    val: dict[str, Any]
    weights_sha256: str
    ledger_sha256: str | None = None
    """none: an earlier version wrote it"""
    cpus: list[str] = Field([])
    attempts: int
    steps_repeated: int
    stopped: str


class TrialEnd(Document):
    how: str
    objective: float | None
    epoch: int | None = None
    params: dict[str, Any] = Field({})


def read_result(directory: Path) -> dict[str, Any]:
    """Return the content of result.json of the run in `directory`; DataError if it is damaged."""
    content: dict[str, Any] = read_json(directory / FILE, RunResult, "remove it; then raylab resume writes it again")
    return content


def read_end(directory: Path) -> dict[str, Any]:
    """Return the content of end.json of the trial in `directory`; DataError if it is damaged."""
    content: dict[str, Any] = read_json(directory / END, TrialEnd, "remove it; then raylab resume runs the trial again")
    return content
