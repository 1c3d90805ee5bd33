"""Assigns samples to steps and shards: a pure function of (seed, step), independent of the workers.

The position of a run in its data is its step number, so a resumed run needs no sampler state, and a run on any
number of workers sees the same shards (DESIGN: elastic does not change the mathematics).
"""

from functools import lru_cache

import numpy as np

SITES = 16  # the kind of stream of the first site; smaller ones are other streams


def steps_per_epoch(samples: int, batch: int) -> int:
    """Steps per epoch. The last batch is smaller if `batch` does not divide `samples`; no sample is dropped."""
    return -(-samples // batch)


def smallest_shard(samples: int, batch: int, shards: int) -> int:
    """The fewest rows that any shard has, in the last batch of an epoch; empty shards do not count."""
    return max(1, last_batch(samples, batch) // shards)


def last_batch(samples: int, batch: int) -> int:
    """Rows of the last batch of an epoch; no batch has fewer."""
    return (samples - 1) % batch + 1


def shards_of(step: int, samples: int, batch: int, shards: int, seed: int) -> tuple[int, list[np.ndarray]]:
    """Epoch of `step`, and the sample indices of its logical shards, `shards` arrays of int64.

    A batch is cut into contiguous shards whose sizes differ by at most one; in a small last batch some are empty.
    """
    epoch, position = divmod(step, steps_per_epoch(samples, batch))
    order = _permutation(samples, seed, epoch)
    return epoch, np.array_split(order[position * batch : (position + 1) * batch], shards)


def balanced_shards_of(
    step: int, chosen: np.ndarray, batch: int, shards: int, seed: int, share: float
) -> tuple[int, list[np.ndarray]]:
    """The same with rows `chosen` bool [samples] filling the fraction `share` of every batch.

    Epochs have the batches of `shards_of`. Chosen and other rows form two endless streams, each a sequence of
    permutations of its rows, and a batch continues both where the previous batch ended: an oversampled class repeats
    rows within an epoch, and some rows of the others wait for the next epoch.
    """
    samples = len(chosen)
    per_epoch = steps_per_epoch(samples, batch)
    epoch, position = divmod(step, per_epoch)
    before = epoch * samples + position * batch
    after = min(before + batch, (epoch + 1) * samples)
    start, stop = round(before * share), round(after * share)  # of chosen rows, so that fractions add up over batches
    rows = np.concatenate(
        [
            _stream(np.flatnonzero(chosen), start, stop, seed, 1),
            _stream(np.flatnonzero(~chosen), before - start, after - stop, seed, 2),
        ]
    )
    mixed = np.random.Generator(np.random.Philox(key=[seed, (3 << 48) + step])).permutation(rows)
    return epoch, np.array_split(mixed, shards)


def site_rows(step: int, samples: int, rows: int, seed: int, site: int) -> np.ndarray:
    """Return the `rows` rows that site number `site`, which has `samples` of them, gives to `step`: the next ones of an
    endless sequence of permutations. So a site needs to know nothing of the others' rows, and its share of every batch
    stays the same."""
    return _stream(np.arange(samples), step * rows, (step + 1) * rows, seed, SITES + site)


def _stream(rows: np.ndarray, start: int, stop: int, seed: int, kind: int) -> np.ndarray:
    """Items `start` to `stop` of the endless stream of permutations of `rows`."""
    cycles = range(start // len(rows), -(-stop // len(rows)))
    orders = [rows[_permutation(len(rows), seed, (kind << 48) + cycle)] for cycle in cycles]
    first = cycles.start * len(rows)
    return np.concatenate([*orders, rows[:0]])[start - first : stop - first]


@lru_cache(maxsize=8)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(samples)
