"""Rows read from disk: the same bytes as an array's, and no more memory than what is asked for."""

import numpy as np
import pytest

from raylab.data.row_file import RowFile
from raylab.errors import DataError
from tests.memory import resident_bytes


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_are_those_of_the_array(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 255, (20, 3, 5)).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    file = RowFile(tmp_path / "a.npy")
    for rows in ([3, 0, 3, 19], [], np.arange(20)):
        got = file[np.asarray(rows, dtype=np.int64)]
        assert got.dtype == dtype and np.array_equal(got, array[np.asarray(rows, dtype=np.int64)])
    assert len(file) == 20 and file.shape == (20, 3, 5)


def test_rows_that_are_not_there(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 6), dtype=np.uint8))
    file = RowFile(path)
    for rows in ([4], [-1], [0, 7]):
        with pytest.raises(IndexError, match="which has 4"):
            file[np.array(rows)]
    path.open("r+b").truncate(path.stat().st_size - 1)
    with pytest.raises(DataError, match="ends before row 3"):
        file[np.array([0, 3])]
    np.save(path, np.asfortranarray(np.zeros((4, 6), dtype=np.uint8)))
    with pytest.raises(DataError, match="row by row"):
        RowFile(path)


def test_a_file_larger_than_the_budget_stays_on_disk(tmp_path):
    """300 MB pass through memory in batches of 3 MB."""
    path, shape = tmp_path / "a.npy", (6000, 224, 224)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape).flush()  # sparse: it takes no disk
    file = RowFile(path)
    before = resident_bytes()
    most = 0
    for rows in np.random.default_rng(0).permutation(shape[0]).reshape(-1, 60):
        assert file[rows].nbytes == 60 * 224 * 224
        most = max(most, resident_bytes())
    assert most - before < 30e6, f"{(most - before) / 1e6:.0f} MB"
