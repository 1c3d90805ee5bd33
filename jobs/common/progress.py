"""The progress display of a training run: a line per epoch, and on a terminal a bar below them."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common import console
from jobs.common.console import say
from jobs.common.duration import duration
from raylab.errors import DataError
from raylab.training import ledger
from tracking.outbox import read

if TYPE_CHECKING:  # it is loaded where there is a terminal
    from rich.console import RenderableType

WAIT_SECONDS = 15.0
HANG_SECONDS = 30.0  # without a step, unless steps take longer: said then, and whenever it has doubled


def line(row: Mapping[str, float], epochs: int, objective: str, val: float | None, left: float) -> str:
    """`epoch 3/20  step 42  loss 0.412  val auroc 0.803  1,840 samples/s  0:12 left`; the loss is that of the step, or
    of the epoch at its end."""
    loss = row.get("train/epoch_loss", row["train/loss"])
    shown = f"epoch {int(row['epoch']) + 1}/{epochs}  step {int(row['step'])}  loss {loss:.4f}"
    if val is not None:
        shown += f"  val {objective} {val:.3f}"
    return f"{shown}  {row['train/samples_per_s']:,.0f} samples/s  {duration(left)} left"


def epoch_header(objective: str) -> str:
    return f"{'epoch':>9}  {'train loss':>10}  {'val loss':>10}  {f'val {objective}':>12}  {'elapsed':>8}"


def epoch_line(row: Mapping[str, float], epochs: int, objective: str, seconds: float) -> str:
    """The line of an epoch, from its last step's row, below `epoch_header`: the mean loss of its samples, its
    validation scores, the time since training began, and whether it is the best so far."""
    number, val = f"{int(row['epoch']) + 1}/{epochs}", row.get(f"val/{objective}")
    scores = f"{row['train/epoch_loss']:10.4f}  {row['val/loss']:10.4f}  {'-' if val is None else f'{val:.4f}':>12}"
    best = "  best so far" if "best/val/loss" in row else ""
    return f"{number:>9}  {scores}  {duration(seconds):>8}{best}"


def describe_best(epoch: float, val: float | None, loss: float, objective: str) -> str:
    """`epoch 3, val auroc 0.8031`, of an epoch counted from 0; with its loss if the objective is undefined."""
    score = f"val loss {loss:.4f}" if val is None else f"val {objective} {val:.4f}"
    return f"epoch {int(epoch) + 1}, {score}"


class Bar:
    """A view of the screen: how far a run is, and its best epoch."""

    def __init__(self, epochs: int, planned: int, objective: str) -> None:
        self.epochs, self.planned, self.objective = epochs, planned, objective
        self.status = "waiting for the first step"
        self.row: Mapping[str, float] = {}  # of the last step
        self.losses: list[float] = []  # of the epoch's steps so far
        self.best = ""
        self.first: tuple[float, float] | None = None  # when the steps began, and after which step
        self.stepped_at = 0.0

    def start(self, step: int, now: float) -> None:
        """Note that the steps after `step` begin."""
        self.first = (now, step)

    def add(self, row: Mapping[str, float], now: float) -> None:
        """Note the row of a step; rows come in bundles."""
        if self.row and row["epoch"] != self.row["epoch"]:
            self.losses = []
        self.losses.append(row["train/loss"])
        self.row, self.stepped_at = row, now
        self.note_best(row)

    def note_best(self, row: Mapping[str, float]) -> None:
        if "best/val/loss" in row and "epoch" in row:
            val = row.get(f"best/val/{self.objective}")
            self.best = describe_best(row["epoch"], val, row["best/val/loss"], self.objective)

    def seconds_left(self, now: float) -> float | None:
        """The time that the steps to come will take at the pace so far; None before the first step."""
        if self.first is None or not self.row or self.stepped_at <= self.first[0] or self.row["step"] <= self.first[1]:
            return None
        pace = (self.stepped_at - self.first[0]) / (self.row["step"] - self.first[1])
        return max(0.0, pace * (self.planned - self.row["step"]) - (now - self.stepped_at))

    def __call__(self, columns: int, rows: int) -> "RenderableType":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self.row:
            return Text(self.status)
        left = self.seconds_left(time.monotonic())
        step = int(self.row["step"])
        facts = [
            f"step {step}/{self.planned}",
            f"mean loss {sum(self.losses) / len(self.losses):.4f}",
            *([f"{self.row['train/samples_per_s']:,.0f} samples/s"] if columns >= 100 else []),
            "" if left is None else f"{duration(left)} left",
        ]
        line = Table.grid(padding=(0, 2, 0, 0), expand=True)
        line.width = columns
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        for _ in facts:
            line.add_column(no_wrap=True)
        bar = ProgressBar(self.planned, min(step, self.planned), style="dim")
        line.add_row(f"epoch {int(self.row['epoch']) + 1}/{self.epochs}", bar, *facts)
        return Group(line, Text(f"kept so far: {self.best}", no_wrap=True)) if self.best else line


def describe_group(entry: ledger.Group, before: ledger.Group | None, seconds: float) -> str:
    """What the new group `entry` means where `before` was the group until now; `seconds` passed between the last step
    and the new group."""
    on = f"{entry.workers} worker{'s' if entry.workers != 1 else ''}"
    if isinstance(entry, ledger.Start):
        where = f" from step {entry.start}" if entry.start else ""
        return f"{'started' if entry.attempt == 0 else 'restarted'}{where} on {on}"
    gone = [pid for pid in before.pids if pid not in entry.pids] if before is not None else []
    if not gone:
        return f"now on {on} from step {entry.regroup}"
    lost = describe_workers([pid for pid in gone if pid not in entry.left], "lost")
    left = describe_workers([pid for pid in gone if pid in entry.left], "left")
    who = " and ".join(filter(None, (lost, left)))
    return f"{who} at step {entry.regroup}; training went on after {seconds:.1f} s on {on}"


def describe_workers(pids: Sequence[int], what: str) -> str:
    """`workers 11, 12 lost`; empty without any."""
    return f"worker{'s' if len(pids) > 1 else ''} {', '.join(map(str, pids))} {what}" if pids else ""


class Silence:
    """Notices that a run takes no steps. Times are in seconds on one clock."""

    def __init__(self, now: float) -> None:
        self.stepped_at = now
        self.longest = 0.0  # between two looks that saw a step
        self.limit = HANG_SECONDS

    def step(self, now: float) -> None:
        self.longest = max(self.longest, now - self.stepped_at)
        self.stepped_at, self.limit = now, max(HANG_SECONDS, 3 * self.longest)

    def describe(self, now: float) -> str:
        """`no step for 40 s`, once per doubling; else an empty string."""
        seconds = now - self.stepped_at
        if seconds < self.limit:
            return ""
        self.limit = 2 * seconds
        return f"no step for {seconds:.0f} s"


class Tail:
    """Reads the lines appended to a JSONL file after this object was created."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        lines = []
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError):  # truncated by a crash, or empty
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict)]


