"""Images that are larger than the memory a run may use."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl

from raylab.data.images.augment import AUGMENT
from raylab.data.images.dataset import ImageSamples
from raylab.data.prefetch import Prefetcher
from raylab.data.row_file import RowFile
from tests.memory import resident_bytes

ROWS, SIDE, BATCH, THREADS = 6000, 224, 40, 2


def measure_pass(path: Path) -> int:
    """Make one pass over images in `path`; return the bytes of memory by which this process grew most."""
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(ROWS, SIDE, SIDE)).flush()  # sparse
    columns = {"row": range(ROWS), "label": 0, "group": range(ROWS), "source": "none", "view": None, "id": "none"}
    spec = {"size": SIDE, "mean": 0.5, "std": 0.25}
    samples = ImageSamples(RowFile(path), pl.DataFrame(columns), {}, spec, AUGMENT)
    order = np.random.default_rng(0).permutation(ROWS).reshape(-1, BATCH)
    samples.batch(order[0])  # whatever torch sets up once
    before, most = resident_bytes(), 0
    with Prefetcher(lambda number: samples.batch(order[number]), len(order), THREADS) as batches:
        for number in range(len(order)):
            assert batches.get(number).shape == (BATCH, 1, SIDE, SIDE)
            most = max(most, resident_bytes())
    return most - before


def test_a_pass_over_more_images_than_the_budget_stays_within_it(tmp_path):
    """n threads hold n + 2 batches in float32, and half a batch each while they work (docs/architecture.md). In a
    process of its own, where the memory of other tests does not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        grown = pool.submit(measure_pass, tmp_path / "images.npy").result()
    budget = BATCH * SIDE * SIDE * 4 * (THREADS + 2 + THREADS / 2)  # 40 MB, of 300 MB on disk
    # Besides, the arena of each of the three threads keeps what it needed once: 95 to 115 MB in all were seen
    assert grown < 3.5 * budget, f"{grown / 1e6:.0f} MB: more than the allocator keeps"
