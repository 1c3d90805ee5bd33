"""COVID-Net's augmentation as torchvision v2 transforms: a function of (seed, epoch, row of the directory) only.

Every image gets its own random numbers, from a counter-based generator keyed by those three, and is transformed by
itself: so it never depends on its batch, its shard or the worker that loads it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The ranges of its public repository, with one zoom for both axes so that hearts keep their shape.
AUGMENT: Mapping[str, float] = {
    "rotation": 10.0,  # maximum degrees in either direction
    "shift": 0.1,  # maximum fraction of the side, per axis, in either direction
    "flip": 0.5,  # probability of a horizontal flip
    "brightness": 0.1,  # factor 0.9 to 1.1
    "zoom": 0.15,  # factor 0.85 to 1.15
}


def augmented(x_B1SS: Tensor, seed: int, epoch: int, rows: NDArray[np.int64], by: Mapping[str, float]) -> Tensor:
    """Flip, rotate, zoom and shift (one bilinear sampling, black outside), brighten; pixels in [0, 1] before and
    after."""
    # Imported here because the import takes seconds and not every process augments.
    from torchvision.transforms.v2 import InterpolationMode, functional

    side = x_B1SS.shape[-1]
    out = torch.empty_like(x_B1SS)
    for at, row in enumerate(rows):
        draws = _draws(seed, epoch, int(row))
        either = 2 * draws - 1  # [-1, 1)
        image = functional.horizontal_flip(x_B1SS[at]) if draws[4] < by["flip"] else x_B1SS[at]
        image = functional.affine(
            image,
            angle=float(either[0] * by["rotation"]),
            translate=[float(either[2] * by["shift"] * side), float(either[3] * by["shift"] * side)],
            scale=float(1 + either[1] * by["zoom"]),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        out[at] = functional.adjust_brightness(image, float(1 + either[5] * by["brightness"]))
    return out


def _draws(seed: int, epoch: int, row: int) -> NDArray[np.float64]:
    """Six numbers, uniform in [0, 1)."""
    key = np.array([seed % 2**64, (epoch << 32 | row) % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(6)
