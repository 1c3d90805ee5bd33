"""Saliency of patches: which pixels a network's prediction depends on, by integrated gradients."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.data.images.sections.dataset import SectionSamples

STEPS = 32
CHUNK = 8  # patches at a time


def saliency(model: nn.Module, samples: SectionSamples, index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the absolute integrated gradients (Sundararajan 2017, arXiv 1703.01365) of the prediction for rows
    `index`, summed over bands: [B, S, S]. The path starts from the mean of the training patches."""
    from captum.attr import IntegratedGradients

    model.eval()

    def predict(x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return out.mean(1)[:, 0] if out.ndim == 3 else out[:, 0]

    gradients = IntegratedGradients(predict)
    parts = [
        gradients.attribute(samples.batch(index[at : at + CHUNK]), n_steps=STEPS, internal_batch_size=256)
        for at in range(0, len(index), CHUNK)
    ]
    return torch.cat(parts).detach().abs().sum(1).double().numpy()


def stitch(patches: NDArray[np.float64], position: NDArray[np.int64], empty: float) -> NDArray[np.float64]:
    """Return patches [N, S, S] of one section as one image, by `position` [N, 3]; `empty` where there is none."""
    side, cells = patches.shape[-1], position[:, 1:] - position[:, 1:].min(0)
    rows, columns = cells.max(0) + 1
    image = np.full((rows * side, columns * side), empty)
    for patch, (row, column) in zip(patches, cells.tolist(), strict=True):
        image[row * side : (row + 1) * side, column * side : (column + 1) * side] = patch
    return image
