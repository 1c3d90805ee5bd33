"""What a source of brain sections tells `prepare`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Blocks = Sequence[tuple[int, int]]
"""Rows [start, stop) of an image, from the top down."""


@dataclass(frozen=True)
class Section:
    """One section. `read(blocks)` yields the pixels of each block of rows, [bands, stop - start, width], and raises
    DataError if they cannot be read; it never holds the whole image unless the file can only be decoded at once."""

    name: str
    number: int
    depth: float
    width: int
    height: int
    read: Callable[[Blocks], Iterator[NDArray[np.unsignedinteger]]]


@dataclass(frozen=True)
class SectionSource:
    """The sections of one brain, by number. All have the same bands, bits and resolution.

    `depth_name` is the column of the depth; `scope` names the brain, for the leakage check. `attrition` counts sections
    (step, sections) up to those that are here.
    """

    name: str
    scope: str
    bands: tuple[str, ...]
    bits: int
    depth_name: str
    sections: list[Section]
    um_per_px: float | None = None
    synthetic: bool = False
    attrition: tuple[tuple[str, int], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SectionRequest:
    """What a source needs to know of the request: the folder of images and the table of sections, the column of the
    depth and the level of pyramids; and what to draw."""

    path: Path | None
    manifest: Path | None
    depth: str
    level: int
    seed: int
    count: int
    patch: int
