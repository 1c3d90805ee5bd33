"""Prepared chest X-rays as Samples: float32 [B, 1, S, S] from the images on disk, augmented by batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raylab.data.images.augment import AUGMENT, VERSION, Changes, change_images, draw_changes
from raylab.data.images.meta import ImageMeta
from raylab.data.images.prepare import SPLITS
from raylab.data.prepared import read_meta
from raylab.data.row_file import RowFile
from raylab.errors import DataError, unknown

# The central lung field as a fixed box, the same for all images: left, top, right, bottom as fractions of the
# view (decode.frame). It contains the lungs of a frontal radiograph, and other tissue.
LUNG_BOX = (0.12, 0.10, 0.88, 0.85)


@dataclass(frozen=True)
class Views:
    """Images uint8 [B, 1, S, S] that are not inputs yet: see HostBatch. They have a quarter of the bytes of inputs, and
    a GPU augments them in less time than a core needs to start."""

    x_B1SS: Tensor
    changes: Changes | None
    mean: float
    std: float

    def pin(self) -> "Views":
        changes = None if self.changes is None else self.changes.each(Tensor.pin_memory)
        return replace(self, x_B1SS=self.x_B1SS.pin_memory(), changes=changes)

    def inputs(self, device: str) -> Tensor:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        x_B1SS = move(self.x_B1SS)
        if self.changes is not None:
            x_B1SS = change_images(x_B1SS, self.changes.each(move))
        return x_B1SS.float().div_(255).sub_(self.mean).div_(self.std)


class ImageInputs:
    """Inputs of networks from views, uint8 [all rows, cache size, cache size]. `rows` are the rows in them: the key of
    augmentation. `size`, statistics and mask come from `spec`, so that other images yield the same inputs for a
    model."""

    def __init__(
        self,
        images: RowFile | NDArray[np.uint8],
        rows: NDArray[np.int64],
        spec: dict[str, Any],
        augment: Mapping[str, float],
    ) -> None:
        self.images, self.rows, self.spec, self.augment = images, rows, spec, augment

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: NDArray[Any], augment: tuple[int, int] | None = None) -> Tensor:
        """x float32 [B, 1, S, S] = (pixel / 255 - mean) / std; `augment` = (seed, epoch), see Samples."""
        return self.read(index, augment).inputs("cpu")

    def read(self, index: NDArray[Any], augment: tuple[int, int] | None = None) -> Views:
        """What `batch` is computed from."""
        x_B1SS = self.views(index)
        if mask := self.spec.get("mask"):  # before augmentation, which would move lungs out of the box
            black_out(x_B1SS, mask)
        side = x_B1SS.shape[-1]
        changes = None if augment is None else draw_changes(*augment, self.rows[index], side, self.augment)
        return Views(x_B1SS, changes, float(self.spec["mean"]), float(self.spec["std"]))

    def pixels(self, index: NDArray[Any]) -> Tensor:
        """float32 [B, 1, S, S] in 0 (black) to 1, unmasked and not standardised."""
        return self.views(index).float() / 255

    def views(self, index: NDArray[Any]) -> Tensor:
        """uint8 [B, 1, S, S] in the size of the spec, unmasked and not standardised."""
        x_B1SS = torch.from_numpy(self.images[self.rows[index]]).unsqueeze(1)
        if self.spec["size"] != x_B1SS.shape[-1]:
            x_B1SS = F.interpolate(x_B1SS, (self.spec["size"],) * 2, mode="bilinear", antialias=True)
        return x_B1SS


class ImageSamples(ImageInputs):
    """One split of a prepared directory."""

    augmentation = VERSION

    def __init__(
        self,
        images: RowFile | NDArray[np.uint8],
        table: pl.DataFrame,
        meta: ImageMeta,
        spec: dict[str, Any],
        augment: Mapping[str, float],
    ) -> None:
        super().__init__(images, table["row"].to_numpy().astype(np.int64), spec, augment)
        self.y = table["label"].to_numpy().astype(np.int64)
        self.group = table["group"].to_numpy().astype(np.int64)
        self.source = np.array(table["source"].to_list(), dtype=str)
        self.view = np.array([view or "unknown" for view in table["view"].to_list()], dtype=str)
        self.ids = np.array(table["id"].to_list(), dtype=str)
        self.meta = meta
        self.absent: list[str] = []  # inputs that a model needs and this directory lacks: none for images


def black_out(x_B1SS: Tensor, mask: str) -> None:
    """Make LUNG_BOX black ("centre"), or all but it ("border")."""
    left, top, right, bottom = box_px(x_B1SS.shape[-1])
    if mask == "centre":
        x_B1SS[:, :, top:bottom, left:right] = 0
        return
    for outside in (x_B1SS[:, :, :top], x_B1SS[:, :, bottom:], x_B1SS[..., :left], x_B1SS[..., right:]):
        outside.zero_()


def box_px(side: int) -> tuple[int, int, int, int]:
    """LUNG_BOX in pixels of a view of `side` px."""
    left, top, right, bottom = (round(share * side) for share in LUNG_BOX)
    return left, top, right, bottom


def load_images(
    directory: Path,
    split: str,
    size: int | None = None,
    augment: Mapping[str, float] | None = None,
    spec: Mapping[str, Any] | None = None,
    mask: str | None = None,
    task: str | None = None,
) -> ImageSamples:
    """The rows of `split` ("train", "val", "test", or "all").

    `spec`: that of the model that will use the images; its statistics, and its size unless `size` is given, replace
    those of the directory. `augment`: changes to AUGMENT, {} or None for AUGMENT itself; zeros switch it off. `mask`
    ("centre" or "border"): as black_out has it, and as for a model whose spec says so. Raises DataError if the images
    do not have the kind, classes or size that the model needs.
    """
    directory = Path(directory)
    if split not in (*SPLITS, "all"):
        raise unknown("split", split, (*SPLITS, "all"))
    for name in augment or {}:
        if name not in AUGMENT:
            raise unknown("augmentation", name, AUGMENT)
    meta = read_meta(directory, task, ImageMeta)
    table = pl.read_parquet(directory / "index.parquet")
    if "group" not in table.columns:
        raise DataError(
            f"{directory} was prepared by a version that did not search for copies",
            do=f"run raylab prepare {meta.task} again",
        )
    groups = {name: number for number, name in enumerate(sorted(set(table["group"])))}
    table = table.with_columns(group=pl.col("group").replace_strict(groups, return_dtype=pl.Int64))
    if split != "all":
        table = table.filter(pl.col("split") == split)
    if table.is_empty():
        raise DataError(
            f"{directory} has no {split} split",
            f"it was prepared with {', '.join(meta.counts)} only",
            f"raylab prepare {meta.task} with a {split} list, or with a manifest whose column split names {split} rows",
        )
    images = RowFile(directory / "images.npy")
    return ImageSamples(images, table, meta, _spec(directory, meta, size, spec, mask), {**AUGMENT, **(augment or {})})


def own_spec(meta: ImageMeta) -> dict[str, Any]:
    """How a model reads the images of a directory, but for the statistics of their pixels."""
    return {"kind": meta.kind, "classes": meta.classes, "size": meta.size}


def _spec(
    directory: Path, meta: ImageMeta, size: int | None, spec: Mapping[str, Any] | None, mask: str | None
) -> dict[str, Any]:
    """How the model's inputs are computed: `spec` checked against the directory, or the directory's own spec."""
    if spec is None:
        if meta.statistics is None:
            raise DataError(
                f"{directory} has no train split to take pixel statistics from",
                "statistics are fitted on train only",
                "prepare it with a train list, or use it with a trained model, which has its own statistics",
            )
        spec = {**own_spec(meta), **meta.statistics}
        spec |= {"prepared_size": meta.size} if size not in (None, meta.size) else {}
    for key in ("kind", "classes"):
        if spec.get(key) != getattr(meta, key):
            raise DataError(
                f"the model does not fit images of another kind: {directory}",
                f"its {key}: the model's {spec.get(key)}, the directory's {getattr(meta, key)}",
                "use a directory prepared for the model's task",
            )
    side = size or spec["size"]
    if side > meta.size:
        raise DataError(
            f"{directory} has images of {meta.size} px, but {side} px are requested",
            "enlarging adds no information",
            f"raylab prepare {meta.task} with --size {side}, or use at most {meta.size}",
        )
    return {**spec, "size": side} | ({} if mask is None else {"mask": mask})
