"""What a network's score on chest X-rays is held against: in public collections class and source are confounded.

border probe     logistic regression that sees the outermost RING of RINGED px of an image alone: collimation, markers,
                 fonts, exposure, and little lung (in wide films, whose central square is what networks see,
                 its outermost strip). What it scores is what a shortcut scores.
within a source  classes told apart among images of one source, where the source gives nothing away.

The third control, a network trained with the lung field blacked out, is the recipe field data.mask=centre.
(DeGrave et al. 2021, Nature Machine Intelligence 3:610; Maguolo and Nanni 2021, Information Fusion 76:1.)
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from raylab.data.image_samples import ImageSamples, load_images
from raylab.errors import DataError
from raylab.metrics import binary_scores, point

RINGED, RING = 64, 10  # px: the image is averaged to 64 x 64, of which the outer 10 on each side are seen
STRENGTHS = (1e-5, 1e-4, 1e-3)  # of the regression (sklearn's C); val chooses
FEWEST = 5  # rows of a class in a source, below which telling them apart is no measurement
CHUNK = 256

Floats = NDArray[np.float64]


class BorderProbe:
    """Fitted on the train split of a prepared directory, its strength chosen by macro recall on val."""

    def __init__(self, directory: Path) -> None:
        from sklearn.linear_model import LogisticRegression

        train, val = (load_images(directory, split) for split in ("train", "val"))
        self.classes: list[str] = train.spec["classes"]
        x = _ring(train)
        self.mean, self.std = x.mean(axis=0), x.std(axis=0) + 1e-6
        tried = []
        for strength in STRENGTHS:
            self.model = LogisticRegression(C=strength, class_weight="balanced", max_iter=200, tol=1e-3)
            self.model.fit((x - self.mean) / self.std, train.y)
            tried.append((point("multiclass", val.y, self(val)).get("macro_recall", 0.0), -strength, self.model))
        best = max(tried, key=lambda one: one[:2])
        self.val_macro_recall, self.model = best[0], best[2]

    def __call__(self, samples: ImageSamples) -> Floats:
        """Probabilities [N, classes]; 0 for a class that train lacks. `samples` must show their borders."""
        if samples.spec["classes"] != self.classes:
            raise DataError(f"the border probe knows {self.classes}, the data has {samples.spec['classes']}")
        out = np.zeros((len(samples), len(self.classes)))
        out[:, self.model.classes_] = self.model.predict_proba((_ring(samples) - self.mean) / self.std)
        return out


def _ring(samples: ImageSamples) -> Floats:
    """[N, 2160]: pixels 0 to 1 of the ring. They come from the cache, whatever a model's statistics are."""
    seen = np.ones((RINGED, RINGED), dtype=bool)
    seen[RING:-RING, RING:-RING] = False
    parts = []
    for at in range(0, len(samples), CHUNK):
        pixels = samples.pixels(np.arange(at, min(at + CHUNK, len(samples))))
        parts.append(F.adaptive_avg_pool2d(pixels, RINGED).numpy()[:, 0][:, seen])
    return np.concatenate(parts).astype(np.float64)


def within_source(
    samples: ImageSamples, p: Floats, bootstraps: int = 1000, seed: int = 0
) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(source, class, other class, AUROC with its interval) of every pair of classes with at least FEWEST rows each in
    one source: how well p of one, of both, tells them apart. Chance is .5."""
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
            yield source, classes[b], classes[a], {**scores["auroc"], "n": [int(counts[b]), int(counts[a])]}


def by_stratum(samples: ImageSamples, p: Floats, strata: NDArray[Any]) -> dict[str, list[list[int]]]:
    """Confusion [K, K], truth in rows, of each value of `strata` [N]."""
    K = p.shape[1]
    cell = samples.y * K + p.argmax(axis=1)
    return {str(s): np.bincount(cell[strata == s], minlength=K * K).reshape(K, K).tolist() for s in np.unique(strata)}
