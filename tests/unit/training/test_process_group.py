"""Sums over shards: the same to the bit for every order and placement; and the helper that starts real processes."""

import math
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from raylab.training.process_group import PeerLost, ProcessGroup
from raylab.training.shard_tree import Node, add_node

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
            assert ours.poll(300), "a rank does not answer"
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


def summed(shards: list[torch.Tensor]) -> torch.Tensor:
    nodes: dict[Node, torch.Tensor] = {}
    for number, vector in enumerate(shards):
        add_node(nodes, (0, number), vector.clone(), len(shards), torch.Tensor.add_)
    out = torch.empty_like(shards[0])
    ProcessGroup().sum_in_order(nodes, len(shards), out)
    return out


def test_a_process_alone():
    group = ProcessGroup()
    assert (group.rank, group.size) == (0, 1)
    assert list(group.own_shards(3)) == [0, 1, 2]
    assert group.add_up([2, 0]) == [2, 0]
    rows = {2: torch.tensor([1, 2]), 0: torch.tensor([0.1, math.inf])}
    table = group.gather(rows, 4, 2)
    assert table.dtype == torch.float64
    assert table.tolist() == [[torch.tensor(0.1).item(), math.inf], [0, 0], [1, 2], [0, 0]]


SHARDS = 7


class Pair:
    """A backend of which this process is rank 0 of 2."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 2

    def allreduce(self, *values: Any) -> None:
        raise AssertionError("a collective has begun")


def test_a_worker_that_was_expelled_begins_no_collective():
    with pytest.raises(PeerLost):
        ProcessGroup(Pair(), lambda: True).all_reduce(torch.ones(1))


def shard(number: int) -> torch.Tensor:
    """Of very different magnitudes, so that every other way of adding shows."""
    drawn = torch.randn(1001, generator=torch.Generator().manual_seed(number))
    return drawn * 10.0 ** (number - 3)


def own_nodes(group: ProcessGroup, count: int, scale: float = 1.0) -> dict[Node, torch.Tensor]:
    """The sums of this rank's shards; the last shard of all is multiplied by `scale`."""
    nodes: dict[Node, torch.Tensor] = {}
    for n in group.own_shards(count):
        add_node(nodes, (0, n), shard(n) * (scale if n == count - 1 else 1), count, torch.Tensor.add_)
    return nodes


def sums() -> dict[str, Any]:
    """What one rank sees. More ranks than shards are left with none, and still take part."""
    group = ProcessGroup()
    seen: dict[str, Any] = {"mine": list(group.own_shards(SHARDS))}
    for count in range(1, SHARDS + 1):
        out = torch.empty(1001)
        group.sum_in_order(own_nodes(group, count), count, out)
        seen[f"in order, {count} shards"] = bits(out)
    group.sum_in_any_order(own_nodes(group, SHARDS), out)
    seen["in any order"] = out.tolist()
    seen["gather"] = group.gather({n: shard(n)[:3] for n in seen["mine"]}, SHARDS + 1, 3).tolist()
    seen["add up"] = group.add_up([1, group.rank, 0])
    for poison in (math.nan, math.inf):
        # on every rank, also on those whose own shards are well
        group.sum_in_order(own_nodes(group, SHARDS, poison), SHARDS, out)
        assert not out.isfinite().any()
    return seen


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_agree_with_one_process_to_the_bit(size, tmp_path):
    alone = sums()
    seen = in_world(size, tmp_path / "world", sums)
    assert sorted(n for rank in seen for n in rank["mine"]) == list(range(SHARDS))
    for rank in seen:
        for name in alone.keys() - {"mine", "add up", "in any order"}:
            assert rank[name] == alone[name], name
        assert rank["add up"] == [size, sum(range(size)), 0]
        assert rank["in any order"] == pytest.approx(alone["in any order"], rel=1e-4, abs=1e-2)
