"""`prepare` of brain sections: their images, cut into patches -> `patches.npy` + `index.parquet` + meta.json.

patches.npy    uint8 or uint16 [N, bands, size, size], in the values of the files, read row by row
index.parquet  row, id, section, depth, order, grid_row, grid_column, place, source, split; row i of it is patch i

Patches lie on a grid around the centre of each image, so that the same row and column of two sections are about the
same place. A patch is kept if enough of it is tissue: pixels that differ from the edge of the image, which is slide, by
more than CONTRAST of the section's range. Sections of one interval (`place`) never cross splits (split.py).

Images are read by blocks of rows, once; the patches of one section lie on disk until its tissue is known.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data import prepared
from raylab.data.images.scenes.meta import BandStatistics
from raylab.data.images.sections.meta import SectionMeta
from raylab.data.images.sections.neighbours import find_neighbours
from raylab.data.images.sections.section import Blocks, Section, SectionSource
from raylab.data.images.sections.split import SPLITS, default_interval, split_sections
from raylab.errors import DataError, UsageError

CONTRAST = 0.1
VALUES = 2**18  # of patches in memory at a time
SMALLEST = 8  # pixels a side of a patch

Progress = Callable[[int, int], None]
Kind = np.dtype[np.unsignedinteger]


@dataclass(frozen=True)
class Cutting:
    """How sections are cut and split; `interval` None for one that suits the number of sections."""

    size: int = 64
    tissue: float = 0.5
    interval: int | None = None
    fold: int = 0
    gap: int = 1


@dataclass
class Sums:
    """Exact sums of the values of each band, as Python integers."""

    bands: int
    count: int = 0
    total: list[int] = field(init=False)
    square: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.square = [0] * self.bands, [0] * self.bands

    def add(self, patches: NDArray[np.unsignedinteger]) -> None:
        """Add the values of patches [n, bands, size, size]."""
        self.count += patches[:, 0].size
        for band in range(self.bands):
            values = patches[:, band].astype(np.int64)
            self.total[band] += int(values.sum())
            self.square[band] += int((values * values).sum())

    def statistics(self) -> BandStatistics:
        n = self.count
        return BandStatistics(
            mean=[t / n for t in self.total],
            std=[(n * s - t * t) ** 0.5 / n for t, s in zip(self.total, self.square, strict=True)],
        )


def prepare_sections(
    task: str,
    out: Path,
    source: SectionSource,
    cutting: Cutting,
    *,
    seed: int = 0,
    replace: bool = False,
    raw: Sequence[Path] = (),
    progress: Progress | None = None,
) -> SectionMeta:
    """Prepare the directory `out` and return its meta.

    Raises UsageError for impossible options, and DataError for images that cannot be read, a split without patches, and
    depths that are all the same.
    """
    if cutting.size < SMALLEST or not 0 <= cutting.tissue <= 1:
        raise UsageError(
            f"patch {cutting.size}, tissue {cutting.tissue}",
            f"a patch has at least {SMALLEST} px a side, and the fraction of tissue is 0 to 1",
            "correct --patch or --tissue",
        )

    def write(work: Path) -> SectionMeta:
        return _write(task, work, source, cutting, seed, progress)

    return prepared.publish(out, write, task, replace, list(raw))


def _write(
    task: str, work: Path, source: SectionSource, cutting: Cutting, seed: int, progress: Progress | None
) -> SectionMeta:
    sections, size = source.sections, cutting.size
    interval = default_interval(len(sections)) if cutting.interval is None else cutting.interval
    split = split_sections(len(sections), interval, cutting.fold, cutting.gap)
    steps: list[dict[str, int | str]] = [{"step": step, "sections": n} for step, n in source.attrition]
    order = [at for part in SPLITS for at in range(len(sections)) if split[at] == part]
    if cutting.gap:
        steps.append({"step": f"without gaps of {cutting.gap} between splits", "sections": len(order)})
    sums, rows, cells = Sums(len(source.bands)), [], 0
    kind: Kind = np.dtype(np.uint8) if source.bits == 8 else np.dtype(np.uint16)
    with (work / "patches.npy").open("w+b") as file, TemporaryFile(dir=work) as buffer:
        write_header(file, 0, len(source.bands), size, kind)
        for done, at in enumerate(order):
            section = sections[at]
            grid = list_cells(section, size)
            cells += len(grid)
            kept = copy_tissue(section, len(source.bands), kind, cutting, buffer, file, sums, split[at] == "train")
            for k in kept:
                rows.append((at, *grid[k]))
            if progress is not None:
                progress(done + 1, len(order))
        write_header(file, len(rows), len(source.bands), size, kind)
    index = make_index(source, rows, [str(part) for part in split], interval)
    steps.append({"step": f"patches of {size} px", "sections": len(order), "patches": cells})
    left = {"sections": index["section"].n_unique(), "patches": index.height}
    steps.append({"step": f"with at least {cutting.tissue:.0%} tissue", **left})
    counts = {part: count_patches(index.filter(pl.col("split") == part)) for part in SPLITS}
    if empty := [part for part, n in counts.items() if n["patches"] == 0]:
        raise DataError(
            f"no patch is left for {', '.join(empty)}",
            f"{cells:,} patches of {size} px, {index.height:,} with at least {cutting.tissue:.0%} tissue",
            "use a smaller --patch or --tissue",
        )
    index.write_parquet(work / "index.parquet")
    train = index.filter(pl.col("split") == "train")
    depth = train["depth"].to_numpy()
    numbers, depths = (column.to_numpy() for column in train.select("section", "depth").unique())
    if depths.min() == depths.max():
        raise DataError("all sections of train have the same depth", do=f"correct the column {source.depth_name}")
    statistics = sums.statistics()
    if flat := [band for band, std in zip(source.bands, statistics.std, strict=True) if std == 0]:
        raise DataError(f"band {', '.join(flat)} has one value in all of train", do="give images with contrast")
    return SectionMeta(
        patient_ids=prepared.PatientIds(table="index.parquet", column="section", unit="section"),
        numbering=[source.scope],
        task=task,
        source=source.name,
        synthetic=source.synthetic,
        raylab=version("raylab"),
        seed=seed,
        split_hash=prepared.split_hash([(str(s), part) for s, part in index.select("section", "split").iter_rows()]),
        counts=counts,
        attrition=steps,
        warnings=list(source.warnings),
        size=size,
        bands=list(source.bands),
        bits=8 if source.bits == 8 else 16,
        um_per_px=source.um_per_px,
        depth_name=source.depth_name,
        depth_mean=float(depth.mean()),
        depth_std=float(depth.std()),
        depth_per_section=abs(float(np.polyfit(numbers, depths, 1)[0])),
        interval=interval,
        fold=cutting.fold,
        gap=cutting.gap,
        statistics=statistics,
    )


def list_edges(length: int, size: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the patches along one side of an image, 0 for the one that begins at its centre, and where
    each begins, in pixels."""
    centre = length // 2
    numbers = list(range(-(centre // size), (length - centre) // size))
    return numbers, [centre + number * size for number in numbers]


def list_cells(section: Section, size: int) -> list[tuple[int, int]]:
    """Return (row, column) of every patch of the grid, row by row."""
    return [(r, c) for r in list_edges(section.height, size)[0] for c in list_edges(section.width, size)[0]]


def copy_tissue(
    section: Section,
    bands: int,
    kind: Kind,
    cutting: Cutting,
    buffer: IO[bytes],
    out: IO[bytes],
    sums: Sums,
    is_train: bool,
) -> list[int]:
    """Append the patches of a section that are tissue to `out`, add those of train to `sums`, and return their numbers
    in `list_cells`. `buffer` is a file for all patches of one section."""
    size = cutting.size
    columns = list_edges(section.width, size)[1]
    blocks: Blocks = [(start, start + size) for start in list_edges(section.height, size)[1]]
    if not columns or not blocks:
        return []
    edges, low, high = [], np.inf, -np.inf
    buffer.seek(0)
    for number, block in enumerate(section.read(blocks)):
        if block.shape[0] != bands or block.dtype != kind:
            what = f"{section.name} has {block.shape[0]} bands of {block.dtype}"
            raise DataError(what, f"not {bands} of {kind}", "all sections need the same")
        mean = block.mean(0, dtype=np.float32)
        lines = [mean[:, 0], mean[:, -1], *mean[: number == 0], *mean[len(mean) - (number == len(blocks) - 1) :]]
        edges += [line.copy() for line in lines]  # a view would keep the block in memory
        low, high = min(low, float(mean.min())), max(high, float(mean.max()))
        for start in columns:
            buffer.write(np.ascontiguousarray(block[:, :, start : start + size]).tobytes())
    slide, contrast = float(np.median(np.concatenate(edges))), CONTRAST * (high - low)
    buffer.seek(0)
    kept = []
    for first, patches in read_patches(buffer, len(blocks) * len(columns), (bands, size, size), kind):
        tissue = (np.abs(patches.mean(1, dtype=np.float32) - slide) > contrast).mean((1, 2))
        chosen = np.flatnonzero(tissue >= cutting.tissue)
        out.write(patches[chosen].tobytes())
        if is_train:
            sums.add(patches[chosen])
        kept += (first + chosen).tolist()
    return kept


def read_patches(
    file: IO[bytes], count: int, shape: tuple[int, ...], kind: Kind
) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """Yield (number of the first, [n, *shape]) of `count` patches in a file, up to VALUES values or one patch at a
    time."""
    values_each = int(np.prod(shape))
    most = max(1, VALUES // values_each)
    for first in range(0, count, most):
        n = min(most, count - first)
        values = np.frombuffer(file.read(n * values_each * kind.itemsize), kind)
        yield first, values.reshape(n, *shape)


def write_header(file: IO[bytes], patches: int, bands: int, size: int, kind: Kind) -> None:
    """Write the header of patches.npy at the beginning of `file`: its length does not depend on the number of patches,
    for which NumPy leaves room."""
    file.seek(0)
    form = {"descr": kind.str, "fortran_order": False, "shape": (patches, bands, size, size)}
    np.lib.format.write_array_header_1_0(file, form)


def make_index(
    source: SectionSource, rows: list[tuple[int, int, int]], split: list[str], interval: int
) -> pl.DataFrame:
    """The index: one row per patch, given as (section in order, row, column)."""
    sections = [source.sections[at] for at, _, _ in rows]
    return pl.DataFrame(
        {
            "row": range(len(rows)),
            "id": [f"{one.number}/{r}/{c}" for one, (_, r, c) in zip(sections, rows, strict=True)],
            "section": [one.number for one in sections],
            "depth": [one.depth for one in sections],
            "order": [at for at, _, _ in rows],
            "grid_row": [r for _, r, _ in rows],
            "grid_column": [c for _, _, c in rows],
            "place": [f"interval {at // interval}" for at, _, _ in rows],
            "source": [source.name] * len(rows),
            "split": [split[at] for at, _, _ in rows],
        },
        schema_overrides={
            name: pl.Int64 for name in ("row", "section", "order", "grid_row", "grid_column")
        } | {"depth": pl.Float64},
    )  # fmt: skip


def count_patches(part: pl.DataFrame) -> dict[str, int]:
    """Counts of the patches of one split."""
    neighbours = find_neighbours(part.select("order", "grid_row", "grid_column").to_numpy())
    return {
        "patches": part.height,
        "sections": part["section"].n_unique(),
        "with neighbours": int((neighbours >= 0).any(axis=1).sum()),
    }
