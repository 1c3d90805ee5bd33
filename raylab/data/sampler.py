"""Which samples belong to which step and shard: a pure function of (seed, step), never of the workers.

The position of a run in its data is its step number, so a resumed run needs no sampler state, and a run on any
number of workers sees the same shards (DESIGN: elastic does not change the mathematics).
"""

from functools import lru_cache

import numpy as np


def steps_per_epoch(samples: int, batch: int) -> int:
    """The last batch of an epoch is smaller when `batch` does not divide `samples`; none is dropped."""
    return -(-samples // batch)


def shards_of(step: int, samples: int, batch: int, shards: int, seed: int) -> tuple[int, list[np.ndarray]]:
    """Epoch of `step`, and the sample indices of its logical shards, `shards` arrays of int64.

    A batch is cut into contiguous shards whose sizes differ by one at most; in a small last batch some are empty.
    """
    epoch, position = divmod(step, steps_per_epoch(samples, batch))
    order = _permutation(samples, seed, epoch)
    return epoch, np.array_split(order[position * batch : (position + 1) * batch], shards)


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
