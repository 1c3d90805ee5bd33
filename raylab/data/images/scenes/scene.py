"""What a source of scenes tells `prepare`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

MOST = 1024  # pixels a side of a scene: larger files are images to be cut into scenes first


@dataclass(frozen=True)
class Place:
    """The centre of a scene, in metres of the projection `zone` (an EPSG code)."""

    zone: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One scene before its pixels are read. `labels` are indices of classes; `block` names scenes that stay together
    where no place is known; `split` is the one that the source prescribes."""

    id: str
    labels: tuple[int, ...]
    place: Place | None = None
    block: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class SceneSource:
    """The scenes of one source, all with the same bands and size.

    `read(i)` returns the pixels of scene i, [bands, size, size] of uint8 or uint16, and raises DataError if they cannot
    be used. `attrition` counts scenes (step, scenes) before that; `unit` is what `block` identifies.
    """

    name: str
    bands: tuple[str, ...]
    classes: tuple[str, ...]
    size: int
    bits: int
    scenes: list[Scene]
    read: Callable[[int], NDArray[np.unsignedinteger]]
    synthetic: bool = False
    several_labels: bool = False
    nodata: int | None = None
    resolution_m: float | None = None
    unit: str = "scene"
    attrition: tuple[tuple[str, int], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SceneRequest:
    """What a source needs to know of the request: where its raw data is, what to draw, which classes to use."""

    path: Path | None
    seed: int
    count: int
    corine: int
