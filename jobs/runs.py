"""raylab runs: list the runs of this home with their status, their score, and the command that comes next."""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jobs import cli
from jobs.common import console, home
from jobs.common.console import say
from jobs.common.disk_use import measure, show_bytes
from raylab.documents import Document, parse_document, read_document
from raylab.errors import DataError
from raylab.score import Score
from raylab.tasks import TASKS
from raylab.training.ledger import FILE as LEDGER
from raylab.training.ledger import read_ledger, steps
from raylab.training.run_record import RESUMABLE, RunRecord

log = logging.getLogger(__name__)

EXAMPLE = "raylab runs"


class Scores(Document):
    """The file of a run's scores on a split (jobs/common/scores.py), with more fields: the scores by their names."""

    primary: tuple[str, ...] = ()
    """names of the task's first scores; files of earlier versions have none"""


class Row(NamedTuple):
    """A run in the list."""

    run: str
    verb: str
    task: str
    status: str
    steps: int | None
    score: str
    """the first score of its task on val, with its interval"""
    bytes: int
    changed: float
    """Unix time at which its record was last changed"""
    next: str
    """the command that comes next, or what to do before it; empty if there is none"""
    error: str
    """why it failed; empty if it did not"""
    run_id: str | None
    """of its run in MLflow"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=TASKS, metavar="TASK", help=f"only runs of this task: {', '.join(TASKS)}")


def main(args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for directory, record in home.records():
        if args.task in (None, record.task):
            try:
                rows.append(describe(directory, record))
            except DataError as error:
                log.warning("skipped: %s", error)
    rows.sort(key=lambda row: row.changed)
    if not args.quiet:
        tell(rows, args.task)
    return {"runs": [row._asdict() for row in rows]}


def describe(directory: Path, record: RunRecord) -> Row:
    return Row(
        run=directory.name,
        verb=record.kind,
        task=record.task,
        status=record.status or "",
        steps=record.steps if record.steps is not None else last_step(directory),
        score=read_score(directory, record),
        bytes=measure(directory).bytes,
        changed=home.changed_at(directory),
        next=describe_next(directory.name, record),
        error=(record.error or "") if record.status == "FAILED" else "",
        run_id=record.run_id,
    )


def last_step(directory: Path) -> int | None:
    """The last step that the run has taken; None for work without steps."""
    return max(steps(read_ledger(directory / LEDGER)), default=None)


def read_score(directory: Path, record: RunRecord) -> str:
    """`auroc 0.812 [0.760, 0.861]`: the first of the task's scores on the run's own val rows; empty before its end.

    The file of the scores names it. An older one does not; then an own task has none without its plugin.
    """
    path = directory / "scores" / f"val-{(record.data_hash or '')[:12]}.json"
    if not path.is_file():
        return ""
    try:
        scores = read_document(path, Scores)
        primary = scores.primary or (TASKS[record.task].primary if record.task in TASKS else ())
        if not primary:
            return ""
        name = primary[0]
        score = parse_document((scores.model_extra or {}).get(name), Score, path)
    except DataError as error:
        return error.what
    if score.value is not None and score.low is None:
        return f"{name} {score.value:.3f} (no interval)"
    return f"{name} {score}"


def describe_next(name: str, record: RunRecord) -> str:
    """What comes next for a run. One that failed would fail again: its error says what to do, or it is shown by
    `resume`."""
    if record.kind not in RESUMABLE:
        return ""
    if record.status == "KILLED":
        return f"raylab resume {name}"
    if record.status == "FAILED":
        return record.do or f"correct the cause, then: raylab resume {name}"
    if record.status == "FINISHED" and not record.test_reads:
        return f"raylab evaluate {record.task} --run {name} --data {shlex.quote(record.data)}"
    return ""


def render_table(rows: list[Row], columns: int | None = None) -> list[str]:
    """The lines of the list; where a terminal of so many columns is too narrow for it, scores are below their runs."""
    table = [("run", "verb", "task", "status", "steps", "changed", "size", "score on val")]
    table += [
        (
            row.run,
            row.verb,
            row.task,
            row.status,
            "" if row.steps is None else f"{row.steps:,}",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row.changed)),
            show_bytes(row.bytes),
            row.score,
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    is_narrow = columns is not None and sum(widths) + 2 * (len(widths) - 1) > columns
    lines = []
    for number, cells in enumerate(table):
        shown = cells[:-1] if is_narrow else cells
        lines.append("  ".join(f"{cell:{width}}" for cell, width in zip(shown, widths, strict=False)).rstrip())
        if is_narrow and number and cells[-1]:
            lines.append(f"    {cells[-1]}")
        if number:
            more = {"failed": rows[number - 1].error, "next": rows[number - 1].next}
            lines += [f"    {name}: {text}" for name, text in more.items() if text]
    return lines


def tell(rows: list[Row], task: str | None) -> None:
    if not rows:
        say(f"no runs{' of this task' if task else ''} yet: raylab train {task or 'TASK'} --data DIR")
        return
    say("\n".join(render_table(rows, console.count_columns())))


if __name__ == "__main__":
    sys.exit(cli.main(["runs", *sys.argv[1:]]))
