"""raylab compare: print tracked runs as a table, or the differences between some of them, and write an HTML report."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, get_args

from jobs import cli
from jobs.common import console, home, outputs, predictions, run_tracking
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.predictions import KeptPredictions
from jobs.common.results import Comparison, RunReference, find_run
from raylab.errors import DataError, UsageError, unknown
from raylab.tasks import TASKS, find_task
from raylab.tasks.outcomes import PairedRows
from raylab.training.run_record import RunRecord
from tracking import report
from tracking.compare import Differences, Highlights, collect, render_differences, table, to_json_rows

EXAMPLE = "raylab compare --out report.html"
Split = Literal["test", "val"]
BOOTSTRAPS = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "compare these runs only, each with the first, by paired differences on the same rows"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    text = "split of the paired differences (default: test); an evaluation on other data has its own"
    parser.add_argument("--split", choices=get_args(Split), default="test", help=text)
    parser.add_argument(
        "--experiment",
        metavar="E",
        help="the MLflow experiment (default: that of the runs, else MLFLOW_EXPERIMENT_NAME or raylab)",
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="file of the report (default: HOME/report.html)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    return compare(*args.runs, experiment=args.experiment, out=args.out, split=args.split, quiet=args.quiet).details


@verb_environment()
def compare(
    *runs: RunReference,
    experiment: str | None = None,
    out: Path | str | None = None,
    split: Split = "test",
    quiet: bool = False,
) -> Comparison:
    """Print the tracked runs of an MLflow experiment as a table and write a self-contained HTML report.

    `runs`: only these, with the scores of each minus those of the first on the same rows of `split`, and 95% intervals
    over shared resamples of patients. No row is read for this: `evaluate` has kept the predictions of the test split,
    training those of val. An evaluation on other data is a run, too. `experiment` defaults to that of the first run,
    else to MLFLOW_EXPERIMENT_NAME or "raylab", `out` to HOME/report.html.

    Raises DataError if `out` is a file of another kind, or if the runs were not scored on the same rows; UsageError if
    the experiment has no runs; and TrackingError if the experiment does not exist or no server answers.
    """
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    path = home.home() / "report.html" if out is None else Path(out)
    outputs.check(path, "--out", "report")
    directories = [find_run(run) for run in runs]
    differences = compare_pairs(directories, split)
    uri = run_tracking.checked_address()
    records = [home.note(directory) for directory in directories]
    experiment = experiment or (records[0].experiment if records else run_tracking.experiment_name())
    highlights = {name: Highlights(task.primary, task.secondary) for name, task in TASKS.items()}
    only = {record.run_id or "" for record in records} or None
    frame = collect(uri, experiment, highlights, only)
    if frame.is_empty() and not runs:
        raise UsageError(f"experiment '{experiment}' has no runs yet", do="raylab train TASK --data DIR")
    if frame.is_empty():
        names = ", ".join(directory.name for directory in directories)
        raise UsageError(
            f"experiment '{experiment}' has none of the runs {names}", do="--experiment E: that of the runs"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path = Path(report.report(uri, experiment, path, frame, differences)).absolute()
    if not quiet:
        say(table(frame, console.count_columns()))
        if differences:
            say("\n" + render_differences(differences))
        say(f"report: {path}")
    return Comparison(experiment, path, to_json_rows(frame), differences)


def compare_pairs(directories: list[Path], split: str) -> list[Differences]:
    """The differences of each run from the first; none without runs. Raises UsageError for a single run or one that is
    named twice, and DataError unless all were scored on the same rows."""
    if not directories:
        return []
    if len(directories) == 1 or len(set(directories)) < len(directories):
        names = " ".join(directory.name for directory in directories)
        raise UsageError(f"these are not two runs or more: {names}", do="raylab compare RUN RUN, or without runs")
    first, *others = directories
    record = home.note(first)
    kept = read_predictions(first, record, split)
    outcome = find_task(record.task).outcome
    found = []
    for other in others:
        own_record = home.note(other)
        own = read_predictions(other, own_record, split)
        check_same_rows((first.name, record, kept), (other.name, own_record, own))
        rows = PairedRows(kept.y, own.p, kept.p, kept.group, kept.classes, kept.unit)
        scores = outcome.differences(rows, BOOTSTRAPS)
        shown = own_split(record, split)
        size = len(kept.y), kept.patients, kept.unit
        found.append(Differences(other.name, first.name, shown, *size, BOOTSTRAPS, scores))
    return found


def own_split(record: RunRecord, split: str) -> str:
    """The split that an evaluation on other data has scored; `split` of any other run."""
    return record.tags["raylab.split"] if record.kind == "evaluate" else split


def read_predictions(directory: Path, record: RunRecord, split: str) -> KeptPredictions:
    """The predictions of a run on its own split, or of an evaluation on other data."""
    split, run = own_split(record, split), record.parent if record.kind == "evaluate" else directory.name
    again = f"raylab evaluate {record.task} --run {run} --data {shlex.quote(record.data)} --split {split}"
    return predictions.read(directory, split, record.data_hash or "", again)


Scored = tuple[str, RunRecord, KeptPredictions]


def check_same_rows(first: Scored, other: Scored) -> None:
    """Raise DataError unless both runs, with their names, were scored on the same rows."""
    (name, record, kept), (other_name, other_record, other_kept) = first, other
    if record.task != other_record.task:
        raise DataError(
            f"{name} is of task '{record.task}', {other_name} of '{other_record.task}'",
            "paired differences need the same rows and outcomes",
            "compare runs of one task",
        )
    if not kept.is_of_rows(other_kept):
        rows = [
            f"{who}: {len(of.y)} rows of {of.patients} {of.unit}s, {what.data} (split {(what.split_hash or '?')[:8]})"
            for who, what, of in (first, other)
        ]
        raise DataError(
            f"the splits of {name} and {other_name} differ",
            "; ".join(rows),
            "train or evaluate both on the same data, or compare their own intervals: raylab compare",
        )


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
