"""Drawn scenes: SYNTHETIC, for tests, demonstrations and machines without data.

Four classes differ in the mean reflectance of four bands and in texture (smooth water, grainy forest, striped fields,
blocks of a town), and overlap enough that a network learns but is not perfect. Scenes lie beside each other in tiles
of a zone that does not exist. Nothing here is a model of land.
"""

import numpy as np
from numpy.typing import NDArray

from raylab.data.images.scenes.scene import Place, Scene, SceneRequest, SceneSource
from raylab.errors import UsageError

BANDS = ("B02", "B03", "B04", "B08")
CLASSES = ("water", "forest", "fields", "town")
LEVELS = np.array([[900, 800, 600, 400], [500, 700, 500, 2600], [900, 1100, 1200, 2200], [1300, 1400, 1500, 1900]])
SIZE = 16  # px
METRES = 10.0  # a side of a pixel
FEWEST = 60


def read(request: SceneRequest) -> SceneSource:
    if request.count < FEWEST:
        raise UsageError(f"--patients {request.count} is too few", "every split needs every class", f"use {FEWEST}")
    rng = np.random.default_rng([request.seed, 18])
    label = rng.integers(len(CLASSES), size=request.count)
    pixels = np.stack([draw(rng, int(k)) for k in label])
    # tiles of 4 x 4 scenes, a tile apart from the next, so that no scene is near one of another tile
    tile, within = np.divmod(np.arange(request.count), 16)
    x = 10_000.0 * 2 * (tile % 8) + 200 + SIZE * METRES * (within % 4)
    y = 10_000.0 * 2 * (tile // 8) + 200 + SIZE * METRES * (within // 4)
    scenes = [
        Scene(f"synthetic-{at:05d}", (int(k),), Place("synthetic", float(x[at]), float(y[at])))
        for at, k in enumerate(label)
    ]
    return SceneSource(
        "synthetic", BANDS, CLASSES, SIZE, 16, scenes, lambda at: pixels[at], synthetic=True, resolution_m=METRES
    )


def draw(rng: np.random.Generator, label: int) -> NDArray[np.uint16]:
    """One scene of class `label`, uint16 [4, SIZE, SIZE] in reflectance times 10,000."""
    level = LEVELS[label] * rng.uniform(0.7, 1.4) + rng.normal(0, 120, size=4)
    axis = np.arange(SIZE)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi * (axis[:, None] * np.cos(angle) + axis * np.sin(angle)) / 5 + phase)
    blocks = np.kron(rng.normal(size=(SIZE // 4, SIZE // 4)), np.ones((4, 4)))
    texture = (0.0, 0.0, 0.12, 0.0)[label] * stripes + (0.0, 0.0, 0.0, 0.15)[label] * blocks
    grain = rng.normal(0, (0.02, 0.15, 0.06, 0.08)[label], size=(SIZE, SIZE))
    values = level[:, None, None] * (1 + texture + grain) + rng.normal(0, 60, size=(4, SIZE, SIZE))
    pixels: NDArray[np.uint16] = np.rint(np.clip(values, 1, 10_000)).astype(np.uint16)
    return pixels
