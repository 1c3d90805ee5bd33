"""Faults at a step and a phase of it, armed in the workers of a Crew: each strikes once, whoever comes there."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BY_WRITER = ("ledger", "after ledger", "checkpoint", "after checkpoint", "result", "after result")
IN_STEP = (
    "boundary",
    "gather",
    "sum",
    "parts of the sum",
    "after parts of the sum",
    "batch norm",
    "optimizer",
    "after optimizer",
    "metrics",
    "validation",
    "after validation",
)
WHILE_FORMING = ("form", "connect", "after connect", "state", "after state", "pids", "after pids")
"""Phases that are reached when a group forms."""
PHASES = (*IN_STEP, *BY_WRITER, *WHILE_FORMING)


@dataclass(frozen=True)
class Fault:
    """`how` strikes in `phase` once `step` steps are done: the worker of rank `rank` (modulo the size of the group),
    the writer in phases of its own, or, without a rank, whoever comes first."""

    how: signal.Signals
    phase: str
    step: int = 0
    rank: int | None = None


def arm(faults: Sequence[Fault], gates: Sequence[int], folder: Path) -> None:
    """Patch this worker so that `faults` strike, and that the writer waits before the step after each of `gates`.

    In `folder`, the file fault-N has the process that fault N has struck, at-N says that the writer waits at gate N,
    and go-N that it need not; "change" in it, that it goes on when it knows that the group changes, and each of the
    processes whose ids follow when it knows that it must leave.
    """
    from raylab.distributed.member import Member
    from raylab.training import checkpoint, loop
    from raylab.training import run as runs
    from raylab.training.adamw import AdamW
    from raylab.training.batchnorm import ShardStatistics
    from raylab.training.deferred_metrics import DeferredMetrics
    from raylab.training.process_group import ProcessGroup

    step, rank, size = 0, 0, 1

    def strike(phase: str) -> None:
        for number, fault in enumerate(faults):
            is_it = fault.rank is None or phase in BY_WRITER or fault.rank % size == rank
            if fault.phase == phase and fault.step <= step and is_it:
                try:
                    handle = os.open(folder / f"fault-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    continue
                os.write(handle, str(os.getpid()).encode())
                os.close(handle)
                os.kill(os.getpid(), fault.how)

    def surround(owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)

        def patched(*values: Any, **named: Any) -> Any:
            strike(phase)
            outcome = original(*values, **named)
            strike(f"after {phase}")
            return outcome

        setattr(owner, name, patched)

    train_step: Callable[[Any], None] = loop.Training.train_step
    form_group = Member.form_group

    def told_to_leave(number: int) -> list[str]:
        go = folder / f"go-{number}"
        return go.read_text().split()[1:] if go.exists() else []

    def at_step(self: Any) -> None:
        nonlocal step
        step = self.progress.step
        for number, gate in enumerate(gates):
            if gate <= step and self.group.rank == 0 and not (folder / f"go-{number}").exists():
                (folder / f"at-{number}").touch()
                while not (folder / f"go-{number}").exists():
                    time.sleep(0.005)
                while (folder / f"go-{number}").read_text().startswith("change") and not (
                    self.peers.must_regroup() or self.group.is_broken()
                ):
                    time.sleep(0.005)
            if gate <= step and str(os.getpid()) in told_to_leave(number):
                while not (self.peers.is_leaving() or self.group.is_broken()):
                    time.sleep(0.005)
        train_step(self)

    def note_rank(self: Any, position: int) -> Any:
        nonlocal rank, size
        group, leader = form_group(self, position)
        rank, size = group.rank, group.size
        return group, leader

    loop.Training.train_step = at_step  # type: ignore[method-assign]
    Member.form_group = note_rank  # type: ignore[method-assign]
    surround(Member, "form_group", "form")
    surround(Member, "_connect", "connect")
    surround(loop.Training, "take_state", "state")
    surround(runs.Recorder, "start_group", "pids")
    surround(ProcessGroup, "start_add_up", "boundary")
    surround(ProcessGroup, "start_gather", "gather")
    surround(ProcessGroup, "all_to_all", "sum")
    surround(ProcessGroup, "all_gather", "parts of the sum")
    surround(ShardStatistics, "fold", "batch norm")
    surround(AdamW, "step", "optimizer")
    surround(DeferredMetrics, "fetch", "metrics")
    surround(loop, "validate", "validation")
    surround(runs.Recorder, "_note", "ledger")
    surround(checkpoint, "HashingFile", "checkpoint")
    surround(runs, "write_model", "result")
