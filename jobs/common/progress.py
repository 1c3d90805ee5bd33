"""The progress display of a training run: a line that updates on a terminal, a line per epoch in a file."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.common import console
from jobs.common.console import say
from raylab.errors import DataError
from raylab.training import ledger

WAIT_SECONDS = 15.0
HANG_SECONDS = 30.0  # without a step, unless steps take longer: said then, and whenever it has doubled


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def line(row: Mapping[str, float], epochs: int, objective: str, val: float | None, left: float) -> str:
    """`epoch 3/20  step 42  loss 0.412  val auroc 0.803  1,840 samples/s  0:12 left`; the loss is that of the step, or
    of the epoch at its end."""
    loss = row.get("train/epoch_loss", row["train/loss"])
    shown = f"epoch {int(row['epoch']) + 1}/{epochs}  step {int(row['step'])}  loss {loss:.4f}"
    if val is not None:
        shown += f"  val {objective} {val:.3f}"
    return f"{shown}  {row['train/samples_per_s']:,.0f} samples/s  {duration(left)} left"


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
        self.thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> "Display":
        if not self.quiet:
            self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.done.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _follow(self) -> None:
        terminal = (console.stream or sys.stdout).isatty()
        began, first, reported = time.monotonic(), None, False
        last = False
        while not last:
            last = self.done.wait(0.5)
            self._tell_groups()
            if self.silence is not None and not last and (text := self.silence.describe(time.monotonic())):
                say(("\n" if terminal else "") + text)
            if self.waiting is not None and not reported and first is None and time.monotonic() - began > WAIT_SECONDS:
                if text := self.waiting():
                    say(text)
                reported = True
            records = [r for r in self.outbox.new() if r.get("kind") == "metrics" and "train/loss" in r["values"]]
            rows = [{**r["values"], "step": r["step"]} for r in records]
            for row in rows:
                if first is None:
                    first = (time.monotonic(), row["step"])
                self.val = row.get(f"val/{self.objective}", self.val)
                pace = (time.monotonic() - first[0]) / max(1, row["step"] - first[1])
                shown = line(row, self.epochs, self.objective, self.val, pace * (self.planned - row["step"]))
                if f"val/{self.objective}" in row and not terminal:
                    say(shown)
            if rows and terminal:
                say(f"{shown:<100}", start="\r", end="")
        if terminal and first is not None:
            say()

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
            say(describe_group(entry, self.group, max(0.0, entry.time - self.stepped_at)))
            self.group = entry
            for name in entry.damaged if isinstance(entry, ledger.Start) else ():
                say(f"checkpoint {name} is corrupt (its checksum does not match); using the previous one")
