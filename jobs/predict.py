"""raylab predict: write the probabilities of every row to a parquet file."""

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from jobs import cli
from jobs.common import gradcam_sheets, home, individuals, outputs, provenance, run_tracking, scores
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.results import Predictions, RunReference
from jobs.evaluate import check_split, run_of_task
from raylab.errors import UsageError
from raylab.files import atomic_write
from raylab.tasks import find_task
from tracking.outbox import Outbox, append_new_metrics

EXAMPLE = "raylab predict ards --run NAME --data prepared/ards --split val --out probabilities.parquet"

Split = Literal["train", "val", "test", "all"]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", help="task of the run")
    parser.add_argument(
        "--run", required=True, metavar="RUN", help="name, MLflow run id or directory of a finished run"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared directory of the task")
    parser.add_argument("--split", choices=get_args(Split), default="all", help="split to predict (default: all)")
    parser.add_argument("--out", type=Path, required=True, metavar="P.parquet", help="output file")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="images: also write Grad-CAM sheets in the run's directory and a column `outside`",
    )
    individuals.add_option(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    return predict(
        args.run,
        args.data,
        args.out,
        task=args.task,
        split=args.split,
        explain=args.explain,
        share_individuals=args.share_individuals,
        quiet=args.quiet,
    ).details


@verb_environment()
def predict(
    run: RunReference,
    data: Path | str,
    out: Path | str,
    *,
    task: str | None = None,
    split: Split = "all",
    explain: bool = False,
    share_individuals: bool = False,
    quiet: bool = False,
) -> Predictions:
    """Write a run's probabilities of every row of a split to the parquet file `out`, readable only by its owner.

    `task`: DataError if the run is of another task. `explain`: for images, also write Grad-CAM sheets and a column
    `outside`, the fraction of each map outside the lung field; `share_individuals` sends sheets of real patients to
    MLflow. Test rows of the run's own data count as a read of its test split. DataError if `out` is a file of another
    kind.
    """
    check_split(split, get_args(Split))
    directory, data, out = run_of_task(run, task), Path(data).absolute(), Path(out)
    task = home.note(directory).task
    outputs.check(out, "--out", "predictions")
    if explain and find_task(task).kind != "images":
        raise UsageError("--explain requires a task on chest X-rays", f"'{task}' is not one")
    run_record = home.note(directory)
    reads_test = find_task(task).read_meta(data).data_hash == run_record.data_hash and split in {"test", "all"}
    if reads_test or explain:
        home.check_writable(directory)
    job, recipe, samples, network = scores.load(directory, data, split)
    if out.suffix != ".parquet":
        raise UsageError(
            f"--out {out} does not end in .parquet",
            "it is a parquet file of patient data, and git and Ray ignore files with this ending",
            f"--out {out.with_suffix('.parquet')}",
        )
    p = scores.probabilities(job, recipe, samples, network)
    label, columns = job.outcome.truth_columns(samples), job.outcome.prediction_columns(samples.spec, p)
    if explain:
        columns["outside"] = gradcam_sheets.shares(network, samples, p)
    frame = pl.DataFrame({"id": samples.ids, "source": samples.source, **label, **columns})
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as beside:  # it identifies patients, so only its owner can read it
        frame.write_parquet(beside)
    if reads_test:
        reads = run_record.test_reads + 1  # the file holds test rows
        home.annotate(directory, test_reads=reads)
        Outbox(directory / "outbox").append({"kind": "tags", "values": {"raylab.test_reads": str(reads)}})
        run_tracking.forward_now(directory)
    details: dict[str, Any] = {
        "run": directory.name,
        "out": str(out.absolute()),
        "rows": len(frame),
        "columns": frame.columns,
    }
    if explain:
        details |= write_sheets(directory, split, share_individuals, samples, network, p, columns["outside"])
    if not quiet:
        say(f"wrote {len(frame)} rows to {out}")
        if explain:
            outside = details["outside"]
            say(
                "Grad-CAM: all maps are empty, because the output does not depend on the input"
                if outside is None
                else f"Grad-CAM: {outside:.0%} of the maps is outside the lung field (43% for a uniform map)"
            )
            if details["private"]:
                individuals.tell(details["private"])
            else:
                say("\n".join(f"  {path}" for path in details["sheets"]))
    return Predictions(out.absolute(), len(frame), tuple(frame.columns), details)


def write_sheets(
    directory: Path, split: str, share: bool, samples: Any, network: Any, p: np.ndarray, outside: np.ndarray
) -> dict[str, Any]:
    """Write Grad-CAM sheets in the run's directory; they show single patients, so they go to its MLflow run only if the
    data is synthetic or `share` is set. Returns {"sheets", "private": sheets that stay local, "outside": mean over
    rows, None if all maps are empty}."""
    synthetic = samples.meta.synthetic
    private = not (synthetic or share)
    folder = individuals.folder(directory) if private else directory / "plots"
    origin = provenance.describe(directory)
    written = gradcam_sheets.sheets(network, samples, p, folder / f"gradcam-{split}", synthetic, origin)
    mean = None if np.isnan(outside).all() else float(np.nanmean(outside))
    outbox = Outbox(directory / "outbox")
    for path in written:
        if private:
            path.chmod(0o600)
        else:
            outbox.append({"kind": "artifact", "path": str(path), "to": f"plots/gradcam-{split}"})
    step = home.note(directory).best_step
    if mean is not None:
        append_new_metrics(outbox, step, {f"{split}/gradcam_outside": mean})
    run_tracking.forward_now(directory)
    sheets = [str(path) for path in written]
    return {"sheets": sheets, "private": sheets if private else [], "outside": mean}


if __name__ == "__main__":
    sys.exit(cli.main(["predict", *sys.argv[1:]]))
