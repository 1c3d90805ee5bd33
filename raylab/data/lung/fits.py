"""Fits of the lung model to patients: gases of any source -> one row per stay and window of hours, chunk by chunk.

A patient changes within days, so one set of parameters explains the gases of one window only; window w of a stay holds
the gases of hours [w WINDOW, (w + 1) WINDOW).
Columns: stay_id, window, readings, first_h, last_h, rms, settled, status; for each of PARAMETERS its value, `/low` and
`/high` (95% interval), `/shrink` (posterior over prior SD: 1 is the prior, near 0 is well identified), `/missing` (what
was never measured) and `/identified` (nothing missing, and shrunk to half or less).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from raylab.data.lung import gases
from raylab.documents import read_json
from raylab.errors import DataError
from raylab.files import atomic_write, keep_out_of_git_and_uploads, write_json
from raylab.physiology.fit import FREE, IDENTIFIED, fit

PARAMETERS = tuple(gases.NEEDS)
WINDOW_h = 12.0
STAYS = 200  # stays per chunk
NOTE = "fit.json"  # what the fits in a directory are of


def fit_stays(table: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(fits, residuals) of the stays in `table` (of `gases.gases`); residuals: output, residual (standardised)."""
    table = table.sort("stay_id", "window", "time")
    table = table.with_columns(patient=pl.struct("stay_id", "window").rank("dense").cast(pl.Int64) - 1)
    of_patient = table.with_columns(v=gases.vo2_median(table)).group_by("patient", maintain_order=True)
    described = of_patient.agg(
        pl.col("stay_id", "window", "v").first(), first_h=pl.col("time").min(), last_h=pl.col("time").max()
    )
    given, measured = gases.readings(table)
    vo2 = torch.tensor(described["v"].cast(pl.Float64).fill_null(FREE["vo2_mL_per_min"].median).to_numpy().copy())
    found = fit(given, measured, torch.tensor(table["patient"].to_numpy().copy()), vo2_median_mL_per_min=vo2)
    described = described.drop("v").join(gases.flags(table), "patient", "left", maintain_order="left").drop("patient")
    columns: dict[str, Any] = {
        "rms": found.rms.numpy(),
        "settled": found.settled.numpy(),
        "status": found.status.numpy(),
    }
    for name in PARAMETERS:
        columns[name] = found.value[name].numpy()
        columns[f"{name}/low"], columns[f"{name}/high"] = found.low[name].numpy(), found.high[name].numpy()
        columns[f"{name}/shrink"] = found.shrink[name].numpy()
    fits = described.hstack(pl.DataFrame(columns))
    for name in PARAMETERS:
        missing = pl.col(f"{name}/missing").fill_null("")
        fits = fits.with_columns(
            missing, ((pl.col(f"{name}/shrink") <= IDENTIFIED) & (missing == "")).alias(f"{name}/identified")
        )
    parts = [
        pl.DataFrame({"output": [output] * len(values), "residual": values.numpy()})
        for output, values in found.residual.items()
    ]
    return fits, pl.concat(parts).filter(pl.col("residual").is_finite())


def begin(table: pl.DataFrame, params: Mapping[str, object], directory: Path) -> dict[Path, Any]:
    """Create `directory` for the fits to the gases in `table`, or continue in it; {path: argument} of all its chunks,
    for `write_chunk`. Raises DataError if it has begun with other gases or `params`."""
    wanted = {**params, "gases_sha256": hashlib.sha256(table.sort(table.columns).write_csv().encode()).hexdigest()}
    note = directory / NOTE
    if not note.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(note, wanted)
    elif read_json(note, dict, "choose another --out") != wanted:
        what = f"{directory} contains fits to other gases, or with other options"
        raise DataError(what, f"see {note}", "use the same options and data, or another --out")
    (directory / "parts").mkdir(exist_ok=True)
    keep_out_of_git_and_uploads(directory)
    with atomic_write(directory / "gases.parquet") as beside:
        table.write_parquet(beside)
    ids = table["stay_id"].unique().sort()
    return {
        directory / "parts" / f"{i:04d}.parquet": (str(directory / "gases.parquet"), ids[a : a + STAYS].to_list())
        for i, a in enumerate(range(0, len(ids), STAYS))
    }


def write_chunk(argument: tuple[str, list[str]], path: Path) -> None:
    """Fit the stays of one chunk; the work of one Ray task."""
    readings, ids = argument
    torch.set_num_threads(1)
    fits, residuals = fit_stays(pl.read_parquet(readings).filter(pl.col("stay_id").is_in(ids)))
    with atomic_write(path.with_suffix(".residuals")) as beside:
        residuals.write_parquet(beside)
    with atomic_write(path) as beside:
        fits.write_parquet(beside)


def summary(fits: pl.DataFrame, residuals: pl.DataFrame) -> dict[str, Any]:
    """A summary: counts, medians of identified parameters, residuals of each output."""
    summary: dict[str, Any] = {
        "stays": fits["stay_id"].n_unique(),
        "fits": fits.height,
        "one_reading": int((fits["readings"] == 1).sum()),
        "without_steady_state": int((fits["status"] != 0).sum()),
        "not_settled": int(((fits["status"] == 0) & ~fits["settled"]).sum()),
        "rms_median": fits["rms"].fill_nan(None).median(),
        "parameters": {},
        "residuals": {},
    }
    for name in PARAMETERS:
        known = fits.filter(pl.col(f"{name}/identified"))
        why = fits[f"{name}/missing"].replace("", None).drop_nulls()
        summary["parameters"][name] = {
            "identified": known.height,
            "never_measured": len(why),
            "median": known[name].median(),
            "p10": known[name].quantile(0.1),
            "p90": known[name].quantile(0.9),
            "median_width": (known[f"{name}/high"] - known[f"{name}/low"]).median(),
        }
    for output, rows in residuals.partition_by("output", as_dict=True, maintain_order=True).items():
        values = rows["residual"]
        within = int((values.abs() < 2).sum()) / len(values)
        facts = {
            "n": len(values),
            "median": values.median(),
            "median_abs": values.abs().median(),
            "within_2_sd": within,
        }
        summary["residuals"][str(output[0])] = facts
    return summary
