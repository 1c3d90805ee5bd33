"""Prepared scenes as Samples: float32 [B, bands, S, S] from the pixels on disk, augmented by batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raylab.data.images.scenes.augment import VERSION, augment_scenes
from raylab.data.images.scenes.meta import SceneMeta
from raylab.data.prepared import read_meta
from raylab.data.row_file import RowFile
from raylab.errors import DataError, unknown

SPLITS = ("train", "val", "test")
SAME = ("kind", "classes", "bits", "nodata", "resolution_m")
"""What scenes must have as those have on which a model was trained; and as many pixels."""


class SceneInputs:
    """Pixels [N, C, S, S] of the bands of `spec`, in their order, as inputs of a network."""

    def __init__(self, pixels: NDArray[np.unsignedinteger], spec: dict[str, Any]) -> None:
        self.pixels, self.spec = pixels, spec

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, index: NDArray[Any], augment: tuple[int, int] | None = None) -> Tensor:
        """As that of SceneSamples; new scenes are not augmented."""
        return standardise(self.pixels[index], self.spec)


class SceneRows:
    """Inputs of networks from scenes on disk. `rows` are the rows of the file: the key of augmentation. `bands` are
    those of the file; bands, size and statistics of the inputs come from `spec`."""

    augmentation = VERSION

    def __init__(self, scenes: RowFile, rows: NDArray[np.int64], bands: Sequence[str], spec: dict[str, Any]) -> None:
        self.scenes, self.rows, self.spec = scenes, rows, spec
        self.bands = np.array([list(bands).index(band) for band in spec["bands"]])

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: NDArray[Any], augment: tuple[int, int] | None = None) -> Tensor:
        """x float32 [B, C, S, S] = (value - mean of the band) / its std; pixels without data are 0, the mean."""
        x_BCSS = self.scenes[self.rows[index]][:, self.bands]
        if augment is not None:
            x_BCSS = augment_scenes(x_BCSS, *augment, self.rows[index])
        return standardise(x_BCSS, self.spec)


def standardise(x_BCSS: NDArray[np.unsignedinteger], spec: Mapping[str, Any]) -> Tensor:
    """x float32 [B, C, S, S] of the values of files, with the statistics and in the size of `spec`."""
    values = torch.from_numpy(x_BCSS.astype(np.float32))
    mean, std = (torch.tensor(spec[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
    x = (values - mean) / std
    if spec["nodata"] is not None:
        x = torch.where(values == spec["nodata"], 0.0, x)
    if spec["size"] != x.shape[-1]:
        x = F.interpolate(x, (spec["size"],) * 2, mode="bilinear", antialias=True)
    return x


class SceneSamples(SceneRows):
    """One split of a prepared directory; y is int64 [N], of multi-labels float32 [N, classes] of 0 and 1."""

    def __init__(self, scenes: RowFile, table: pl.DataFrame, meta: SceneMeta, spec: dict[str, Any]) -> None:
        super().__init__(scenes, table["row"].to_numpy().astype(np.int64), meta.bands, spec)
        self.meta = meta
        self.y = labels_of(table, meta)
        self.group = np.unique(table["place"].to_list(), return_inverse=True)[1].astype(np.int64)
        self.source = np.array(table["source"].to_list(), dtype=str)
        self.ids = np.array(table["id"].to_list(), dtype=str)
        self.absent: list[str] = []  # bands that a model needs and this directory lacks: then it is refused


def labels_of(table: pl.DataFrame, meta: SceneMeta) -> NDArray[Any]:
    """y of the rows of an index."""
    if not meta.several_labels:
        return table["labels"].list.first().to_numpy().astype(np.int64)
    y = np.zeros((table.height, len(meta.classes)), dtype=np.float32)
    for row, labels in enumerate(table["labels"].to_list()):
        y[row, labels] = 1
    return y


def load_scenes(
    directory: Path, split: str, task: str, size: int | None = None, spec: Mapping[str, Any] | None = None
) -> SceneSamples:
    """The rows of `split` ("train", "val", "test", or "all").

    `spec`: that of the model that will use the scenes; its statistics, bands and size replace those of the directory.
    Raises DataError if the scenes lack a band, or have other classes, or values or pixels of another kind than those of
    the model, or fewer pixels than are asked for.
    """
    directory = Path(directory)
    if split not in (*SPLITS, "all"):
        raise unknown("split", split, (*SPLITS, "all"))
    meta = read_meta(directory, task, SceneMeta)
    table = pl.read_parquet(directory / "index.parquet")
    if split != "all":
        table = table.filter(pl.col("split") == split)
    if table.is_empty():
        raise DataError(f"{directory} has no {split} split", f"it has {', '.join(meta.counts)}", "prepare it with one")
    return SceneSamples(RowFile(directory / "scenes.npy"), table, meta, make_spec(directory, meta, size, spec))


def own_spec(meta: SceneMeta) -> dict[str, Any]:
    """How a model reads the scenes of a directory, but for the statistics of their bands."""
    names = ("kind", "classes", "size", "bands", "bits", "nodata", "resolution_m")
    return {**{name: getattr(meta, name) for name in names}, "prepared_size": meta.size}


def make_spec(directory: Path, meta: SceneMeta, size: int | None, spec: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a model's inputs are computed: `spec` checked against the directory, or the directory's own."""
    if spec is None:
        spec = {**own_spec(meta), "mean": meta.statistics.mean, "std": meta.statistics.std}
    check_bands(directory, meta.bands, spec, "scenes")
    for name, mine in (*((name, getattr(meta, name)) for name in SAME), ("prepared_size", meta.size)):
        if spec.get(name, mine) != mine:  # models of earlier versions lack some
            raise DataError(
                f"the model does not fit the scenes of {directory}",
                f"its {name}: the model's {spec[name]}, the directory's {mine}",
                "use scenes of the same kind as those on which the model was trained",
            )
    return with_size(directory, meta.size, spec, size, "scenes")


def check_bands(directory: Path, bands: Sequence[str], spec: Mapping[str, Any], what: str) -> None:
    """Raise DataError unless a directory of `what` has the bands that a model of `spec` reads."""
    if missing := [band for band in spec["bands"] if band not in bands]:
        raise DataError(
            f"{directory} lacks the band {', '.join(missing)}",
            f"the model reads {', '.join(spec['bands'])}",
            f"prepare {what} that have these bands, or train a model on those that there are",
        )


def with_size(directory: Path, prepared: int, spec: Mapping[str, Any], size: int | None, what: str) -> dict[str, Any]:
    """Return `spec` with the requested `size` in pixels a side; DataError if it exceeds that of the `prepared` ones."""
    side = size or spec["size"]
    if side > prepared:
        raise DataError(
            f"{directory} has {what} of {prepared} px, but {side} px are requested",
            "enlarging adds no information",
            f"use data.size={prepared} or less",
        )
    return {**spec, "size": side}
