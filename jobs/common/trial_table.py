"""The progress display of a search: a table that updates in place on a terminal, a line per trial in a file."""

import sys
from collections.abc import Mapping
from typing import Any

from jobs.common import console
from jobs.common.console import say
from raylab.errors import escape_unprintable

ROWS = 12  # finished trials shown, best first; all running trials are shown
UP = "\x1b[{}A\x1b[J"  # moves the cursor up, and clears all below


def row(number: int, trial: Mapping[str, Any], objective: str) -> str:
    """The line of one trial: `trial   7  stopped   val/auroc 0.8123 after 4 epochs  optim.lr=0.00123`."""
    score = trial.get("objective")
    params = "  ".join(
        f"{p}={v:.3g}" if isinstance(v, float) else f"{p}={v}" for p, v in (trial.get("params") or {}).items()
    )
    shown = trial.get("error", "") if score is None else f"{objective} {score:.4f} after {trial['epoch']} epochs"
    return f"  trial {number:3d}  {trial['how']:8}  {shown}  {params}"


def order(item: tuple[int, Mapping[str, Any]]) -> tuple[bool, float]:
    """The sort key of a trial: best objective first, trials without one last."""
    score = item[1].get("objective")
    return (score is None, -(score or 0.0))


class TrialTable:
    """Trials by number: {"how", "objective", "epoch", "params"}; `how` is "running" until the trial ends."""

    def __init__(self, planned: int, objective: str, quiet: bool) -> None:
        self.planned, self.objective, self.quiet = planned, objective, quiet
        self.moves = not quiet and (console.stream or sys.stdout).isatty()
        self.trials: dict[int, dict[str, Any]] = {}
        self.lines_shown = 0

    def update(self, number: int, **facts: Any) -> None:
        """Record `facts` of a trial and show them: immediately on a terminal, otherwise when the trial has ended."""
        trial = self.trials.setdefault(number, {"how": "running", "objective": None, "epoch": 0})
        trial.update(facts)
        if self.moves:
            self._draw()
        elif not self.quiet and trial["how"] != "running":
            say(row(number, trial, self.objective))

    def lines(self) -> list[str]:
        """The lines of the table: running trials first, then the best finished ones."""
        running = [(n, t) for n, t in sorted(self.trials.items()) if t["how"] == "running"]
        ended = sorted(((n, t) for n, t in self.trials.items() if t["how"] != "running"), key=order)
        head = f"  {len(ended)} of {self.planned} trials ended, {len(running)} running"
        return [head, *(row(n, t, self.objective) for n, t in (*running, *ended[:ROWS]))]

    def _draw(self) -> None:
        lines = self.lines()
        # lines are truncated, because a wrapped line would move the cursor back too little
        text = "\n".join(escape_unprintable(line)[:118] for line in lines)
        say(text, start=UP.format(self.lines_shown) if self.lines_shown else "")
        self.lines_shown = len(lines)
