"""raylab compare: print the table of tracked runs and write a self-contained HTML report with plots."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, outputs, run_tracking
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.results import Comparison
from raylab.errors import UsageError
from raylab.tasks import TASKS
from tracking import report
from tracking.compare import Highlights, collect, table, to_json_rows

EXAMPLE = "raylab compare --out report.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experiment", metavar="E", help="the MLflow experiment (default: MLFLOW_EXPERIMENT_NAME or raylab)"
    )
    parser.add_argument("--out", type=Path, metavar="HTML", help="file of the report (default: HOME/report.html)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    return compare(args.experiment, args.out, quiet=args.quiet).details


@verb_environment()
def compare(experiment: str | None = None, out: Path | str | None = None, *, quiet: bool = False) -> Comparison:
    """Print the tracked runs of an MLflow experiment as a table and write a self-contained HTML report.

    `experiment` defaults to MLFLOW_EXPERIMENT_NAME or "raylab", `out` to HOME/report.html. Raises DataError if `out` is
    a file of another kind, UsageError if the experiment has no runs, and TrackingError if the experiment does not exist
    or no server answers.
    """
    path = home.home() / "report.html" if out is None else Path(out)
    outputs.check(path, "--out", "report")
    uri = run_tracking.checked_address()
    experiment = experiment or run_tracking.experiment_name()
    highlights = {name: Highlights(task.primary, task.secondary) for name, task in TASKS.items()}
    frame = collect(uri, experiment, highlights)
    if frame.is_empty():
        raise UsageError(f"experiment '{experiment}' has no runs yet", do="raylab train TASK --data DIR")
    path = Path(report.report(uri, experiment, path, frame)).absolute()
    if not quiet:
        say(table(frame))
        say(f"report: {path}")
    return Comparison(experiment, path, to_json_rows(frame))


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
