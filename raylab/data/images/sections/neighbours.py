"""Which patches lie beside each other: in one section, or at the same place of the next one."""

import numpy as np
from numpy.typing import NDArray

STEPS = ((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0))
"""From a position (section in order, row, column) to its six neighbours."""


def find_neighbours(position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each of the six neighbours of the patches at `position` [N, 3], int64 [N, 6]; -1 for one that
    is not there."""
    at = {place: index for index, place in enumerate(map(tuple, position.tolist()))}
    found = [[at.get((s + a, r + b, c + d), -1) for a, b, d in STEPS] for s, r, c in position.tolist()]
    return np.array(found, dtype=np.int64).reshape(-1, len(STEPS))
