"""meta.json of directories prepared from remote-sensing scenes."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raylab.data.prepared import Meta

KIND = "scenes"


class BandStatistics(BaseModel):
    """Mean and standard deviation of each band over the pixels of train that have data, in the values of the files."""

    model_config = ConfigDict(frozen=True)

    mean: list[float]
    std: list[float]


class SceneMeta(Meta):
    """`counts` are of scenes by split and class; of multi-labels a scene counts in each of its classes."""

    kind: str = KIND
    classes: list[str]
    several_labels: bool
    """whether a scene may have several classes"""
    size: int
    """pixels a side"""
    bands: list[str]
    bits: Literal[8, 16]
    nodata: int | None = None
    """the value of pixels without data; none if every value is one"""
    resolution_m: float | None = None
    """metres a side of a pixel; none if the files do not say"""
    split_by: str
    """how the splits were made, in words"""
    statistics: BandStatistics
    skipped: list[dict[str, str]] = Field([])
