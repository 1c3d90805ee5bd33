"""Augmentation of scenes seen from above: one of the eight flips and quarter turns of a square, a function of (seed,
epoch, row of the directory) alone. It moves pixels and computes none, so that it suits any number of bands and bits."""

import numpy as np
from numpy.typing import NDArray

VERSION = 1
"""Version of the values that `augment_scenes` returns, as in images/augment.py."""


def augment_scenes(
    x_BCSS: NDArray[np.unsignedinteger], seed: int, epoch: int, rows: NDArray[np.int64]
) -> NDArray[np.unsignedinteger]:
    """[B, C, S, S] both ways; a copy."""
    out = np.empty_like(x_BCSS)
    for at, row in enumerate(rows.tolist()):
        key = np.array([seed % 2**64, (epoch << 32 | row) % 2**64], dtype=np.uint64)
        number = int(np.random.Generator(np.random.Philox(key=key)).integers(8))
        turned = np.rot90(x_BCSS[at], number % 4, axes=(1, 2))
        out[at] = turned[:, :, ::-1] if number >= 4 else turned
    return out
