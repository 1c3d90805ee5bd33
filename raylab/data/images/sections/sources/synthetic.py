"""Drawn sections: SYNTHETIC, for tests, demonstrations and machines without data.

An ellipse of tissue on a white slide, whose size and whose texture (the wavelength of its stripes, and where a dark
layer lies) change smoothly with depth. The staining of each section differs, so that its brightness says nothing of the
depth. Nothing here is a model of a brain.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from raylab.data.images.sections.section import Blocks, Section, SectionRequest, SectionSource
from raylab.errors import UsageError

FEWEST = 25
COLUMNS, ROWS = 6, 5  # patches
UM_PER_SECTION = 20.0


def read(request: SectionRequest) -> SectionSource:
    if request.count < FEWEST:
        raise UsageError(f"--patients {request.count} is too few", "every split needs sections", f"use {FEWEST}")
    sections = [
        Section(
            f"synthetic-{number:04d}",
            number,
            UM_PER_SECTION * number,
            COLUMNS * request.patch,
            ROWS * request.patch,
            _Drawing(request.seed, number, number / (request.count - 1), request.patch),
        )
        for number in range(request.count)
    ]
    return SectionSource(
        "synthetic",
        f"synthetic brain, seed {request.seed}",
        ("grey",),
        8,
        "depth_um",
        sections,
        synthetic=True,
        attrition=(("drawn", request.count),),
    )


class _Drawing:
    """The function `read` of a drawn section."""

    def __init__(self, seed: int, number: int, depth: float, patch: int) -> None:
        self.seed, self.number, self.depth, self.patch = seed, number, depth, patch

    def __call__(self, blocks: Blocks) -> Iterator[NDArray[np.unsignedinteger]]:
        pixels = draw(np.random.default_rng([self.seed, 35, self.number]), self.depth, self.patch)
        for start, stop in blocks:
            yield pixels[:, start:stop]


def draw(rng: np.random.Generator, depth: float, patch: int) -> NDArray[np.uint8]:
    """The section at `depth` in 0 to 1, uint8 [1, ROWS * patch, COLUMNS * patch]."""
    height, width = ROWS * patch, COLUMNS * patch
    y, x = np.mgrid[0:height, 0:width]
    radius = np.hypot((x - width / 2) / (0.47 * width), (y - height / 2) / (0.47 * height)) / (0.85 + 0.15 * depth)
    wavelength = patch * (0.15 + 0.35 * depth)
    stripes = np.sin(2 * np.pi * radius * height / 2 / wavelength + rng.uniform(0, 2 * np.pi))
    layer = np.exp(-(((radius - 0.3 - 0.5 * depth) / 0.08) ** 2))
    tissue = 130 + 28 * stripes - 45 * layer + rng.normal(0, 12, size=(height, width))
    tissue = (tissue - 130) * rng.uniform(0.8, 1.2) + rng.uniform(100, 160)
    values = np.where(radius < 1, np.clip(tissue, 0, 215), 250)
    return np.rint(values).astype(np.uint8)[None]
