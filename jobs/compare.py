"""raylab compare: the table of tracked runs, and a self-contained HTML report with plots."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, outputs, run_tracking
from jobs.common.environment import verb_environment
from jobs.common.progress import say
from jobs.common.results import Comparison
from raylab.errors import UsageError
from raylab.tasks import TASKS
from tracking import report
from tracking.compare import Highlights, collect, table, to_json_rows

EXAMPLE = "raylab compare --out report.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", metavar="E", help="the MLflow experiment; raylab's own otherwise")
    parser.add_argument("--out", type=Path, metavar="HTML", help="HOME/report.html otherwise")


def main(args: argparse.Namespace) -> dict[str, Any]:
    return compare(args.experiment, args.out, quiet=args.quiet).details


@verb_environment()
def compare(experiment: str | None = None, out: Path | str | None = None, *, quiet: bool = False) -> Comparison:
    """The tracked runs of an MLflow experiment, printed as a table and written as a self-contained HTML report.

    `experiment`: MLFLOW_EXPERIMENT_NAME, else "raylab". `out`: HOME/report.html otherwise; DataError when it is a file
    of another kind. Raises UsageError when the experiment has no runs, and TrackingError when there is no such
    experiment or no server answers.
    """
    path = home.home() / "report.html" if out is None else Path(out)
    if out is not None:
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
