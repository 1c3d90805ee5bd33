"""Sums over shards: the same to the bit for every order and placement; and the helper that starts real processes."""

import math
import multiprocessing
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from raylab.training.process_group import ProcessGroup

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(FLOAT32, min_size=width, max_size=width), min_size=1, max_size=9)
)


def in_world(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of `size` processes joined by gloo on loopback.

    The processes are forked from a server that has imported torch and nothing else has happened in, which is much
    faster than starting afresh and safer than forking this one. Arguments and results hold no tensors, which
    would be handed over by sockets that end with their process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raylab.training.run", "pytest", "hypothesis"])
    folder.mkdir()
    ends = [context.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        context.Process(target=_rank, args=(rank, size, folder / "init", theirs, work, arguments))
        for rank, (_, theirs) in enumerate(ends)
    ]
    for rank in ranks:
        rank.start()
    for _, theirs in ends:
        theirs.close()
    try:
        outcomes = []
        for ours, _ in ends:
            assert ours.poll(120), "a rank does not answer"
            outcomes.append(ours.recv())
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def _rank(rank: int, size: int, init: Path, answer: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=size)
        answer.send(work(*arguments))
    except Exception as error:
        answer.send(error)
    dist.destroy_process_group()


def bits(vector: torch.Tensor) -> bytes:
    return vector.numpy().tobytes()


def tensors(rows: list[list[float]]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def summed(shards: list[torch.Tensor], count: int | None = None) -> torch.Tensor:
    return ProcessGroup().sum_exact(shards, count or len(shards), shards[0])


@given(VECTORS, st.randoms(use_true_random=False))
def test_the_order_of_shards_changes_no_bit(rows, random):
    shards = tensors(rows)
    shuffled = list(shards)
    random.shuffle(shuffled)
    assert bits(summed(shards)) == bits(summed(shuffled))


@given(VECTORS)
@settings(max_examples=200)
def test_the_sum_is_the_exact_one_within_the_stated_resolution(rows):
    """Resolution: half a unit of 2^-61 of the largest element times the shards, for each of them; then float32."""
    shards = tensors(rows)
    got = summed(shards).double().numpy()
    exact = np.array([math.fsum(column) for column in zip(*rows, strict=True)])
    largest = max(abs(x) for row in rows for x in row)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.abs(rounded)).astype(float)
    near = np.isfinite(unit)
    assert np.isinf(got[np.isinf(rounded)]).all()
    slack = len(rows) ** 2 * largest * 2.0**-60 + unit
    assert (np.abs(got - exact)[near] <= slack[near]).all()


def test_what_float32_would_lose_is_kept():
    big, small = torch.tensor([1e8]), torch.tensor([1.0])
    assert summed([big, small, -big]).item() == 1.0
    assert ProcessGroup().sum_float([big, small, -big], big).item() == 0.0


def test_zeros_and_the_smallest_and_the_largest_numbers():
    tiny = struct.unpack("f", struct.pack("I", 1))[0]  # 2^-149, the smallest denormal
    huge = torch.finfo(torch.float32).max
    assert summed([torch.zeros(3), torch.zeros(3)]).tolist() == [0, 0, 0]
    assert summed([torch.tensor([tiny]), torch.tensor([tiny])]).item() == 2 * tiny
    assert summed([torch.tensor([huge]), torch.tensor([-huge]), torch.tensor([huge])]).item() == huge
    assert summed([torch.tensor([huge, tiny])]).tolist() == [huge, 0.0]  # 2^-277 of the largest: below the resolution


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4096])
@pytest.mark.parametrize("value", [1.0, 1 - 2**-24, -1.0, 3.0e-39, 0.75])
def test_many_equal_largest_values_do_not_overflow(count, value):
    shard = torch.full((2,), value)
    assert summed([shard] * count).tolist() == pytest.approx([count * shard[0].item()] * 2, rel=1e-7)


def test_chunks_meet_without_seam(monkeypatch):
    shards = [torch.randn(1000, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    whole = summed(shards)
    monkeypatch.setattr("raylab.training.process_group.CHUNK", 7)
    assert bits(whole) == bits(summed(shards))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_spoils_the_whole_sum(poison):
    assert summed([torch.ones(3), torch.tensor([0.0, poison, 1e30])]).isnan().all()
    assert summed([torch.tensor([0.0, poison, 1e30]), torch.ones(3)]).isnan().all()


def test_a_process_alone():
    group = ProcessGroup()
    assert (group.rank, group.size) == (0, 1)
    assert list(group.own_shards(3)) == [0, 1, 2]
    assert group.any(True) is True and group.any(False) is False
    rows = {2: torch.tensor([1, 2]), 0: torch.tensor([0.1, math.inf])}
    table = group.gather(rows, 4, 2)
    assert table.dtype == torch.float64
    assert table.tolist() == [[torch.tensor(0.1).item(), math.inf], [0, 0], [1, 2], [0, 0]]


SHARDS = 7


def shard(number: int) -> torch.Tensor:
    """Of very different magnitudes, so that every other way of adding shows."""
    drawn = torch.randn(1000, generator=torch.Generator().manual_seed(number))
    return drawn * 10.0 ** (number - 3)


def sums() -> dict[str, Any]:
    """What one rank sees. More ranks than shards are left with none, and still take part."""
    group = ProcessGroup()
    mine = {n: shard(n) for n in group.own_shards(SHARDS)}
    few = [shard(n) for n in group.own_shards(2)]
    total = group.sum_exact(list(mine.values()), SHARDS, torch.zeros(1000))
    seen = {
        "exact": bits(total),
        "few": bits(group.sum_exact(few, 2, torch.zeros(1000))),
        "float": group.sum_float(list(mine.values()), torch.zeros(1000)).tolist(),
        "gather": group.gather({n: v[:3] for n, v in mine.items()}, SHARDS + 1, 3).tolist(),
        "mine": list(mine),
        "any": [group.any(group.rank == group.size - 1), group.any(False)],
    }
    for poison in (math.nan, math.inf):
        poisoned = [v * poison if n == SHARDS - 1 else v for n, v in mine.items()]
        # on every rank, also on those whose own shards are well
        assert group.sum_exact(poisoned, SHARDS, torch.zeros(1000)).isnan().all()
    return seen


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_agree_with_one_process_to_the_bit(size, tmp_path):
    alone = sums()
    seen = in_world(size, tmp_path / "world", sums)
    assert sorted(n for rank in seen for n in rank["mine"]) == list(range(SHARDS))
    for rank in seen:
        for name in ("exact", "few", "gather"):
            assert rank[name] == alone[name], name
        assert rank["any"] == [True, False]
        assert rank["float"] == pytest.approx(alone["float"], rel=1e-4, abs=1e-2)
