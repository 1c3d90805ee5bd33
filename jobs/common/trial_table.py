"""The progress display of a search: on a terminal a table of all trials, a line per trial in a file."""

import itertools
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jobs.common import console
from jobs.common.console import say
from jobs.common.duration import duration
from raylab.errors import escape_unprintable

if TYPE_CHECKING:  # it is loaded where there is a terminal
    from rich.console import RenderableType

UNFINISHED = ("waiting", "running")
Entry = tuple[int, dict[str, Any]]
"""A trial with its number."""
ROWS = 12  # finished trials that `lines` shows, best first; all running trials are shown


def row(number: int, trial: Mapping[str, Any], objective: str) -> str:
    """The line of one trial: `trial   7  stopped   val/auroc 0.8123 after 4 epochs  optim.lr=0.00123`."""
    score = trial.get("objective")
    shown = trial.get("error", "") if score is None else f"{objective} {score:.4f} after {trial['epoch']} epochs"
    return f"  trial {number:3d}  {trial['how']:8}  {shown}  {'  '.join(pairs(trial))}"


def pairs(trial: Mapping[str, Any]) -> list[str]:
    """`optim.lr=0.00123` of every parameter."""
    return [f"{path}={text(value)}" for path, value in trial["params"].items()]


def text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def order(item: tuple[int, Mapping[str, Any]]) -> tuple[bool, float]:
    """The sort key of a trial: best objective first, trials without one last."""
    score = item[1].get("objective")
    return (score is None, -(score or 0.0))


def shorten(paths: list[str]) -> dict[str, str]:
    """{path of a parameter: its name, with as much of the path as distinguishes it from the others}."""
    names = [path.rpartition(".")[2] for path in paths]
    return {path: name if names.count(name) == 1 else path for path, name in zip(paths, names, strict=True)}


def fold(params: Mapping[str, Any], names: Mapping[str, str], columns: int) -> list[str]:
    """The parameters of a trial, in lines of so many columns."""
    words = "  ".join(f"{names[path]}={text(value)}" for path, value in params.items())
    return textwrap.wrap(words, columns, break_on_hyphens=False) or [""]


def take_fitting(cells: list[list[str]], height: int) -> list[list[str]]:
    """The first trials whose cells fit into so many lines; only the last cell may have several."""
    heights = itertools.accumulate(1 + line[-1].count("\n") for line in cells)
    return [line for line, used in zip(cells, heights, strict=True) if used <= height]


