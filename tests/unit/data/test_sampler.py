"""Which samples belong to which shard: every sample once an epoch, whatever the numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raylab.data.sampler import balanced_shards_of, shards_of, site_rows, steps_per_epoch
from raylab.training.process_group import ProcessGroup

SAMPLES, BATCH, SHARDS, SEED = st.integers(1, 400), st.integers(1, 80), st.integers(1, 20), st.integers(0, 2**31 - 1)


def epoch_of(number: int, samples: int, batch: int, shards: int, seed: int) -> list[list[np.ndarray]]:
    steps = steps_per_epoch(samples, batch)
    found = [shards_of(step, samples, batch, shards, seed) for step in range(number * steps, (number + 1) * steps)]
    assert {epoch for epoch, _ in found} == {number}
    return [parts for _, parts in found]


@given(SAMPLES, BATCH, SHARDS, SEED, st.integers(0, 3))
def test_every_sample_exactly_once_an_epoch(samples, batch, shards, seed, number):
    seen = np.concatenate([part for parts in epoch_of(number, samples, batch, shards, seed) for part in parts])
    assert sorted(seen) == list(range(samples))


@given(SAMPLES, BATCH, SHARDS, SEED)
def test_batches_are_full_but_the_last_and_shards_are_even(samples, batch, shards, seed):
    *full, last = epoch_of(0, samples, batch, shards, seed)
    assert all(sum(map(len, parts)) == batch for parts in full)
    assert sum(map(len, last)) == samples - batch * len(full) > 0
    for parts in [*full, last]:
        sizes = [len(part) for part in parts]
        assert len(sizes) == shards and max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 12), st.integers(1, 20))
def test_ranks_take_each_shard_once_whatever_their_number(size, shards):
    taken = []
    for rank in range(size):
        group = ProcessGroup()
        group.rank, group.size = rank, size
        taken += group.own_shards(shards)
    assert sorted(taken) == list(range(shards))


def test_fewer_samples_than_shards_leave_shards_empty():
    epoch, parts = shards_of(5, samples=3, batch=8, shards=6, seed=0)
    assert epoch == 5
    assert [len(part) for part in parts] == [1, 1, 1, 0, 0, 0]


def test_the_order_is_that_of_seed_and_epoch_and_of_nothing_else():
    def order(number: int, seed: int, batch: int, shards: int) -> list[int]:
        return np.concatenate([p for parts in epoch_of(number, 100, batch, shards, seed) for p in parts]).tolist()

    assert order(1, 7, 32, 8) == order(1, 7, 32, 8) == order(1, 7, 10, 3)
    assert len({tuple(order(number, seed, 32, 8)) for number in range(3) for seed in range(3)}) == 9


@given(
    st.integers(2, 40),
    st.integers(1, 20),
    st.integers(1, 9),
    st.floats(0.05, 0.95),
    st.integers(1, 39),
    st.integers(0, 3),
)
def test_a_class_fills_its_share_of_every_batch(samples, batch, shards, share, few, seed):
    chosen = np.zeros(samples, dtype=bool)
    chosen[: min(few, samples - 1)] = True
    steps = steps_per_epoch(samples, batch)
    seen = []
    for step in range(3 * steps):
        epoch, parts = balanced_shards_of(step, chosen, batch, shards, seed, share)
        plain_epoch, plain = shards_of(step, samples, batch, shards, seed)
        assert epoch == plain_epoch and [len(p) for p in parts] == [len(p) for p in plain]
        rows = np.concatenate(parts)
        assert abs(chosen[rows].sum() - share * len(rows)) <= 1
        seen.append(rows)
    every = np.concatenate(seen)
    for kind in (True, False):  # each row comes as often as any other of its kind, give or take the one under way
        counts = np.bincount(every, minlength=samples)[chosen == kind]
        assert counts.max() - counts.min() <= 1
    again = balanced_shards_of(steps, chosen, batch, shards, seed, share)[1]
    assert all(np.array_equal(a, b) for a, b in zip(again, np.array_split(seen[steps], shards), strict=True))


def test_a_site_gives_every_row_as_often_as_any_other_whatever_its_share():
    """15 rows, 4 of them a step: 15 steps are 4 rounds through all rows; another site has another order."""
    steps = [site_rows(step, 15, 4, 7, 0) for step in range(15)]
    assert (np.bincount(np.concatenate(steps)) == 4).all()
    assert all(len(rows) == 4 for rows in steps)
    assert np.array_equal(steps[9], site_rows(9, 15, 4, 7, 0))
    assert not np.array_equal(steps[0], site_rows(0, 15, 4, 7, 1))
    more = site_rows(0, 3, 8, 7, 2)  # fewer rows than its share of a step
    assert sorted(np.bincount(more)) == [2, 3, 3]