def rows_of(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, float]]:
    """The rows of steps among an outbox's records."""
    for record in records:
        if record.get("kind") == "metrics" and "train/loss" in record["values"]:
            yield {**record["values"], "step": record["step"]}


class Display:
    """Follows a run's outbox and ledger in a thread and prints progress; prints nothing if `quiet`."""

    def __init__(
        self,
        directory: Path,
        epochs: int,
        planned: int,
        objective: str,
        quiet: bool,
        waiting: Callable[[], str] | None = None,
    ) -> None:
        """`waiting` returns a message about what a run that has not started is waiting for, or an empty string."""
        self.directory, self.epochs, self.planned, self.objective = directory, epochs, planned, objective
        self.waiting = waiting
        self.quiet = quiet
        self.done = threading.Event()
        self.outbox = Tail(directory / "outbox" / "outbox.jsonl")
        self.ledger = Tail(directory / ledger.FILE)
        self.group: ledger.Group | None = None
        self.stepped_at = time.time()  # when the last step was seen
        self.silence: Silence | None = None  # from the first step on
        self.val: float | None = None
        self.began = time.monotonic()
        self.first: tuple[float, float] | None = None  # time of the first row, and its step
        self.bar = Bar(min(epochs, planned), planned, objective) if console.screen is not None else None
        if self.bar is not None:
            for row in rows_of(record for _, record in read(directory / "outbox") if record):  # of earlier attempts
                self.bar.note_best(row)
        self.has_header = False
        self.thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self.shown = ExitStack()

    def __enter__(self) -> "Display":
        if not self.quiet:
            if console.screen is not None and self.bar is not None:
                self.shown.enter_context(console.screen.show(self.bar))
            self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        if self.thread.ident is not None:
            self.thread.join()
        self.shown.close()

    def _follow(self) -> None:
        reported, last = False, False
        while not last:
            last = self.done.wait(0.5)
            self._tell_groups()
            if self.silence is not None and not last and (text := self.silence.describe(time.monotonic())):
                say(text)
            is_late = self.first is None and time.monotonic() - self.began > WAIT_SECONDS
            if self.waiting is not None and not reported and is_late:
                if text := self.waiting():
                    say(text)
                reported = True
            for row in rows_of(self.outbox.new()):
                self._tell_row(row, time.monotonic())

    def _tell_row(self, row: Mapping[str, float], now: float) -> None:
        """Show the row of a step; that of an epoch's last step is printed."""
        if self.first is None:
            self.first = (now, row["step"])
        self.val = row.get(f"val/{self.objective}", self.val)
        if self.bar is not None:
            self.bar.add(row, now)
            if "val/loss" in row:
                if not self.has_header:
                    say(epoch_header(self.objective))
                    self.has_header = True
                say(epoch_line(row, self.bar.epochs, self.objective, now - self.began))
        elif f"val/{self.objective}" in row:
            pace = (now - self.first[0]) / max(1, row["step"] - self.first[1])
            say(line(row, self.epochs, self.objective, self.val, pace * (self.planned - row["step"])))

    def _tell_groups(self) -> None:
        """Say how the run's workers have changed."""
        for line in self.ledger.new():
            try:
                entry = ledger.parse_entry(line, self.ledger.path)
            except DataError as error:
                say(str(error))
                continue
            if isinstance(entry, ledger.Step):
                self.stepped_at = time.time()
                self.silence = self.silence or Silence(time.monotonic())
                self.silence.step(time.monotonic())
            if not isinstance(entry, ledger.Group):
                continue
            if self.bar is not None and isinstance(entry, ledger.Start):
                self.bar.start(entry.start, time.monotonic())
            say(describe_group(entry, self.group, max(0.0, entry.time - self.stepped_at)))
            self.group = entry
            for name in entry.damaged if isinstance(entry, ledger.Start) else ():
                say(f"checkpoint {name} is corrupt (its checksum does not match); using the previous one")
