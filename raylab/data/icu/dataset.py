"""Inputs of networks from intensive-care data, and the loader of prepared directories: one float32 array in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from raylab.data.icu.cohorts import COHORTS
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.prepare import FRACTIONS
from raylab.data.prepared import read_meta
from raylab.errors import DataError, unknown

KIND = "icu-hourly"


FILLS = ("mask", "forward", "mean")


class IcuInputs:
    """Inputs of an intensive-care task: x float32 [B, T, 3F + S], the T hours before the prediction, with F series and
    S static features:

    [0, F)        last measured value, carried forward, standardised; 0 (the train mean) before the first, and from an
                  unusable record until the next usable one
    [F, 2F)       1 if measured in that hour, 0 if carried forward or unknown
    [2F, 3F)      hours since the measurement / T, at most 1; 1 if no value is known
    [3F, 3F + S)  static values, standardised, the same in every hour; 0 if not recorded before the prediction

    `rows` has stay_id and at_h (hours) of each prediction. Hours are stored once per stay, [stays, hours, C]; a batch
    slices its windows from them, with the static values that were known at each prediction.
    """

    def __init__(self, x: NDArray[np.float32], rows: pl.DataFrame, spec: dict[str, Any]) -> None:
        """Keep x [stays, hours, C], with the stays and the static values of their first row in `rows`."""
        self.x = torch.from_numpy(x)
        first = rows.select("stay_id").unique(maintain_order=True).with_row_index("stay")
        self.stay = torch.from_numpy(rows.join(first, "stay_id", "left")["stay"].cast(pl.Int64).to_numpy(writable=True))
        self.end = torch.from_numpy(rows["at_h"].cast(pl.Int64).to_numpy(writable=True))
        self.rows, self.spec = rows, spec
        self.window = torch.arange(spec["hours"]) - spec["hours"]
        self.static = torch.from_numpy(standardise_static(rows, spec)[0])

    def __len__(self) -> int:
        return self.rows.height

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> torch.Tensor:
        """Return x of the rows in `index`. Time series are not augmented, so `augment` is ignored."""
        at = torch.as_tensor(index, dtype=torch.int64)
        if self.x.shape[1] == len(self.window):
            return self.x[self.stay[at]]
        x = self.x[self.stay[at, None], self.end[at, None] + self.window]
        x[..., 3 * len(self.spec["features"]) :] = self.static[at, None]
        return x


class IcuSamples(IcuInputs):
    """Samples of an intensive-care task.

    `absent` lists features of the spec that this directory never measured; `meta` is its meta.json; `rows` are its
    rows of samples.parquet.
    """

    augmentation = 0

    def __init__(
        self, x: NDArray[np.float32], rows: pl.DataFrame, spec: dict[str, Any], meta: IcuMeta, absent: list[str]
    ) -> None:
        super().__init__(x, rows, spec)
        self.y = rows["label"].cast(pl.Int64).to_numpy()
        self.group = rows["group"].cast(pl.Int64).to_numpy()
        self.source = np.array(rows["source"].to_list(), dtype=str)
        self.ids = np.array(rows["stay_id"].to_list(), dtype=str)
        self.meta, self.absent = meta, absent

    def subset(self, inside: NDArray[np.bool_]) -> "IcuSamples":
        """Return the samples of the rows where `inside` is true, in the same order."""
        stays = self.stay[torch.from_numpy(inside)].numpy()
        first = np.unique(stays, return_index=True)[1]
        x = self.x[torch.from_numpy(stays[np.sort(first)])].numpy()
        return IcuSamples(x, self.rows.filter(pl.Series(inside)), self.spec, self.meta, self.absent)


def load_icu(
    directory: Path,
    split: str,
    cohort: str = "all",
    spec: dict[str, Any] | None = None,
    fill: str = "mask",
    virtual: bool = False,
    task: str | None = None,
) -> IcuSamples:
    """Load one split (train, val, test, or "all" for every row) of a directory written by `prepare_icu`.

    With `spec` (of a trained model) the inputs use that model's features, statistics and hours instead of this
    directory's. `fill` determines the input for a value that was not measured in an hour: "mask", the last value with
    its mask and age; "forward", only the last value; "mean", only the train mean. `virtual`: a new spec also has the
    features of the virtual patients, as static features. Raises DataError if the landmarks differ or no row remains.
    """
    directory = Path(directory)
    meta = read_meta(directory, task, IcuMeta)
    if split not in (*FRACTIONS, "all"):
        raise unknown("split", split, (*FRACTIONS, "all"))
    if cohort not in COHORTS:
        raise unknown("cohort", cohort, COHORTS)
    if fill not in FILLS:
        raise unknown("fill", fill, FILLS)
    spec = own_spec(meta, virtual, directory) if spec is None else spec
    check_spec(spec, meta, directory)

    rows = pl.read_parquet(directory / "samples.parquet").with_columns(group=pl.col("subject_id").rank("dense") - 1)
    if split != "all":
        rows = rows.filter(pl.col("split") == split)
    if cohort != "all":
        rows = rows.filter(pl.col(cohort))
    if rows.is_empty():
        raise DataError(
            f"{directory} has no row in split '{split}', cohort '{cohort}'",
            f"counts: {meta.counts}, cohorts: {meta.cohorts}",
            "choose another split or cohort, or prepare more data",
        )
    x, absent = build_inputs(rows, pl.read_parquet(directory / "hours.parquet"), spec, fill)
    return IcuSamples(x, rows, spec, meta, absent)


def build_inputs(
    rows: pl.DataFrame, table: pl.DataFrame, spec: dict[str, Any], fill: str
) -> tuple[NDArray[np.float32], list[str]]:
    """Return x [stays, hours, C] of the stays of `rows`, as IcuInputs keeps it, and the absent features. `table` is the
    hourly grid of these stays, in any order, and possibly of others."""
    stays = rows.unique("stay_id", keep="first", maintain_order=True).with_columns(place=pl.int_range(pl.len()))
    table = stays.select(row="place", stay_id="stay_id").join(table, "stay_id").sort("row", "hour")
    x, absent = tensorise(stays, table, spec)
    apply_fill(x, len(spec["features"]), fill)
    return x, absent


def apply_fill(x: NDArray[np.float32], features: int, fill: str) -> None:
    """Remove from x [..., 3F + S], in place, the information that `fill` excludes."""
    if fill == "mean":
        x[..., :features] *= x[..., features : 2 * features]
    if fill != "mask":
        x[..., features : 3 * features] = 0


def own_spec(meta: IcuMeta, virtual: bool, directory: Path) -> dict[str, Any]:
    """Return the spec of a model trained on this directory."""
    features, static, stats = meta.features, meta.static, meta.statistics
    if virtual:
        if not meta.virtual_patient:
            raise DataError(
                f"{directory} has no features of virtual patients",
                "data.virtual_patient=true needs them",
                f"raylab prepare {meta.task} ... --virtual-patient --out {directory}",
            )
        static = [*static, *meta.virtual_patient]
    return {
        "kind": KIND,
        "classes": meta.classes,
        "label": meta.label,
        "framing": meta.framing,
        "gap_h": meta.gap_h,
        "features": features,
        "static": static,
        "hours": int(meta.landmark_h),
        "landmark_h": meta.landmark_h,
        "horizon_h": meta.horizon_h,
        **({"until_h": meta.until_h} if meta.until_h is not None else {}),
        "mean": [stats[name]["mean"] for name in features],
        "std": [stats[name]["std"] or 1.0 for name in features],
        "static_mean": [stats[name]["mean"] for name in static],
        "static_std": [stats[name]["std"] or 1.0 for name in static],
    }


def check_spec(spec: dict[str, Any], meta: IcuMeta, directory: Path) -> None:
    if spec.get("kind") != KIND:
        raise DataError(
            f"the model expects inputs of kind '{spec.get('kind')}', {directory} holds '{KIND}'",
            do="use a model of a task on intensive-care data",
        )
    if spec["landmark_h"] != meta.landmark_h:
        raise DataError(
            f"{directory} was prepared for landmark {meta.landmark_h:g} h, the model for {spec['landmark_h']:g} h",
            "a model reads exactly the hours before its landmark",
            f"prepare the data with --landmark {spec['landmark_h']:g}",
        )


def tensorise(rows: pl.DataFrame, table: pl.DataFrame, spec: dict[str, Any]) -> tuple[NDArray[np.float32], list[str]]:
    """Return x [N, H, 3F + S] and the absent features. `table` has exactly H rows for each of the N `rows`, in the same
    order; times since a measurement are divided by the spec's hours T."""
    features, hours = spec["features"], spec["hours"]
    n, f = rows.height, len(features)
    x = np.zeros((n, table.height // n, 3 * f + len(spec["static"])), dtype=np.float32)
    x[:, :, 2 * f : 3 * f] = 1.0
    absent = []
    for i, name in enumerate(features):
        if name not in table.columns:
            absent.append(name)
            continue
        value = pl.col(name).cast(pl.Float64).forward_fill().over("row")
        since = pl.col(f"{name}__since")  # null: an unusable record has ended the carry
        wide = table.select(
            value=pl.when(since.is_not_null()).then((value - spec["mean"][i]) / spec["std"][i]).fill_null(0),
            mask=pl.col(f"{name}__mask"),
            since=(since / hours).clip(0, 1).fill_null(1),
        )
        for k, column in enumerate(("value", "mask", "since")):
            x[:, :, k * f + i] = wide[column].to_numpy().reshape(n, -1)
    values, unrecorded = standardise_static(rows, spec)
    x[:, :, 3 * f :] = values[:, None]
    return x, absent + unrecorded


def standardise_static(rows: pl.DataFrame, spec: dict[str, Any]) -> tuple[NDArray[np.float32], list[str]]:
    """Return the static values [N, S] of `rows`, standardised, and the absent ones; a missing value is 0."""
    values = np.zeros((rows.height, len(spec["static"])), dtype=np.float32)
    absent = []
    for i, name in enumerate(spec["static"]):
        if name not in rows.columns:
            absent.append(name)
            continue
        value = (rows[name].cast(pl.Float64) - spec["static_mean"][i]) / spec["static_std"][i]
        values[:, i] = value.fill_null(0).to_numpy()
    return values, absent
