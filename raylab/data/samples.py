"""The interface of prepared data sets to the training loop."""

from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Samples(Protocol):
    """One split of a prepared directory. Labels and groups are plain arrays; inputs are made on
    demand, so that images stay on disk. Several threads may call `batch` at the same time.

    y       int64 [N]   class index (binary tasks: 0 or 1)
    group   int64 [N]   patient as a running number, for clustered intervals; not an identifier
    source  str   [N]   origin of the row (hospital or collection)
    ids     str   [N]   identifiers of the rows; they stay in the data directory and in `predict`
    spec    JSON-able description of the inputs that a model trained on them carries along:
            at least {"kind": str, "classes": [str, ...]}, plus what the loader needs to make the same
            inputs from another directory (features, statistics from train, image size, ...)
    """

    y: np.ndarray
    group: np.ndarray
    source: np.ndarray
    ids: np.ndarray
    spec: dict[str, Any]

    @property
    def augmentation(self) -> int:
        """Version of the values that `batch` returns with `augment`; 0 where it changes nothing."""
        ...

    def __len__(self) -> int: ...

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> Tensor:
        """Inputs x, float32 [B, ...], of the rows in `index`. With `augment` = (seed, epoch), every row is
        augmented with randomness that depends only on (seed, epoch, row), never on its batch."""
        ...
