"""Grad-CAM sheets of a run's cases, and the fraction of each map outside the lung field."""

from pathlib import Path
from typing import Any

import numpy as np

from raylab.data.images.dataset import box_px
from raylab.evaluation.gradcam import grad_cam, outside
from raylab.files import atomic_write
from tracking import plots
from tracking.provenance import Provenance, save_png

EACH = 4  # cases per class and source, separately for correct and wrong predictions


def shares(network: Any, samples: Any, p: np.ndarray) -> np.ndarray:
    """float [N]: for every row, the fraction of the predicted class's map outside the lung field."""
    parts = []
    for at in range(0, len(samples), 256):
        index = np.arange(at, min(at + 256, len(samples)))
        parts.append(outside(grad_cam(network, samples, index, p[index].argmax(axis=1))))
    return np.concatenate(parts)


def sheets(
    network: Any, samples: Any, p: np.ndarray, folder: Path, synthetic: bool, origin: Provenance, seed: int = 0
) -> list[Path]:
    """Write `gradcam-right.png` and `gradcam-wrong.png`: up to EACH cases of every class and source, chosen by `seed`.
    They carry the provenance of the run, `origin`.

    The map is that of the predicted class. The captions contain no identifiers. A sheet without cases is not written.
    """
    classes = samples.spec["classes"]
    predicted = p.argmax(axis=1)
    rng = np.random.default_rng(seed)
    written = []
    for name, chosen in (("right", predicted == samples.y), ("wrong", predicted != samples.y)):
        cases: list[int] = []
        for k in range(len(classes)):
            for source in np.unique(samples.source):
                here = np.flatnonzero(chosen & (samples.y == k) & (samples.source == source))
                cases += sorted(rng.permutation(here)[:EACH].tolist())
        if not cases:
            continue
        index = np.array(cases)
        maps = grad_cam(network, samples, index, predicted[index])
        share = outside(maps)
        captions = [
            f"{classes[samples.y[i]]}, {samples.source[i]}\n{classes[predicted[i]]} {p[i].max():.2f}, outside {s:.0%}"
            for i, s in zip(index, share, strict=True)
        ]
        title = f"Grad-CAM of the predicted class, {name} cases: truth, source; prediction, fraction outside the box"
        pictures = samples.pixels(index).numpy()[:, 0]
        figure = plots.sheet(pictures, maps, captions, box_px(samples.spec["size"]), 2 * EACH, title, synthetic)
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"gradcam-{name}.png")
        with atomic_write(written[-1]) as beside:
            save_png(figure, beside, [origin], dpi=130)
    return written
