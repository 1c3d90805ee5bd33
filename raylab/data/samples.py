"""The interfaces of data to networks: inputs, which a prediction needs, and samples, which also have labels."""

from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import polars as pl
from torch import Tensor


class Inputs(Protocol):
    """What a network reads of each row. Inputs are made on demand, so that images stay on disk. Several threads may
    call `batch` at the same time.

    spec    JSON-able description of the inputs that a model trained on them carries along:
            at least {"kind": str, "classes": [str, ...]}, plus what the loader needs to make the same
            inputs from other data (features, statistics from train, image size, ...)
    """

    spec: dict[str, Any]

    def __len__(self) -> int: ...

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> Tensor:
        """Inputs x, float32 [B, ...], of the rows in `index`. With `augment` = (seed, epoch), every row is
        augmented with randomness that depends only on (seed, epoch, row), never on its batch."""
        ...


class HostBatch(Protocol):
    """Inputs in host memory that are finished on the device that computes, where they take less time."""

    def pin(self) -> Self:
        """The same in pinned memory, from which copies to a GPU do not make the host wait."""
        ...

    def inputs(self, device: str) -> Tensor:
        """Inputs x, float32 [B, ...], on `device`, without waiting for it."""
        ...


@runtime_checkable
class Readable(Protocol):
    """Inputs whose `batch` can be finished on a GPU, to rounding."""

    def read(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> HostBatch:
        """What `batch(index, augment)` is computed from."""
        ...


@dataclass(frozen=True)
class NewRows:
    """New data, without labels, as a trained model reads it.

    rows    one row for each prediction that was asked for; `reason` is null, or says why there is no prediction
    inputs  of the rows whose reason is null, in their order; None if there are none
    notes   what was left out, converted or guessed, and what is absent, in sentences without identifiers
    """

    rows: pl.DataFrame
    inputs: Inputs | None
    notes: list[str]


class Samples(Inputs, Protocol):
    """One split of a prepared directory. Labels and groups are plain arrays.

    y       int64 [N]   class index (binary tasks: 0 or 1)
    group   int64 [N]   patient as a running number, for clustered intervals; not an identifier
    source  str   [N]   origin of the row (hospital or collection)
    ids     str   [N]   identifiers of the rows; they stay in the data directory and in `predict`
    """

    y: np.ndarray
    group: np.ndarray
    source: np.ndarray
    ids: np.ndarray

    @property
    def augmentation(self) -> int:
        """Version of the values that `batch` returns with `augment`; 0 where it changes nothing."""
        ...
