"""raylab compare: the table of tracked runs, and a self-contained HTML report with plots."""

import argparse
import sys
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.common import home, outputs, run_tracking
from jobs.common.progress import say
from raylab.errors import UsageError
from raylab.tasks import TASKS
from tracking import compare, report

EXAMPLE = "raylab compare --out report.html"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", metavar="E", help="the MLflow experiment; raylab's own otherwise")
    parser.add_argument("--out", type=Path, metavar="HTML", help="HOME/report.html otherwise")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.out is not None:
        outputs.check(args.out, "--out", "report")
    uri = run_tracking.checked_address()
    experiment = args.experiment or run_tracking.experiment_name()
    highlights = {name: compare.Highlights(task.primary, task.secondary) for name, task in TASKS.items()}
    frame = compare.collect(uri, experiment, highlights)
    if frame.is_empty():
        raise UsageError(f"experiment '{experiment}' has no runs yet", do="raylab train TASK --data DIR")
    path = report.report(uri, experiment, args.out or home.home() / "report.html", frame)
    if not args.quiet:
        say(compare.table(frame))
        say(f"report: {path}")
    return {"experiment": experiment, "report": str(Path(path).absolute()), "runs": compare.to_json_rows(frame)}


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
