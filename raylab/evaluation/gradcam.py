"""Grad-CAM maps of a class (Selvaraju et al., arXiv 1610.02391), computed by captum, and the fraction of a map outside
the central lung field. A heat map does not prove what a decision is based on."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from raylab.data.images.dataset import ImageSamples, box_px
from raylab.errors import UsageError

CHUNK = 16
SMALLEST = 3  # minimum cells per side; smaller maps do not localise anything


def last_map(model: nn.Module, size: int) -> nn.Module:
    """Return the last convolution whose map has at least SMALLEST cells per side for images of `size` px.

    Raises UsageError for networks without convolutions, and for images too small for any map.
    """
    maps: list[tuple[nn.Module, int]] = []
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, _, out: maps.append((m, min(out.shape[-2:])))) for m in convolutions]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 1, size, size))
    finally:
        for hook in hooks:
            hook.remove()
    usable = [layer for layer, cells in maps if cells >= SMALLEST]
    if not usable:
        raise UsageError(
            f"no Grad-CAM of {type(model).__name__} at {size} px",
            f"it has no convolution with a map of {SMALLEST} x {SMALLEST} cells",
            "use a convolutional network and larger images",
        )
    return usable[-1]


def grad_cam(
    model: nn.Module, samples: ImageSamples, index: NDArray[np.int64], target: NDArray[np.int64]
) -> np.ndarray:
    """Return the maps of class `target` [B] for rows `index`: float32 [B, S, S], with maximum 1 or all 0."""
    from captum.attr import LayerGradCam

    cam = LayerGradCam(model.eval(), last_map(model, samples.spec["size"]))
    parts = []
    for at in range(0, len(index), CHUNK):
        x = samples.batch(index[at : at + CHUNK])
        small = cam.attribute(x, torch.from_numpy(target[at : at + CHUNK]), relu_attributions=True)
        large = F.interpolate(small.detach(), x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        parts.append((large / large.amax((1, 2), keepdim=True).clamp_min(1e-12)).numpy())
    return np.concatenate(parts)


def outside(maps: np.ndarray) -> NDArray[np.float64]:
    """Return the fraction of each map's [B, S, S] sum that is outside the lung field (images.dataset.LUNG_BOX); NaN for
    an empty map. For a uniform map it is 0.43."""
    left, top, right, bottom = box_px(maps.shape[-1])
    total = maps.sum((1, 2), dtype=np.float64)
    inside = maps[:, top:bottom, left:right].sum((1, 2), dtype=np.float64)
    fraction: NDArray[np.float64] = np.divide(total - inside, total, out=np.full(len(maps), np.nan), where=total > 0)
    return fraction
