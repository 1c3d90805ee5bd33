"""What tasks on chest X-rays share: their preparation, and statistics over several sites."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from raylab.data.images.meta import ImageMeta
from raylab.tasks.base import SiteStatistics
from raylab.tasks.preparation import Preparation, PrepareOptions, Resources

if TYPE_CHECKING:  # as in base.py
    import numpy as np
    from numpy.typing import NDArray


class ImageOptions(PrepareOptions):
    """Options of `prepare` for chest X-rays."""

    source: str | None = None
    """covidx or synthetic"""
    images: Path | None = None
    """folder that the lists' file names start from"""
    train: Path | None = None
    """COVIDx label list of train"""
    val: Path | None = None
    """COVIDx label list of val"""
    test: Path | None = None
    """COVIDx label list of test"""
    manifest: Path | None = None
    """CSV file instead of lists; beside them, for views and groups"""
    classes: tuple[str, ...] = ()
    """your data's classes, in the order of the model's outputs (default: normal, pneumonia, COVID-19)"""
    size: int = Field(224, ge=16)
    """pixels a side of the cache"""
    domain: str | None = None
    """which part of a folder or manifest; synthetic: A or B, of two drawn hospitals"""
    apart_from: tuple[Path, ...] = ()
    """directories: leave out copies of images prepared there"""
    skip_bad: bool = False
    """leave unreadable images out, listed"""


def prepare(task: str, out: Path, options: ImageOptions, replace: bool, resources: Resources) -> ImageMeta:
    """Decode images for `task` into `out`, over the nodes of a cluster where there is one."""
    from raylab.data.images.manifest import SPLITS, discover
    from raylab.data.images.prepare import prepare_images

    lists = {split: getattr(options, split) for split in SPLITS}
    images, manifest = options.images, options.manifest
    if options.path is not None and options.source != "synthetic":
        found = discover(options.path, options.domain)
        if not any(lists.values()):
            lists = {split: found.lists.get(split) for split in lists}
        images, manifest = images or found.images, manifest or found.manifest
    source = options.source or "covidx"
    with nullcontext() if source == "synthetic" else resources.cluster() as run_chunks:
        return prepare_images(
            task,
            out,
            images,
            lists["train"],
            lists["val"],
            lists["test"],
            source=source,
            size=options.size,
            patients=options.patients,
            seed=options.seed,
            skip_bad=options.skip_bad,
            progress=resources.progress,
            domain=options.domain,
            manifest=manifest,
            apart_from=options.apart_from,
            spread=run_chunks,
            replace=replace,
            classes=options.classes,
        )


def describe(meta: ImageMeta) -> list[str]:
    """What is said of a prepared directory, beside what is said of every one."""
    lines = []
    if meta.skipped:
        lines.append(f"  unreadable and skipped: {len(meta.skipped)}")
    if meta.duplicates and (copies := meta.duplicates.pairs):
        different = meta.duplicates.of_different_patients
        lines.append(f"  pairs of copies: {copies}, {different} of them of different patients")
    if meta.published:
        differs = "; ".join(meta.published.differs) or "as the lecture counts"
        lines.append(f"  counts of {meta.published.table}: {differs}")
    return lines


PREPARATION = Preparation("chest X-rays", ImageOptions, prepare, describe)


def sum_statistics(meta: ImageMeta, directory: Path) -> "NDArray[np.float64]":
    """See SiteStatistics."""
    from raylab.data.images import site_statistics

    return site_statistics.sum_statistics(meta)


def pool_statistics(meta: ImageMeta, sums: "NDArray[np.float64]") -> dict[str, Any]:
    """See SiteStatistics."""
    from raylab.data.images import site_statistics

    return site_statistics.pool_statistics(meta, sums)


SITE_STATISTICS = SiteStatistics(sum_statistics, pool_statistics, bound=2.0**30)  # images
