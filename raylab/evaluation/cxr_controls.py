"""Controls for a network's score on chest X-rays, because class and source are confounded in public collections.

border probe     logistic regression on the outermost RING of RINGED px of an image only: collimation, markers, fonts,
                 exposure, and little lung (in wide images, whose central square is the network's input, the border of
                 that square). Its score is the score of a shortcut.
within a source  discrimination of classes among images of one source, where the source reveals nothing.

The third control, a network trained with the lung field masked, is the recipe field data.mask=centre; with
data.mask=border a network sees the lung field alone.
(DeGrave et al. 2021, Nature Machine Intelligence 3:610; Maguolo and Nanni 2021, Information Fusion 76:1.)
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from raylab.data.images.dataset import ImageSamples, load_images
from raylab.data.images.meta import ImageMeta
from raylab.data.prepared import read_meta
from raylab.errors import DataError
from raylab.evaluation.metrics import binary_scores, multiclass_point
from raylab.score import Score

RINGED, RING = 64, 10  # px: the image is averaged to 64 x 64, of which the outer 10 on each side are used
STRENGTHS = (1e-5, 1e-4, 1e-3)  # of the regression (sklearn's C); chosen on val
FEWEST = 5  # minimum rows of a class in a source for a meaningful comparison
CHUNK = 256

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BorderProbe:
    """A fitted probe: softmax(x weights + bias) of standardised ring pixels; bias -inf for classes not in train."""

    classes: list[str]
    mean: Floats  # [2160]
    std: Floats
    weights: Floats  # [2160, classes]
    bias: Floats
    val_macro_recall: float

    def __call__(self, samples: ImageSamples) -> Floats:
        """Return probabilities [N, classes]; the probe reads the unmasked pixels even if `samples` is masked."""
        if samples.spec["classes"] != self.classes:
            raise DataError(f"the border probe has the classes {self.classes}, the data has {samples.spec['classes']}")
        return self.of((_ring(samples) - self.mean) / self.std)

    def of(self, x: Floats) -> Floats:
        from scipy.special import softmax

        probabilities: Floats = softmax(x @ self.weights + self.bias, axis=1)
        return probabilities


def border_probe(directory: Path, kept: Path) -> BorderProbe:
    """Return the probe of a prepared directory: fitted on train, with its strength chosen by macro recall on val.

    `kept` is a folder that caches fitted probes by the data hash of the directory.
    """
    file = kept / f"border-{read_meta(directory, None, ImageMeta).data_hash[:16]}.npz"
    if not file.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{os.getpid()}-{file.name}")
        np.savez(beside, **vars(_fit_probe(directory)))
        beside.replace(file)
    with np.load(file) as arrays:
        return BorderProbe(
            arrays["classes"].tolist(),
            arrays["mean"],
            arrays["std"],
            arrays["weights"],
            arrays["bias"],
            float(arrays["val_macro_recall"]),
        )


def _fit_probe(directory: Path) -> BorderProbe:
    from sklearn.linear_model import LogisticRegression

    train, val = (load_images(directory, split) for split in ("train", "val"))
    classes = train.spec["classes"]
    x = _ring(train)
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    tried = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=200, tol=1e-3)
        model.fit((x - mean) / std, train.y)
        weights, bias = np.zeros((x.shape[1], len(classes))), np.full(len(classes), -np.inf)
        two = len(model.classes_) == 2  # sklearn then has only the weights of the second class
        weights[:, model.classes_] = np.concatenate(
            [np.zeros_like(model.coef_), model.coef_] if two else [model.coef_]
        ).T
        bias[model.classes_] = [0, *model.intercept_] if two else model.intercept_
        probe = BorderProbe(classes, mean, std, weights, bias, 0.0)
        tried.append(replace(probe, val_macro_recall=multiclass_point(val.y, probe(val))["macro_recall"]))
    return max(tried, key=lambda probe: probe.val_macro_recall)


def _ring(samples: ImageSamples) -> Floats:
    """Return the pixels of the ring [N, 2160], 0 to 1, from the prepared images, not standardised for a model."""
    seen = np.ones((RINGED, RINGED), dtype=bool)
    seen[RING:-RING, RING:-RING] = False
    parts = []
    for at in range(0, len(samples), CHUNK):
        pixels = samples.pixels(np.arange(at, min(at + CHUNK, len(samples))))
        parts.append(F.adaptive_avg_pool2d(pixels, RINGED).numpy()[:, 0][:, seen])
    return np.concatenate(parts).astype(np.float64)


def within_source(
    samples: ImageSamples, p: Floats, bootstraps: int = 1000, seed: int = 0
) -> Iterator[tuple[str, str, str, Score]]:
    """Yield (source, class, other class, AUROC with its interval) for every pair of classes with at least FEWEST rows
    each in one source. The AUROC is that of p of the class, normalised over the pair; chance is 0.5."""
    classes = samples.spec["classes"]
    for source in sorted(set(samples.source)):
        here = samples.source == source
        counts = np.bincount(samples.y[here], minlength=len(classes))
        for a, b in combinations(range(len(classes)), 2):
            if min(counts[a], counts[b]) < FEWEST:
                continue
            rows = here & np.isin(samples.y, (a, b))
            both = p[rows][:, a] + p[rows][:, b]
            of_b = np.divide(p[rows][:, b], both, out=np.full(len(both), 0.5), where=both > 0)
            scores = binary_scores(samples.y[rows] == b, of_b, samples.group[rows], bootstraps, seed)
            auroc = scores["auroc"].model_copy(update={"n": [int(counts[b]), int(counts[a])]})
            yield source, classes[b], classes[a], auroc
