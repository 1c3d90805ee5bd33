"""Prepared sections as Samples: patches with the depth of their section, or pairs of neighbouring patches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from raylab.data.images.scenes.dataset import SceneRows, check_bands, with_size
from raylab.data.images.sections.meta import SectionMeta
from raylab.data.images.sections.neighbours import find_neighbours
from raylab.data.images.sections.split import SPLITS
from raylab.data.prepared import read_meta
from raylab.data.row_file import RowFile
from raylab.errors import DataError, unknown

BRIGHTNESS, CONTRAST = 0.3, 0.2  # ranges, in standard deviations and as a factor, of what changes between two patches
POSITION = ("order", "grid_row", "grid_column")


class SectionSamples(SceneRows):
    """One split: x float32 [B, bands, S, S], y float32 [N, 1] the depth, standardised by train. The sections are the
    groups; `position` int64 [N, 3] is the section in order, and row and column of the grid."""

    def __init__(self, patches: RowFile, table: pl.DataFrame, meta: SectionMeta, spec: dict[str, Any]) -> None:
        super().__init__(patches, table["row"].to_numpy().astype(np.int64), meta.bands, spec)
        self.meta = meta
        depth = (table["depth"].to_numpy() - spec["output_mean"][0]) / spec["output_std"][0]
        self.y: NDArray[np.float32] = depth.astype(np.float32)[:, None]
        self.position: NDArray[np.int64] = table.select(POSITION).to_numpy().astype(np.int64)
        self.group = table["section"].to_numpy().astype(np.int64)
        self.source = np.array(table["source"].to_list(), dtype=str)
        self.ids = np.array(table["id"].to_list(), dtype=str)
        self.absent: list[str] = []


class PairSamples(SectionSamples):
    """Pairs of a patch and one of its neighbours: x float32 [B, 2, bands, S, S], y float32 [N, 3] the position of the
    patch. Patches without a neighbour are left out.

    With `augment` = (seed, epoch) the neighbour is drawn, both are turned and flipped, and the brightness and contrast
    of each change, so that the staining of a section is not what tells neighbours; all by (seed, epoch, row) alone.
    Without, it is always the first neighbour that there is.
    """

    augmentation = 1

    def __init__(self, patches: RowFile, table: pl.DataFrame, meta: SectionMeta, spec: dict[str, Any]) -> None:
        has_neighbour = (find_neighbours(table.select(POSITION).to_numpy()) >= 0).any(axis=1)
        super().__init__(patches, table.filter(pl.Series(has_neighbour)), meta, spec)
        self.neighbours = find_neighbours(self.position)
        self.y = self.position.astype(np.float32)

    def batch(self, index: NDArray[Any], augment: tuple[int, int] | None = None) -> Tensor:
        own, other = super().batch(index, augment), super().batch(self.draw_neighbours(index, augment), augment)
        if augment is not None:
            own, other = (_jitter(x, [*augment, k], self.rows[index]) for k, x in enumerate((own, other)))
        return torch.stack([own, other], 1)

    def draw_neighbours(self, index: NDArray[Any], augment: tuple[int, int] | None) -> NDArray[np.int64]:
        """The index of one neighbour of each row in `index`."""
        out = np.empty(len(index), dtype=np.int64)
        for at, row in enumerate(np.asarray(index).tolist()):
            there = self.neighbours[row][self.neighbours[row] >= 0]
            number = 0 if augment is None else _generator([*augment, 2], self.rows[row]).integers(len(there))
            out[at] = there[number]
        return out


def _jitter(x_BCSS: Tensor, key: list[int], rows: NDArray[np.int64]) -> Tensor:
    """x with another brightness and contrast of each patch and band."""
    change = np.stack([_generator(key, row).uniform(-1, 1, size=(2, x_BCSS.shape[1])) for row in rows])
    factor, shift = torch.from_numpy(change.astype(np.float32)).unbind(1)
    return x_BCSS * (1 + CONTRAST * factor)[..., None, None] + (BRIGHTNESS * shift)[..., None, None]


def _generator(key: list[int], row: int) -> np.random.Generator:
    """The random numbers of (seed, epoch, purpose) for one row."""
    seed, epoch, purpose = key
    parts = [(seed ^ (purpose + 1) << 40) % 2**64, (epoch << 32 | int(row)) % 2**64]
    return np.random.Generator(np.random.Philox(key=np.array(parts, dtype=np.uint64)))


def load_sections(
    directory: Path,
    split: str,
    task: str,
    size: int | None = None,
    spec: Mapping[str, Any] | None = None,
    pairs: bool = False,
) -> SectionSamples:
    """The patches of `split` ("train", "val", "test", or "all"), or `pairs` of them.

    `spec`: that of the model that will use them; its statistics, bands and size replace those of the directory. Raises
    DataError if the patches lack a band, have another resolution, or fewer pixels than are asked for.
    """
    directory = Path(directory)
    if split not in (*SPLITS, "all"):
        raise unknown("split", split, (*SPLITS, "all"))
    meta = read_meta(directory, task, SectionMeta)
    table = pl.read_parquet(directory / "index.parquet")
    if split != "all":
        table = table.filter(pl.col("split") == split)
    patches = RowFile(directory / "patches.npy")
    own = make_spec(directory, meta, size, spec, pairs)
    samples = (PairSamples if pairs else SectionSamples)(patches, table, meta, own)
    if len(samples) == 0:
        raise DataError(
            f"no patch of {split} in {directory} has a neighbour", do="prepare more sections, or a smaller --patch"
        )
    return samples


def make_spec(
    directory: Path, meta: SectionMeta, size: int | None, spec: Mapping[str, Any] | None, pairs: bool
) -> dict[str, Any]:
    """How a model's inputs and outputs are computed: `spec` checked against the directory, or the directory's own."""
    if spec is None:
        spec = {
            "kind": meta.kind,
            "classes": ["embedding" if pairs else meta.depth_name],
            "pairs": pairs,
            "size": meta.size,
            "bands": meta.bands,
            "nodata": None,
            "um_per_px": meta.um_per_px,
            "mean": meta.statistics.mean,
            "std": meta.statistics.std,
            "output_mean": [meta.depth_mean],
            "output_std": [meta.depth_std],
            "depth_per_section": meta.depth_per_section,
        }
    check_bands(directory, meta.bands, spec, "sections")
    if not pairs and spec["classes"] != [meta.depth_name]:
        raise DataError(
            f"the model predicts {spec['classes'][0]}, {directory} has {meta.depth_name}",
            do="prepare the sections with that column (--depth)",
        )
    if spec["um_per_px"] != meta.um_per_px:
        raise DataError(
            f"the model does not fit the sections of {directory}",
            f"um per pixel: the model's {spec['um_per_px']}, the directory's {meta.um_per_px}",
            "use sections of the same resolution as those on which the model was trained",
        )
    return with_size(directory, meta.size, spec, size, "patches")
