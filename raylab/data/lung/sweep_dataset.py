"""A finished sweep of the lung model as data: its meta, its splits, and samples for the surrogate.

Rows are virtual and each is a patient of its own: splits are of rows, so a test row has parameters that no network saw.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

import raylab
from raylab.data import prepared
from raylab.data.lung.meta import SweepMeta
from raylab.errors import DataError, unknown
from raylab.files import atomic_write, write_json
from raylab.physiology import designs
from raylab.physiology.parameters import QUANTITIES
from raylab.physiology.steady import OUTPUTS
from raylab.physiology.sweep import STATUSES, Sweep

KIND = "lung-parameters"
POINTS = "points.parquet"
FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


def finish(made: Sweep, directory: Path, task: str) -> SweepMeta:
    """Write and return meta.json of a complete sweep, which makes it data of `task`."""
    paths = sorted((directory / "rows").glob("[0-9]*.parquet"))
    if len(paths) != made.chunks():
        raise DataError(f"{directory} has {len(paths)} of {made.chunks()} chunks", do="run the same command again")
    files = {f"rows/{path.name}": prepared.sha256(path) for path in paths}
    files["sweep.json"] = prepared.sha256(directory / "sweep.json")
    digest = hashlib.sha256("\n".join(f"{name}\t{files[name]}" for name in sorted(files)).encode()).hexdigest()
    split = splits(made.seed, made.rows())
    status, named = write_points(directory, split)
    files[POINTS] = prepared.sha256(directory / POINTS)  # not in the hash, because it follows from the rows
    by_status = {int(s): int(n) for s, n in status.value_counts().sort("status").rows()}
    meta = SweepMeta(
        format=prepared.FORMAT,
        task=task,
        source="lung model sweep",
        synthetic=True,
        raylab=raylab.__version__,
        sweep=made.model_dump(mode="json"),
        rows=made.rows(),
        status={STATUSES[s]: n for s, n in by_status.items()},
        attrition=[
            {"step": "all rows", "rows": made.rows()},
            {"step": "a steady state was found", "rows": by_status.get(0, 0)},
        ],
        counts={name: {"n": int(((split == name) & (status == 0)).sum())} for name in FRACTIONS},
        split_hash=hashlib.sha256("\n".join(split).encode()).hexdigest(),
        seed=made.seed,
        patient_ids=named,
        numbering=["lung model"],  # a point is its inputs: the same one in every sweep
        files=files,
        data_hash=digest,
    )
    write_json(directory / prepared.META, meta.to_json())
    return meta


def write_points(directory: Path, split: pl.Series) -> tuple[pl.Series, prepared.PatientIds]:
    """The status of every row, and what meta.json says of points.parquet, which is written here for the leakage check:
    `split` and `point` of the rows with a steady state.

    Rows are not patients, but two sweeps may share points of their designs, for example with the same seed. `point` is
    the first 8 bytes of the SHA-256 of the row's inputs (float32), so it is comparable between sweeps.
    """
    rows = pl.scan_parquet(directory / "rows" / "*.parquet").select("row", "status", *QUANTITIES).collect().sort("row")
    ok = rows["status"] == 0
    inputs = np.ascontiguousarray(rows.filter(ok).select(list(QUANTITIES)).to_numpy().astype(np.float32))
    points = [int.from_bytes(hashlib.sha256(row.tobytes()).digest()[:8], "little", signed=True) for row in inputs]
    with atomic_write(directory / POINTS) as beside:
        pl.DataFrame({"split": split.filter(ok), "point": pl.Series(points, dtype=pl.Int64)}).write_parquet(beside)
    return rows["status"], prepared.PatientIds(table=POINTS, column="point", unit="point of the design")


def splits(seed: int, rows: int) -> pl.Series:
    """train, val or test of every row, drawn from the sweep's seed."""
    unit = np.random.default_rng([seed, 3]).random(rows)
    edges = np.cumsum(list(FRACTIONS.values()))[:-1]
    return pl.Series("split", np.array(list(FRACTIONS))[np.searchsorted(edges, unit, side="right")], dtype=pl.String)


LOGARITHMIC = ("pao2_mmHg", "paco2_mmHg", "pvo2_mmHg", "pf_mmHg", "etco2_mmHg", "plateau_cmH2O", "driving_cmH2O",
               "peak_cmH2O", "mean_airway_cmH2O", "power_J_per_min")  # fmt: skip
"""Outputs that a surrogate learns as logarithms, because they vary by more than a factor of ten."""


