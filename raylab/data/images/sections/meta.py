"""meta.json of directories prepared from brain sections."""

from typing import Literal

from raylab.data.images.scenes.meta import BandStatistics
from raylab.data.prepared import Meta

KIND = "sections"


class SectionMeta(Meta):
    """`counts` are of patches, of sections, and of patches with a neighbour in their split."""

    kind: str = KIND
    size: int
    """pixels a side of a patch"""
    bands: list[str]
    bits: Literal[8, 16]
    um_per_px: float | None = None
    """micrometres a side of a pixel; none if neither the table nor the files say"""
    depth_name: str
    """the table's column of the depth"""
    depth_mean: float
    """over the patches of train, as the next field"""
    depth_std: float
    depth_per_section: float
    """how much the depth changes from one section number to the next, fitted on the sections of train"""
    interval: int
    """consecutive sections that are in one split"""
    fold: int
    gap: int
    """sections left out on each side of an interval of another split"""
    statistics: BandStatistics
