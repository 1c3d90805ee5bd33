"""Saliency maps of whole sections, of a run that predicts their depth."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from raylab.data.images.sections.dataset import SectionSamples
from raylab.evaluation.saliency import saliency, stitch
from raylab.evaluation.section_depth import section_means
from tracking import plots

SECTIONS = 6  # that are drawn, spread evenly over those of the split
BRIGHTEST = 99.0  # percentile of a section's saliency that is drawn as 1


def draw_maps(network: Any, samples: SectionSamples, p: np.ndarray, split: str, synthetic: bool) -> Figure:
    """Up to SECTIONS sections of a split with the saliency of their patches over them; p [N, 1] or [N] is the
    prediction, standardised."""
    numbers = np.unique(samples.group)
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, SECTIONS).round().astype(int))]
    mean, std = samples.spec["output_mean"][0], samples.spec["output_std"][0]
    truth, predicted = (
        dict(zip(numbers.tolist(), section_means(v.ravel() * std + mean, samples.group), strict=True))
        for v in (samples.y.astype(np.float64), p)
    )
    pictures, maps, captions = [], [], []
    for number in chosen.tolist():
        rows = np.flatnonzero(samples.group == number)
        x = samples.batch(rows).mean(1).double().numpy()
        low, high = x.min(), x.max()
        pictures.append(stitch((x - low) / max(high - low, 1e-12), samples.position[rows], 1.0))
        heat = saliency(network, samples, rows)
        heat = np.clip(heat / max(np.percentile(heat, BRIGHTEST), 1e-12), 0, 1)
        maps.append(stitch(heat, samples.position[rows], 0.0))
        captions.append(f"section {number}: {truth[number]:.4g}\npredicted {predicted[number]:.4g}")
    title = f"Integrated gradients of {samples.spec['classes'][0]}, {split} split"
    return plots.sheet(pictures, maps, captions, None, 3, title, synthetic)