@dataclass
class SweepSamples:
    """Rows of a sweep with a steady state (`data.samples.Samples`).

    x float32 [N, inputs] and y float32 [N, outputs] are standardised by the training rows of the model's own sweep;
    outputs of LOGARITHMIC as logarithms. `outputs` turns y back into units. Every row is a group of its own.
    """

    augmentation: ClassVar[int] = 0

    x: NDArray[np.float32]
    y: np.ndarray
    rows: NDArray[np.int64]
    spec: dict[str, Any]
    group: np.ndarray = field(init=False)
    source: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.group = self.rows
        self.source = np.full(len(self.rows), "lung model sweep")
        self.ids = self.rows.astype(str)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> Tensor:
        return torch.from_numpy(self.x[index])

    def inputs(self) -> dict[str, NDArray[np.float64]]:
        """The varied inputs in their units."""
        mean, std = np.array(self.spec["mean"]), np.array(self.spec["std"])
        return dict(zip(self.spec["features"], (self.x * std + mean).T, strict=True))


def outputs(y: NDArray[Any], spec: dict[str, Any]) -> NDArray[np.float64]:
    """Standardised outputs [N, outputs] in their units."""
    table: NDArray[np.float64] = np.asarray(y, dtype=np.float64) * np.array(spec["output_std"]) + np.array(
        spec["output_mean"]
    )
    for i, name in enumerate(spec["classes"]):
        if name in LOGARITHMIC:
            table[:, i] = np.exp(table[:, i])
    return table


def load_sweep(
    directory: Path, split: str, spec: dict[str, Any] | None = None, task: str | None = None
) -> SweepSamples:
    """One split (train, val, test, or "all") of a finished sweep, rows with a steady state only.

    With `spec` (of a trained surrogate), raises DataError if a row is outside of the training inputs, or varies an
    input that was constant there: a surrogate is not valid beyond its sweep.
    """
    directory = Path(directory)
    made = Sweep.model_validate(prepared.read_meta(directory, task, SweepMeta).sweep)
    if split not in (*FRACTIONS, "all"):
        raise unknown("split", split, (*FRACTIONS, "all"))
    table = pl.read_parquet(directory / "rows" / "*.parquet").sort("row")
    part = splits(made.seed, made.rows())
    ok = table["status"] == 0
    if spec is None:
        spec = own_spec(table.filter(ok & (part == "train")), made, directory)
    table = table.filter(ok if split == "all" else ok & (part == split))
    if table.is_empty():
        raise DataError(f"{directory} has no row with a steady state in split '{split}'", do="make a larger sweep")
    check_inside(table, spec, directory)
    x = (table.select(spec["features"]).to_numpy() - np.array(spec["mean"])) / np.array(spec["std"])
    y = transformed(table, spec["classes"])
    y = (y - np.array(spec["output_mean"])) / np.array(spec["output_std"])
    return SweepSamples(x.astype(np.float32), y.astype(np.float32), table["row"].to_numpy(), spec)


def transformed(table: pl.DataFrame, names: list[str]) -> NDArray[np.float64]:
    """The outputs as they are learned: those of LOGARITHMIC as logarithms."""
    columns = [table[name].cast(pl.Float64).to_numpy() for name in names]
    each = [np.log(c) if n in LOGARITHMIC else c for n, c in zip(names, columns, strict=True)]
    return np.stack(each, axis=1).astype(np.float64)


def own_spec(train: pl.DataFrame, made: Sweep, directory: Path) -> dict[str, Any]:
    """The spec of a surrogate of this sweep: its inputs with the sweep's ranges and the statistics of `train`, and its
    outputs."""
    varied = [name for name in QUANTITIES if train[name].n_unique() > 1]
    if not varied or train.height < 2:
        raise DataError(
            f"{directory} varies no input", "there is nothing to learn", "vary at least one input in the sweep"
        )
    x = train.select(varied).cast(pl.Float64)
    names = [name for name in OUTPUTS if train[name].n_unique() > 1]
    y = transformed(train, names)
    ranges = [designs.bounds(*designs.distribution(name, made.inputs[name])) for name in varied]
    return {
        "kind": KIND,
        "classes": names,
        "features": varied,
        "fixed": {name: train[name][0] for name in QUANTITIES if name not in varied},
        "low": [low for low, _ in ranges],
        "high": [high for _, high in ranges],
        "mean": [float(v) for v in x.mean().row(0)],
        "std": [float(v) for v in x.std(ddof=0).row(0)],
        "output_mean": y.mean(0).tolist(),
        "output_std": y.std(0).tolist(),
    }


def check_inside(table: pl.DataFrame, spec: dict[str, Any], directory: Path) -> None:
    """Raise DataError if a row of `table` is outside of the ranges of `spec` by more than a thousandth of a range."""
    beyond = []
    for name, low, high in zip(spec["features"], spec["low"], spec["high"], strict=True):
        slack = 1e-3 * (high - low)
        n = int(((table[name] < low - slack) | (table[name] > high + slack)).sum())
        if n:
            beyond.append(f"{name} {low:.4g} to {high:.4g}: {n} of {table.height} rows beyond")
    for name, value in spec["fixed"].items():
        n = int((table[name] != value).sum())
        if n:
            beyond.append(f"{name} {value:.4g} only: {n} of {table.height} rows differ")
    if beyond:
        raise DataError(
            f"{directory} exceeds the training range of the surrogate", "; ".join(beyond), "train one on a wider sweep"
        )
