"""The curve of a run, or of every trial of a search, while it runs: in a notebook a picture and a table that are
replaced, elsewhere lines. It is read from the run's own records, so no server is asked."""

import io
from pathlib import Path
from typing import Any

from jobs.common import home, provenance
from jobs.common.console import say
from jobs.common.trial_table import TrialTable
from raylab.tasks import find_task
from raylab.training.run_record import FILE
from raylab.training.trials import Trials
from tracking import outbox, plots
from tracking.provenance import save_png

Curve = tuple[list[float], list[float]]


def read_curve(directory: Path, metric: str) -> Curve:
    """The steps and values of `metric` in the records of the run in `directory`; of a repeated step the last value."""
    points: dict[float, float] = {}
    for _, record in outbox.read(directory / "outbox"):
        if record is not None and record["kind"] == "metrics" and metric in record["values"]:
            points[record["step"]] = record["values"][metric]
    return list(points), list(points.values())


class LiveCurve:
    """Shows the run in `directory`, which need not exist yet, whenever `show` is called and something has changed."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.directory = name, directory
        self.shown: Any = None
        self.handles: list[Any] = []

    def show(self, status: str) -> None:
        """Show the run, which is `status` ("running")."""
        if not (self.directory / FILE).is_file():
            self._show(f"{self.name}: {status}", {}, "", False)
            return
        record = home.note(self.directory)
        metric = f"val/{find_task(record.task).objective}"
        if record.kind == "tune":
            trials = Trials(self.directory / "trials", 0)
            found = {f"trial {number}": read_curve(trials.path(number), metric) for number in trials.params}
            lines = describe_trials(trials, metric, {number: found[f"trial {number}"] for number in trials.params})
        else:
            found, lines = {self.name: read_curve(self.directory, metric)}, []
        curves = {label: curve for label, curve in found.items() if curve[0]}
        text = "\n".join([f"{self.name}: {status}", *lines])
        self._show(text, curves, metric, record.synthetic)

    def _show(self, text: str, curves: dict[str, Curve], metric: str, synthetic: bool) -> None:
        if (text, curves) == self.shown:
            return
        self.shown = (text, curves)
        if not in_notebook():
            say(text)
            return
        from IPython.display import Image, display

        shown: list[Any] = [Text(text)]
        if curves:
            picture = io.BytesIO()
            figure = plots.learning(curves, metric, self.name, synthetic)
            save_png(figure, picture, [provenance.describe(self.directory)], dpi=100)
            shown.append(Image(data=picture.getvalue(), alt=f"{metric} over steps"))
        for number, thing in enumerate(shown):
            if number < len(self.handles):
                self.handles[number].update(thing)
            else:
                self.handles.append(display(thing, display_id=True))


class Text:
    """Text that a notebook shows as it is, in one typeface."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def describe_trials(trials: Trials, metric: str, curves: dict[int, Curve]) -> list[str]:
    """A line for each trial, those that run first, then the best."""
    table = TrialTable(len(trials.params), metric, quiet=True)
    for number, params in trials.params.items():
        values = curves[number][1]
        facts = {"objective": max(values, default=None), "epoch": len(values), "params": params}
        table.update(number, **facts | {key: value for key, value in trials.ended.get(number, {}).items()})
    return table.lines()


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
