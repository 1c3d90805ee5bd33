"""A finished sweep of the lung model as data: its meta, its splits, and samples for the surrogate.

Rows are virtual and each is a patient of its own: splits are of rows, so a test row has parameters that no network saw.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import raylab
from raylab.data import prepared
from raylab.errors import DataError
from raylab.files import write_json
from raylab.physiology.sweep import STATUSES, Sweep

KIND = "lung-parameters"
FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def finish(made: Sweep, directory: Path) -> dict[str, Any]:
    """Write and return meta.json of a sweep whose chunks are all there; it is then data of the task `surrogate`."""
    paths = sorted((directory / "rows").glob("[0-9]*.parquet"))
    if len(paths) != made.chunks():
        raise DataError(f"{directory} has {len(paths)} of {made.chunks()} chunks", do="run the same command again")
    files = {f"rows/{path.name}": prepared.sha256(path) for path in paths}
    files["sweep.json"] = prepared.sha256(directory / "sweep.json")
    digest = hashlib.sha256("\n".join(f"{name}\t{files[name]}" for name in sorted(files)).encode()).hexdigest()
    status = pl.scan_parquet(directory / "rows" / "*.parquet").select("status").collect()["status"]
    split = splits(made.seed, made.rows())
    by_status = {int(s): int(n) for s, n in status.value_counts().sort("status").rows()}
    meta = {
        "format": prepared.FORMAT,
        "task": "surrogate",
        "source": "lung model sweep",
        "synthetic": True,
        "raylab": raylab.__version__,
        "sweep": made.model_dump(mode="json"),
        "rows": made.rows(),
        "status": {STATUSES[s]: n for s, n in by_status.items()},
        "attrition": [
            {"step": "all rows", "rows": made.rows()},
            {"step": "a steady state was found", "rows": by_status.get(0, 0)},
        ],
        "counts": {name: {"n": int(((split == name) & (status == 0)).sum())} for name in FRACTIONS},
        "split_hash": hashlib.sha256("\n".join(split).encode()).hexdigest(),
        "seed": made.seed,
        "files": files,
        "data_hash": digest,
    }
    write_json(directory / "meta.json", meta)
    return meta


def splits(seed: int, rows: int) -> pl.Series:
    """train, val or test of every row, drawn from the sweep's seed."""
    unit = np.random.default_rng([seed, 3]).random(rows)
    edges = np.cumsum(list(FRACTIONS.values()))[:-1]
    return pl.Series("split", np.array(list(FRACTIONS))[np.searchsorted(edges, unit, side="right")], dtype=pl.String)
