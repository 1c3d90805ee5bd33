"""COVID-Net's augmentation, of a whole batch in uint8: a function of (seed, epoch, row of the directory) alone.

Every image gets its own random numbers, from a counter-based generator keyed by those three, and no pixel of another
image enters into it: so it never depends on its batch, its shard or the worker that loads it.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

# The ranges of its public repository, with one zoom for both axes so that hearts keep their shape.
AUGMENT: Mapping[str, float] = {
    "rotation": 10.0,  # maximum degrees in either direction
    "shift": 0.1,  # maximum fraction of the side, per axis, in either direction
    "flip": 0.5,  # probability of a horizontal flip
    "brightness": 0.1,  # factor 0.9 to 1.1
    "zoom": 0.15,  # factor 0.85 to 1.15
    "erase": 0.0,  # probability that a rectangle is filled with one grey level
}
ERASED_AREA, ERASED_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)
"""Fraction of the image that is erased, and height over width (random erasing, Zhong et al., AAAI 2020, section 3)."""
VERSION = 2
"""Version of the values that `augment_batch` returns; 1 was torchvision's transforms, an image at a time in float32. A
run keeps to the version that it started with, so a change of any value here needs the next number."""
BLOCK_PIXELS = 1 << 16  # transformed at a time: its float32 copies then stay in a core's cache


def augment_batch(x_B1SS: Tensor, seed: int, epoch: int, rows: NDArray[np.int64], by: Mapping[str, float]) -> Tensor:
    """Flip, rotate, zoom and shift (one bilinear sampling, black outside), then brighten and erase: uint8 [B, 1, S, S]
    both ways, rounded once."""
    side = x_B1SS.shape[-1]
    unit = np.stack([_uniform(seed, epoch, int(row)) for row in rows])  # [B, 12]
    theta_B23, brightness_B = _movements(unit, by)
    centres = (2 * torch.arange(side, dtype=torch.float32) + 1) / side - 1  # of pixels, on [-1, 1]
    out = torch.empty(x_B1SS.shape, dtype=torch.uint8)
    size = max(1, BLOCK_PIXELS // side**2)
    source, grid = torch.empty(size, 1, side, side), torch.empty(size, 2, side, side)
    for at in range(0, len(rows), size):
        block = slice(at, min(at + size, len(rows)))
        n = block.stop - at
        for axis in range(2):  # where in the source each pixel lies: x = a*X + b*Y + c, and y alike
            a, b, c = theta_B23[block, axis].T[..., None]
            torch.add((a * centres)[:, None, :], (b * centres + c)[:, :, None], out=grid[:n, axis])
        moved = F.grid_sample(source[:n].copy_(x_B1SS[block]), grid[:n].permute(0, 2, 3, 1), align_corners=False)
        out[block] = moved.mul_(brightness_B[block, None, None, None]).round_().clamp_(0, 255)
    for number in np.flatnonzero(unit[:, 6] < by["erase"]):
        left, top, right, bottom, grey = _rectangle(unit[number], side)
        out[number, :, top:bottom, left:right] = grey
    return out


def _movements(unit: NDArray[np.float64], by: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """theta float32 [B, 2, 3], which maps a pixel of the result to its place in the source, both on [-1, 1] and each
    (x, y); and the factor of brightness, float32 [B]."""
    rotation, zoom, shift_x, shift_y, _, brightness = (2 * unit[:, :6] - 1).T  # [-1, 1)
    angle, scale = np.deg2rad(rotation * by["rotation"]), 1 + zoom * by["zoom"]
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    dx, dy = 2 * by["shift"] * shift_x, 2 * by["shift"] * shift_y
    mirror = np.where(unit[:, 4] < by["flip"], -1.0, 1.0)  # the source is mirrored before it is moved
    theta = np.stack(
        [
            np.stack([cos, sin, -cos * dx - sin * dy], axis=1) * mirror[:, None],
            np.stack([-sin, cos, sin * dx - cos * dy], axis=1),
        ],
        axis=1,
    )
    return torch.from_numpy(theta).float(), torch.from_numpy(1 + brightness * by["brightness"]).float()


def _rectangle(unit: NDArray[np.float64], side: int) -> tuple[int, int, int, int, int]:
    """Left, top, right, bottom in pixels, within the image, and the grey level of what is erased."""
    area_share, aspect_share, x, y, grey = unit[7:]
    area = side**2 * (ERASED_AREA[0] + area_share * (ERASED_AREA[1] - ERASED_AREA[0]))
    aspect = ERASED_ASPECT[0] * (ERASED_ASPECT[1] / ERASED_ASPECT[0]) ** aspect_share
    height = min(side, round(math.sqrt(area * aspect)))
    width = min(side, round(math.sqrt(area / aspect)))
    left, top = int(x * (side - width + 1)), int(y * (side - height + 1))
    return left, top, left + width, top + height, int(256 * grey)


def _uniform(seed: int, epoch: int, row: int) -> NDArray[np.float64]:
    """Twelve numbers, uniform in [0, 1)."""
    key = np.array([seed % 2**64, (epoch << 32 | row) % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(12)
