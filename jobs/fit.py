"""raylab fit: fit the lung model to every ventilated stay and time window of a source, with posterior widths."""

import argparse
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import polars as pl

from jobs import cli
from jobs.common import home, outputs, run_tracking
from jobs.common.console import say
from jobs.common.session import ray_session
from raylab.data.icu.patient_batch import screen, with_text_ids
from raylab.data.icu.prepare import SOURCES, Raw
from raylab.data.lung import fits, gases
from raylab.errors import DataError, UsageError, unknown
from raylab.files import atomic_write, is_empty, write_json
from tracking.outbox import Outbox, append_new_metrics

EXAMPLE = "raylab fit --source synthetic --patients 100 --out fits/synthetic"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help=f"one of: {', '.join(SOURCES)}")
    parser.add_argument("--path", type=Path, help="directory of the raw data")
    parser.add_argument("--patients", type=int, default=400, help="number of synthetic patients (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of synthetic patients (default: 0)")
    parser.add_argument("--hours", type=float, default=48, help="use gases before this hour of the stay (default: 48)")
    parser.add_argument("--window", type=float, default=fits.WINDOW_h,
                        help=f"hours that share one set of parameters (default: {fits.WINDOW_h:g})")  # fmt: skip
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory on shared storage; the same command continues interrupted fits",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="CPUs of a local Ray; 0 computes in this "
                        "process; if RAY_ADDRESS is set, its whole cluster is used (default: 0)")  # fmt: skip
    parser.add_argument("--name", help="name of the tracked run (default: made from the time)")


def main(args: argparse.Namespace) -> dict[str, Any]:
    if args.source not in SOURCES:
        raise unknown("source", args.source, SOURCES)
    if args.path is None and args.source != "synthetic":
        raise UsageError(f"source '{args.source}' needs the directory of its raw data", do="add --path DIR")
    out = args.out.absolute()
    if not is_empty(out) and not (out / fits.NOTE).is_file():
        raise DataError(f"{out} is not empty and contains no fits", do="choose a new or empty directory for --out")
    outputs.check_directory(out, "--out")
    home.check_writable()
    table = source_gases(args.source, args.path or Path(), args.patients, args.seed, args.hours, args.window)
    params = {
        "source": args.source,
        "hours": args.hours,
        "window_h": args.window,
        "stays": table["stay_id"].n_unique(),
        "gases": len(table),
    }
    begun = home.find_work("fit", out, args.name) if (out / fits.NOTE).is_file() else None
    directory = begun or home.new_run(args.name, "fit")
    chunks = fits.begin(table, params, out)
    synthetic = args.source == "synthetic"
    with run_tracking.open_work(directory, "fit", "fit", args.seed, synthetic, args.source, out, params):
        if not args.quiet:
            say(f"{len(table):,} gases of {params['stays']:,} ventilated stays{', SYNTHETIC' if synthetic else ''}")
        summary = fit_chunks(chunks, out, directory, args)
        write_json(out / "summary.json", {**params, "synthetic": synthetic, **summary})
        numbers = {f"fit/{name}/median": facts["median"] for name, facts in summary["parameters"].items()}
        outbox = Outbox(directory / "outbox")
        append_new_metrics(outbox, 0, {name: value for name, value in numbers.items() if value is not None})
        outbox.append({"kind": "artifact", "path": str(out / "summary.json"), "to": ""})
    if not args.quiet:
        tell(summary)
        say(f"wrote {out / 'fits.parquet'}: a row per stay and window, readable only by you")
    return {"run_id": home.note(directory).run_id, "name": directory.name, "out": str(out), **params, **summary}


def source_gases(source: str, path: Path, patients: int, seed: int, hours: float, window_h: float) -> pl.DataFrame:
    """The blood gases before `hours` of all stays of a source, with the number of their `window`. DataError if none."""
    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        for events in SOURCES[source](Raw(path, Path(scratch), patients, seed)).parts():
            _, unique = screen(events)
            tables.append(with_text_ids(gases.gases(unique)))
    table = pl.concat(tables).filter(pl.col("time") < hours)
    if table.is_empty():
        raise DataError(
            f"source '{source}' has no arterial blood gas with FiO2 of a ventilated patient before {hours:g} h",
            do="raise --hours, or check the raw data",
        )
    return table.with_columns(window=(pl.col("time") / window_h).floor().cast(pl.Int32))


def fit_chunks(chunks: dict[Path, Any], out: Path, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Fit all chunks, in this process or on Ray; writes fits.parquet in `out` and returns its summary."""
    remote = args.workers > 0 or bool(os.environ.get("RAY_ADDRESS"))

    def progress(done: int, total: int) -> None:
        if done and not args.quiet:
            say(f"{done} of {total} chunks of {fits.STAYS} stays")

    with ray_session(args.workers, directory / "ray.log") if remote else nullcontext():
        from raylab.distributed.map import run_chunks

        run_chunks(fits.write_chunk, chunks, tell=progress)
    every = pl.concat([pl.read_parquet(path) for path in sorted(chunks)])
    residuals = pl.concat([pl.read_parquet(path.with_suffix(".residuals")) for path in sorted(chunks)])
    with atomic_write(out / "fits.parquet") as beside:
        every.write_parquet(beside)
    return fits.summary(every, residuals)


def tell(summary: dict[str, Any]) -> None:
    """Print the summary of fits."""
    say(f"{summary['fits']:,} fits of {summary['stays']:,} stays: {summary['one_reading']:,} to a single gas, "
        f"{summary['without_steady_state']} without a steady state, {summary['not_settled']} not converged; "
        f"median RMS of residuals {summary['rms_median']:.2f} SD")  # fmt: skip
    for name, facts in summary["parameters"].items():
        if facts["identified"]:
            shown = f"median {facts['median']:.3g} (P10 {facts['p10']:.3g}, P90 {facts['p90']:.3g}), "
            shown += f"95% width {facts['median_width']:.3g}"
        else:
            shown = "not identifiable in any patient; showing the prior"
        say(f"  {name:<24} identified in {facts['identified']:,}, not measured in {facts['never_measured']:,}; {shown}")
    for output, facts in summary["residuals"].items():
        say(f"  residuals of {output:<14} n {facts['n']:,}, median {facts['median']:+.2f} SD, "
            f"median absolute {facts['median_abs']:.2f} SD, {facts['within_2_sd']:.0%} within 2 SD")  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.main(["fit", *sys.argv[1:]]))
