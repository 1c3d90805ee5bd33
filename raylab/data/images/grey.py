"""Converts the numbers of an image file to brightness: uint8, 0 = black .. 255 = white."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]

KEPT = "values kept"  # 8 bits, as they are in the file
STRETCHED = "stretched"
UNFIT = ", window does not suit"  # appended if a file has windows and none was applied


@dataclass(frozen=True)
class Picture:
    """One radiograph as displayed."""

    grey: Grey  # [H, W]
    contrast: str  # how the brightness was obtained: KEPT, STRETCHED, or from a VOI LUT or window
    opacity: NDArray[np.float32] | None = None  # [H, W], 0 (not part of the picture) .. 1; None: all visible
    view: str = ""  # PA, AP, LL, ...; the modality (CT, MR, ...) if it is not a radiograph; empty if unknown


def stretch(values: NDArray[Any], shown: Mask | None = None) -> Grey:
    """Map the 0.5 to 99.5 percentiles of `values` [H, W] to 0..255. Only pixels that are `shown` count."""
    step = max(1, min(values.shape) // 1024)  # a million pixels suffice for the percentiles
    sample = values[::step, ::step]
    if shown is not None:
        sample = sample[shown[::step, ::step]]
        if sample.size == 0:
            sample = values[shown]
    low, high = np.percentile(sample, (0.5, 99.5))
    if low == high:  # more than 99% have one value: fall back to the full range
        part = values if shown is None else values[shown]
        low, high = part.min(), part.max()
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / max(high - low, 1e-6))
    return to_grey(scaled)


def luminance(colour: NDArray[Any]) -> NDArray[Any]:
    """The luma of ITU-R BT.601 [...] of uint8 or uint16 RGB [..., 3], of the same type and equal to Pillow's."""
    red, green, blue = (colour[..., channel].astype(np.uint32) for channel in range(3))
    grey: NDArray[Any] = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(colour.dtype)
    return grey


def to_grey(values: NDArray[Any]) -> Grey:
    """`values`, rounded and clipped to 0..255."""
    grey: Grey = np.rint(values.clip(0, 255)).astype(np.uint8)
    return grey
