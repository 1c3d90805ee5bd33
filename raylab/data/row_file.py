"""Rows of an array on disk, read when they are asked for."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import DataError


class RowFile:
    """An .npy file of any size: `file[rows]`, int64 [n], is a new array of those rows along its first axis.

    Only what is returned is in memory. The pages of a memory map would count as this process's own until the kernel
    takes them back, and Slurm may end a job for them. Threads may read at the same time.
    """

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r")
        if not array.flags.c_contiguous:
            raise DataError(f"{path} is not stored row by row", do="prepare the data again")
        self.path, self.shape, self.dtype = path, array.shape, array.dtype
        self.row_bytes = array[:1].nbytes
        self.start = array.offset
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Raises IndexError for a row that the file does not have, DataError where the file ends early."""
        if len(rows) > 0 and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.path}, which has {len(self)}")
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for view, row in zip(out, rows.tolist(), strict=True):
            if os.preadv(self.descriptor, [view], self.start + row * self.row_bytes) != self.row_bytes:
                raise DataError(
                    f"{self.path} ends before row {row}", "it was cut after it was opened", "prepare the data again"
                )
        return out
