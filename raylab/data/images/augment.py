"""COVID-Net's augmentation, of a whole batch in uint8: a function of (seed, epoch, row of the directory) alone.

Every image gets its own random numbers, from a counter-based generator keyed by those three, and no pixel of another
image enters into it: so it never depends on its batch, its shard or the worker that loads it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
"""Version of the values that `change_images` returns on a CPU; 1 was torchvision's transforms, an image at a time in
float32. A run keeps to the version that it started with, so a change of any value here needs the next number."""
BLOCK_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 23}
"""Pixels that are transformed at a time. On a CPU their float32 copies then stay in a core's cache; on a GPU they take
130 MB."""


@dataclass(frozen=True)
class Changes:
    """What augmentation does to each of B images.

    theta       float32 [B, 2, 3]   from a pixel of the result to its place in the source, both on [-1, 1] and each
                                    (x, y)
    brightness  float32 [B]         factor
    erased      int16 [B, 5]        left, top, right and bottom of a rectangle in pixels, empty where nothing is erased,
                                    and its grey level; None if nothing is erased in any image
    """

    theta: Tensor
    brightness: Tensor
    erased: Tensor | None

    def each(self, move: Callable[[Tensor], Tensor]) -> "Changes":
        """The same with each tensor moved to other memory."""
        return Changes(move(self.theta), move(self.brightness), None if self.erased is None else move(self.erased))


def draw_changes(seed: int, epoch: int, rows: NDArray[np.int64], side: int, by: Mapping[str, float]) -> Changes:
    """Draw the changes of the images of `rows`, which have `side` px."""
    unit = np.stack([_uniform(seed, epoch, int(row)) for row in rows])  # [B, 12]
    erased = np.zeros((len(rows), 5), dtype=np.int16)
    for number in np.flatnonzero(unit[:, 6] < by["erase"]):
        erased[number] = _rectangle(unit[number], side)
    return Changes(*_movements(unit, by), torch.from_numpy(erased) if erased.any() else None)


def change_images(x_B1SS: Tensor, changes: Changes) -> Tensor:
    """Flip, rotate, zoom and shift (one bilinear sampling, black outside), then brighten and erase: uint8 [B, 1, S, S]
    both ways, rounded once. A GPU rounds a few pixels to the neighbouring grey level of a CPU."""
    side, device, theta_B23 = x_B1SS.shape[-1], x_B1SS.device, changes.theta
    centres = (2 * torch.arange(side, dtype=torch.float32, device=device) + 1) / side - 1  # of pixels, on [-1, 1]
    out = torch.empty_like(x_B1SS)
    size = min(len(out), max(1, BLOCK_PIXELS[device.type] // side**2))
    source, grid = (torch.empty(size, axes, side, side, device=device) for axes in (1, 2))
    for at in range(0, len(out), max(1, size)):
        block = slice(at, min(at + size, len(out)))
        n = block.stop - at
        for axis in range(2):  # where in the source each pixel lies: x = a*X + b*Y + c, and y alike
            a, b, c = theta_B23[block, axis].T[..., None]
            torch.add((a * centres)[:, None, :], (b * centres + c)[:, :, None], out=grid[:n, axis])
        moved = F.grid_sample(source[:n].copy_(x_B1SS[block]), grid[:n].permute(0, 2, 3, 1), align_corners=False)
        out[block] = moved.mul_(changes.brightness[block, None, None, None]).round_().clamp_(0, 255)
    if changes.erased is not None:
        left, top, right, bottom, grey = changes.erased.T[..., None, None, None]  # each [B, 1, 1, 1]
        at_px = torch.arange(side, device=device)
        inside = (left <= at_px) & (at_px < right) & (top <= at_px[:, None]) & (at_px[:, None] < bottom)
        out = torch.where(inside, grey.to(torch.uint8), out)
    return out


def _movements(unit: NDArray[np.float64], by: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """theta and brightness of Changes."""
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
