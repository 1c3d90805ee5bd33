"""raylab predict: probabilities of every row, as parquet."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from jobs import cli
from jobs.common import gradcam_sheets, home, individuals, outputs, run_tracking, scores
from jobs.common.progress import say
from jobs.evaluate import checked
from raylab.data.prepared import read_meta
from raylab.errors import UsageError
from raylab.tasks import find_task
from tracking.outbox import Outbox

EXAMPLE = "raylab predict ards --run NAME --data prepared/ards --split val --out probabilities.parquet"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task")
    parser.add_argument("--run", required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", choices=["train", "val", "test", "all"], default="all")
    parser.add_argument("--out", type=Path, required=True, metavar="P.parquet")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="of images: Grad-CAM sheets in the run's directory, and a column `outside`",
    )
    individuals.add_option(parser)


def main(args: argparse.Namespace) -> dict[str, Any]:
    directory, data = checked(args)
    outputs.check(args.out, "--out", "predictions")
    if args.explain and find_task(args.task).kind != "images":
        raise UsageError("--explain shows where a network looks in images", f"'{args.task}' has none")
    job, recipe, samples, network = scores.load(directory, data, args.split)
    if args.out.suffix != ".parquet":
        raise UsageError(
            f"--out {args.out} does not end in .parquet",
            "it will be a parquet file, and by that name git and Ray leave it out",
            f"--out {args.out.with_suffix('.parquet')}",
        )
    p = scores.probabilities(job, recipe, samples, network)
    label, columns = job.outcome.columns(samples, p)
    if args.explain:
        columns["outside"] = gradcam_sheets.shares(network, samples, p)
    frame = pl.DataFrame({"id": samples.ids, "source": samples.source, **label, **columns})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    with os.fdopen(os.open(work, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        frame.write_parquet(file)  # it names patients' rows: for its owner alone
    work.replace(args.out)
    described = home.note(directory)
    if read_meta(data, args.task).data_hash == described.data_hash and args.split in {"test", "all"}:
        reads = described.test_reads + 1  # the file holds test rows
        home.annotate(directory, test_reads=reads)
        Outbox(directory / "outbox").append({"kind": "tags", "values": {"raylab.test_reads": str(reads)}})
        run_tracking.forward_now(directory)
    out: dict[str, Any] = {
        "run": directory.name,
        "out": str(args.out.absolute()),
        "rows": len(frame),
        "columns": frame.columns,
    }
    if args.explain:
        out |= explained(directory, args, samples, network, p, columns["outside"])
    if not args.quiet:
        say(f"wrote {len(frame)} rows to {args.out}")
        if args.explain:
            outside = out["outside"]
            say(
                "Grad-CAM: no map shows anything: the network answers the same everywhere"
                if outside is None
                else f"Grad-CAM: {outside:.0%} of the maps lies outside the lung field (43 % of an even one would)"
            )
            if out["private"]:
                individuals.tell(out["private"])
            else:
                say("\n".join(f"  {path}" for path in out["sheets"]))
    return out


def explained(
    directory: Path, args: argparse.Namespace, samples: Any, network: Any, p: np.ndarray, outside: np.ndarray
) -> dict[str, Any]:
    """Sheets into the run's directory; they show single patients, so they go to its MLflow run only when synthetic or
    shared. {"sheets", "private": those that stay, "outside": mean over rows, None where all maps are empty}."""
    synthetic = samples.meta.synthetic
    private = not (synthetic or args.share_individuals)
    folder = individuals.folder(directory) if private else directory / "plots"
    written = gradcam_sheets.sheets(network, samples, p, folder / f"gradcam-{args.split}", synthetic)
    mean = None if np.isnan(outside).all() else float(np.nanmean(outside))
    outbox = Outbox(directory / "outbox")
    for path in written:
        if private:
            path.chmod(0o600)
        else:
            outbox.append({"kind": "artifact", "path": str(path), "to": f"plots/gradcam-{args.split}"})
    step = home.note(directory).best_step
    if mean is not None:
        scores.append_new_metrics(outbox, step, {f"{args.split}/gradcam_outside": mean})
    run_tracking.forward_now(directory)
    sheets = [str(path) for path in written]
    return {"sheets": sheets, "private": sheets if private else [], "outside": mean}


if __name__ == "__main__":
    sys.exit(cli.main(["predict", *sys.argv[1:]]))
