"""Sweeps: writes many virtual patients to a directory of parquet files, chunk by chunk.

DIRECTORY/sweep.json         the recipe, from the start
DIRECTORY/rows/00000.parquet a chunk: row, status, inputs, outputs (see `compute`)
DIRECTORY/meta.json          at the end (data/sweeps.py): it is then a prepared directory like the others

A chunk is a function of the recipe and its number alone, and is written whole or not at all: so the files are the same
whatever the number of workers and however often the sweep was killed, on CPUs of one kind with the same versions.
"""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from pydantic import Field, ValidationError

from raylab.config.recipe import Part
from raylab.documents import read_json
from raylab.errors import DataError, RunError, UsageError, unknown
from raylab.files import atomic_write, is_empty, keep_out_of_git_and_uploads, write_json
from raylab.physiology import designs
from raylab.physiology.parameters import LIVING, QUANTITIES, impossible, inputs
from raylab.physiology.steady import OUTPUTS, STATUS, steady_state

REFUSED = 3
STATUSES = STATUS | {REFUSED: "inconsistent inputs, such as a breath below the dead space"}
BYTES_A_ROW = 9 + 4 * (len(QUANTITIES) + len(OUTPUTS))  # uncompressed; measured files are smaller
RECIPES: dict[str, dict[str, str]] = {
    "living": {name: f"uniform({low:g},{high:g})" for name, (low, high) in LIVING.items()},
    "patient": {},
}
"""What varies: everything over the ranges of ventilated patients, or only what --set names."""


class Sweep(Part):
    """A sweep's recipe. `inputs` {name: distribution or number}; other inputs have their usual values."""

    inputs: dict[str, str]
    design: Literal["sobol", "lhs", "grid"] = "sobol"
    size: int = Field(16384, ge=1)  # rows; for a grid, levels of each input
    seed: int = Field(0, ge=0, lt=2**31)
    chunk: int = Field(16384, ge=1)
    compiled: bool = False  # see `exchange.solve`; a part of the recipe, because the last bits differ

    def rows(self) -> int:
        varied = [n for n, text in self.inputs.items() if designs.distribution(n, text)[0] != "fixed"]
        return designs.count(self.design, self.size, len(varied))

    def chunks(self) -> int:
        return -(-self.rows() // self.chunk)


def recipe(name: str, changes: dict[str, str], **options: Any) -> Sweep:
    """The named recipe with `changes` {input: distribution}; checked; errors list the right names."""
    if name not in RECIPES:
        raise unknown("sweep", name, RECIPES)
    try:
        made = Sweep(inputs=RECIPES[name] | changes, **options)
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False))
        raise UsageError(f"invalid sweep: {what}") from error
    for key, text in made.inputs.items():
        if key not in QUANTITIES:
            raise unknown("lung model input", key, QUANTITIES)
        low, high = designs.bounds(*designs.distribution(key, text))
        quantity = QUANTITIES[key]
        if low < quantity.low or high > quantity.high:
            raise DataError(
                f"{key}={text} exceeds the range of the lung model",
                f"{quantity.low:g} to {quantity.high:g} {quantity.unit}".rstrip(),
                "narrow it",
            )
    made.rows()
    return made


def begin(made: Sweep, directory: Path) -> dict[Path, Any]:
    """Create `directory` for the sweep, or continue in it; {path: argument} of all its chunks, for `write_chunk`.

    Raises DataError when the disk has too little room, or when the directory holds something else.
    """
    note = directory / "sweep.json"
    wanted = made.model_dump(mode="json")
    if note.is_file():
        if Sweep.model_validate(read_json(note, Sweep, "choose another --out")) != made:
            raise DataError(
                f"{directory} contains another sweep", f"see {note}", "use the same options, or another --out"
            )
    elif not is_empty(directory):
        raise DataError(
            f"{directory} is not empty and contains no sweep", do="choose a new or empty directory for --out"
        )
    else:
        near = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        free, need = shutil.disk_usage(near).free, made.rows() * BYTES_A_ROW
        if need > free:
            raise DataError(
                f"a sweep of {made.rows():,} rows does not fit on the disk of {directory}",
                f"it may take {need / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free",
                "lower --size, or give --out another disk",
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(note, wanted)
    (directory / "rows").mkdir(exist_ok=True)
    keep_out_of_git_and_uploads(directory)
    return {directory / "rows" / f"{i:05d}.parquet": (wanted, i) for i in range(made.chunks())}


def write_chunk(argument: tuple[dict[str, Any], int], path: Path) -> None:
    """Compute chunk `number` of the recipe and write it; the work of one Ray task."""
    recipe, number = argument
    torch.set_num_threads(1)  # more threads split arrays differently, which changes the rounding
    made = Sweep.model_validate(recipe)
    compiler = os.environ.get("CXX", "g++")
    if made.compiled and shutil.which(compiler) is None:
        raise RunError(
            "the sweep cannot be compiled",
            f"{compiler} was not found on {os.uname().nodename}",
            "load a C++ compiler on every node, or start a sweep without --compiled",
        )
    table = compute(made, number)
    with atomic_write(path) as beside:
        table.write_parquet(beside)


def compute(made: Sweep, number: int) -> pl.DataFrame:
    """Rows of a chunk: row int64, status int8 (STATUSES), and inputs and outputs as float32.

    Inputs are rounded to float32 before they are used, so that a row can be computed again from itself. Outputs are
    null where status is not 0.
    """
    start, stop = number * made.chunk, min((number + 1) * made.chunk, made.rows())
    n = stop - start
    drawn = designs.points(made.inputs, made.design, made.size, made.seed, start, stop)
    rounded = {name: np.float32(value) for name, value in drawn.items()}
    # rounding must not move a value beyond a bound of its range
    inside = {k: np.clip(np.float64(v), QUANTITIES[k].low, QUANTITIES[k].high) for k, v in rounded.items()}
    given = inputs(inside, rows=n)
    refused = torch.zeros(n, dtype=torch.bool)
    for rows in impossible(given).values():
        refused |= rows
    with torch.no_grad():
        found = steady_state(given.take(~refused), made.compiled)
    status = np.full(n, REFUSED, dtype=np.int8)
    status[~refused.numpy()] = found.status.numpy()
    columns: dict[str, Any] = {
        "row": np.arange(start, stop, dtype=np.int64),
        "status": status,
    }
    for name in QUANTITIES:
        columns[name] = getattr(given, name).numpy().astype(np.float32)
    for name, value in found.values.items():
        wide = np.full(n, np.nan, dtype=np.float32)
        wide[~refused.numpy()] = value.numpy()
        columns[name] = wide
    return pl.DataFrame(columns).with_columns(pl.col(list(OUTPUTS)).fill_nan(None))
