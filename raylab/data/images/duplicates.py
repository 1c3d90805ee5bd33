"""Finds copies of one radiograph under different names and merges them with the patients into groups.

A copy is often cropped, rescaled, recompressed and brightened, so neither file hashes nor perceptual hashes of whole
images find it. Compared are high-pass images, divided by their local contrast (bright frames would correlate
otherwise), by normalised cross-correlation (NCC, -1 to 1) in two steps:

1. all pairs, 24 px of the central 85 %: those of at least COARSE go on. One matrix product.
2. those pairs, 48 px of the central 80 % of one against 45 views of the other (5 scales, 3 x 3 shifts), and the other
   way round: the best of the 90 is the pair's NCC, and from FINE on it is a copy.

Both thresholds were set on the X-rays of the COVID-Net task, 2,146 images of four public collections (docs/log.md):
of copies cropped by up to 4 % a side, rescaled, brightened and recompressed .95 are found, and no pair of different
patients is, at 96 px as at 64.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COARSE, FINE = 0.7, 0.82
COARSE_SIDE, COARSE_BLUR, COARSE_VIEW = 24, 2.25, 0.85
THUMB = 96  # px
SIDE, BLUR, VIEW = 48, 3.0, 0.8  # px, px, fraction of the side
SCALES, SHIFTS = (0.72, 0.76, 0.8, 0.84, 0.88), (-0.03, 0.0, 0.03)
FLOOR = 4.0  # grey values: local contrast below this is noise and is not amplified
ROWS = 1024  # images compared at a time
PAIRS = 1 << 14  # pairs compared at a time

Floats = NDArray[np.float32]


def thumbnails(images: NDArray[np.uint8], rows: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The images of `rows` (all by default) with at most THUMB px per side, small enough to be compared in memory."""
    chosen = range(len(images)) if rows is None else rows
    side = min(THUMB, images.shape[1])
    out = np.empty((len(chosen), side, side), dtype=np.uint8)
    for at, row in enumerate(chosen):
        out[at] = Image.fromarray(images[row]).resize((side, side), Image.Resampling.BILINEAR)
    return out


def pairs(images: NDArray[np.uint8], others: NDArray[np.uint8] | None = None) -> list[tuple[int, int, float]]:
    """(i, j, NCC) of every copy: i < j within thumbnails `images` uint8 [N, S, S], or i in `images` and j in `others`.

    The result depends on pixels alone: two exposures of one patient on one day may be similar enough.
    """
    found: list[tuple[int, int, float]] = []
    i_P, j_P = _candidates(images, others)
    if len(i_P) == 0:
        return found
    best_P = np.full(len(i_P), -1, dtype=np.float32)
    ways = (images, i_P, images if others is None else others, j_P)
    for viewed, at_P, fixed, on_P in (ways, ways[2:] + ways[:2]):
        rows, at_U = np.unique(at_P, return_inverse=True)
        columns, on_U = np.unique(on_P, return_inverse=True)
        base = _prints(fixed[columns], SIDE, BLUR, (0.5, 0.5, VIEW))
        for scale, dx, dy in product(SCALES, SHIFTS, SHIFTS):
            view = _prints(viewed[rows], SIDE, BLUR, (0.5 + dx, 0.5 + dy, scale))
            for start in range(0, len(i_P), PAIRS):
                some = slice(start, start + PAIRS)
                ncc = np.einsum("pd,pd->p", view[at_U[some]], base[on_U[some]])
                np.maximum(best_P[some], ncc, out=best_P[some])
    copies = np.flatnonzero(best_P >= FINE)
    return [(int(i_P[k]), int(j_P[k]), float(best_P[k])) for k in copies]


def merged(names: Sequence[Iterable[str]]) -> list[str]:
    """The group of every row: rows that share a name, directly or through other rows, share a group.

    `names` [N]: for each row its patient, its copies' group and whatever else ties it to other rows. A group is named
    after the alphabetically first of its names, so a patient without copies is a group of the same name.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(name, len(numbers)) for name in row] for row in names]
    ties = np.array([(row[0], other) for row in rows for other in row[1:]], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ties), dtype=bool), (ties[:, 0], ties[:, 1])), shape=(len(numbers), len(numbers)))
    component = connected_components(graph, directed=False)[1]
    first: dict[int, str] = {}
    for name in sorted(numbers):
        first.setdefault(component[numbers[name]], name)
    return [first[component[row[0]]] for row in rows]


def _candidates(
    images: NDArray[np.uint8], others: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    mine = _prints(images, COARSE_SIDE, COARSE_BLUR, (0.5, 0.5, COARSE_VIEW))
    theirs = mine if others is None else _prints(others, COARSE_SIDE, COARSE_BLUR, (0.5, 0.5, COARSE_VIEW))
    i_P, j_P = [], []
    for at in range(0, len(mine), ROWS):
        i, j = np.nonzero(mine[at : at + ROWS] @ theirs.T >= COARSE)
        i += at
        keep = i < j if others is None else np.ones(len(i), dtype=bool)
        i_P.append(i[keep])
        j_P.append(j[keep])
    return np.concatenate(i_P), np.concatenate(j_P)


def _prints(images: NDArray[np.uint8], side: int, blur: float, view: tuple[float, float, float]) -> Floats:
    """[N, side * side] of length 1: the square `view` (centre x, centre y, side; fractions of the image),
    high-passed."""
    from scipy.ndimage import gaussian_filter

    x, y, share = view
    out = np.empty((len(images), side * side), dtype=np.float32)
    for at in range(0, len(images), ROWS):
        block = images[at : at + ROWS]
        edge = block.shape[1]
        box = tuple(
            edge * float(np.clip(p, 0, 1)) for p in (x - share / 2, y - share / 2, x + share / 2, y + share / 2)
        )
        small = np.stack(
            [
                np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box), np.float32)
                for image in block
            ]
        )
        small -= gaussian_filter(small, (0, blur, blur))
        small /= np.sqrt(gaussian_filter(small * small, (0, blur, blur))) + FLOOR
        flat = small.reshape(len(block), -1)
        flat -= flat.mean(axis=1, keepdims=True)
        out[at : at + ROWS] = flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-6)
    return out