class TrialTable:
    """Trials by number: {"how", "objective", "epoch", "params"}; `how` is "waiting" until the trial begins, and
    "running" until it ends. The others of the `planned` trials wait without `params`, whose paths are known."""

    def __init__(self, planned: int, objective: str, quiet: bool, params: Sequence[str] = ()) -> None:
        self.planned, self.objective, self.quiet, self.params = planned, objective, quiet, params
        self.start = time.monotonic()
        self.trials: dict[int, dict[str, Any]] = {}
        self.began: dict[int, float] = {}  # when a trial began to run, on the monotonic clock
        self.seconds: dict[int, float] = {}  # that a trial which has ended has run

    def update(self, number: int, **facts: Any) -> None:
        """Record `facts` of a trial, and print a line when it has ended; where there is a screen, only if it failed."""
        trial = self.trials.get(number, {"how": "running", "objective": None, "epoch": 0, "params": {}}) | facts
        now = time.monotonic()
        if trial["how"] == "running":
            self.began.setdefault(number, now)
        elif number in self.began:
            self.seconds[number] = self.seconds.get(number, 0.0) + now - self.began.pop(number)
        self.trials = {**self.trials, number: trial}  # a screen may be drawing the ones before
        is_on_screen = console.screen is not None
        if not self.quiet and trial["how"] not in UNFINISHED and (not is_on_screen or trial.get("error")):
            say(row(number, trial, self.objective))

    def ordered(self) -> tuple[list[Entry], list[Entry], list[Entry]]:
        """Running trials; those that have ended, best first; those that wait."""
        trials = sorted(self.trials.items())
        first, left = max(self.trials, default=-1) + 1, self.planned - len(trials)
        trials += [(number, {"how": "waiting", "epoch": 0, "params": {}}) for number in range(first, first + left)]
        running, waiting = ([(n, t) for n, t in trials if t["how"] == how] for how in ("running", "waiting"))
        return running, sorted(((n, t) for n, t in trials if t["how"] not in UNFINISHED), key=order), waiting

    def lines(self) -> list[str]:
        """The lines of the table: running trials first, then the best finished ones."""
        running, ended, _ = self.ordered()
        head = f"  {len(ended)} of {self.planned} trials ended, {len(running)} running"
        return [head, *(row(n, t, self.objective) for n, t in (*running, *ended[:ROWS]))]

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the table on the screen, if there is one, while the context is open; at its end all of it stays."""
        if console.screen is None:
            yield
            return
        try:
            with console.screen.show(self.draw):
                yield
        finally:
            if self.trials:
                console.screen.print(self.draw(console.screen.console.width, None))

    def draw(self, columns: int, rows: int | None) -> "RenderableType":
        """The table for so many columns and rows of a terminal, below a line of totals.

        Running trials come first, then those that have ended, best first, then those that wait; the last only for a
        number of rows, as they go on changing. Where it is too narrow for a column per parameter, each trial's are in
        lines below each other.
        """
        from rich.console import Group, RenderableType
        from rich.table import Table
        from rich.text import Text

        running, ended, waiting = self.ordered()
        shown = [*running, *ended, *(waiting if rows is not None else ())]
        heads, cells = self._arrange(shown, columns)
        found = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        height = max(head.count("\n") for head in heads)
        for head in heads:
            is_text = head in ("status", "parameters")
            above = "\n" * (height - head.count("\n"))
            found.add_column(Text(above + head), justify="left" if is_text else "right", no_wrap=True)
        fitting = cells if rows is None else take_fitting(cells, rows - 4 - height)
        for line in fitting:
            found.add_row(*(Text(escape_unprintable(cell)) for cell in line))
        lines: list[RenderableType] = [Text(escape_unprintable(self._describe(len(running), ended))), found]
        if left := len(cells) - len(fitting):
            lines.append(Text(f"and {left} more"))
        return Group(*lines)

    def _arrange(self, shown: list[tuple[int, dict[str, Any]]], columns: int) -> tuple[list[str], list[list[str]]]:
        """(the heads of the columns, the cells of each trial), no wider than so many columns if possible."""
        paths = [*self.params, *(path for _, trial in shown for path in trial["params"])]
        names = shorten(list(dict.fromkeys(paths)))
        facts = ["trial", "status", "epoch", "time", self.objective]
        heads = [*facts, *(name.replace("_", "_\n") for name in names.values())]
        cells = [self._facts(*one) + [text(one[1]["params"].get(path, "")) for path in names] for one in shown]
        widths = [max(map(len, "\n".join(column).split("\n"))) for column in zip(heads, *cells, strict=True)]
        if sum(widths) + 2 * (len(widths) - 1) <= columns:
            return heads, cells
        left = max(20, columns - sum(widths[: len(facts)]) - 2 * len(facts))
        folded = [[*self._facts(*one), "\n".join(fold(one[1]["params"], names, left))] for one in shown]
        return [*facts, "parameters"], folded

    def _facts(self, number: int, trial: Mapping[str, Any]) -> list[str]:
        seconds = self.seconds.get(number)
        if number in self.began:
            seconds = (seconds or 0.0) + time.monotonic() - self.began[number]
        score = trial.get("objective")
        return [
            str(number),
            "done" if trial["how"] == "planned" else trial["how"],
            str(trial["epoch"] or ""),
            "" if seconds is None else duration(seconds),
            "" if score is None else f"{score:.4f}",
        ]

    def _describe(self, running: int, ended: list[tuple[int, dict[str, Any]]]) -> str:
        passed = duration(time.monotonic() - self.start)
        line = f"{len(ended)} of {self.planned} trials ended, {running} running, {passed}"
        if ended and ended[0][1].get("objective") is not None:
            line += f"; best: trial {ended[0][0]}, {ended[0][1]['objective']:.4f}"
        if not running and not ended and console.screen is not None:
            line += f"; {console.screen.status.text}"
        return line
