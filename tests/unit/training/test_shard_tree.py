"""Sums over shards in one order: on any number of ranks the same additions; and 256 ranks that share a batch."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from raylab.data.sampler import shards_of
from raylab.training.process_group import ProcessGroup
from raylab.training.shard_tree import Node, add_node, nodes_of, root


def in_brackets(left: str, right: str) -> str:
    return f"({left} {right})"


def whole_sum(count: int) -> str:
    nodes: dict[Node, str] = {}
    for shard in range(count):
        add_node(nodes, (0, shard), str(shard), count, in_brackets)
    assert list(nodes) == [root(count)]
    return nodes[root(count)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, "0"),
        (2, "(0 1)"),
        (3, "((0 1) 2)"),
        (5, "(((0 1) (2 3)) 4)"),
        (7, "(((0 1) (2 3)) ((4 5) 6))"),
        (8, "(((0 1) (2 3)) ((4 5) (6 7)))"),
    ],
)
def test_neighbours_are_added_first(count, expected):
    assert whole_sum(count) == expected


@given(st.integers(1, 40), st.data())
def test_any_placement_leads_to_the_same_additions(count, data):
    """Also where a rank's shards are no neighbours, and whatever the order in which ranks hand in their sums."""
    ranks = data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    handed: list[tuple[Node, frozenset[int]]] = []
    for rank in set(ranks):
        own: dict[Node, frozenset[int]] = {}
        shards = [shard for shard in range(count) if ranks[shard] == rank]
        for shard in shards:
            add_node(own, (0, shard), frozenset([shard]), count, frozenset.union)
        assert list(own) == nodes_of(shards, count)
        handed += own.items()
    additions: set[tuple[frozenset[int], frozenset[int]]] = set()

    def add(left: frozenset[int], right: frozenset[int]) -> frozenset[int]:
        additions.add((left, right))
        return left | right

    nodes: dict[Node, frozenset[int]] = {}
    for node, shards in data.draw(st.permutations(handed)):
        add_node(nodes, node, shards, count, add)
    assert nodes == {root(count): frozenset(range(count))}
    for left, right in additions:
        low, high = sorted([left, right], key=min)
        size = 1 << (len(low) - 1).bit_length()
        assert len(low) == size and min(low) % (2 * size) == 0 and min(high) == min(low) + size


class Done:
    """A collective that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Memory:
    """What ProcessGroup needs of a backend, between threads: each is a rank, and all really exchange."""

    def __init__(self, size: int) -> None:
        self.barrier, self.here, self.slots = threading.Barrier(size), threading.local(), [None] * size

    def exchange(self, mine: Any) -> list[Any]:
        self.slots[self.here.rank] = mine
        self.barrier.wait(120)
        seen = list(self.slots)
        self.barrier.wait(120)
        return seen

    def rank(self) -> int:
        return int(self.here.rank)

    def size(self) -> int:
        return len(self.slots)

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions) -> Done:
        assert options.reduceOp == dist.ReduceOp.SUM
        values = tensors[0]
        values.copy_(sum(self.exchange(values.clone())))
        return Done()

    def alltoall_base(
        self, got: torch.Tensor, sent: torch.Tensor, sizes: list[int], parts: list[int], options: dist.AllToAllOptions
    ) -> Done:
        assert got.numel() == sum(sizes) and sent.numel() == sum(parts)
        seen = self.exchange(sent.split(parts))
        for place, parts_of_rank in zip(got.split(sizes), seen, strict=True):
            place.copy_(parts_of_rank[self.here.rank])
        return Done()

    def _allgather_base(self, whole: torch.Tensor, part: torch.Tensor) -> Done:
        whole.copy_(torch.cat(self.exchange(part.clone())))
        return Done()


def share_batch(group: ProcessGroup, step: int, data: torch.Tensor, batch: int, shards: int) -> SimpleNamespace:
    """What one rank sees of a step whose shards' gradients are the sums of their rows of `data`."""
    _, cut = shards_of(step, len(data), batch, shards, seed=3)
    cut = [rows for rows in cut if len(rows) > 0]
    own = list(group.own_shards(len(cut)))
    nodes: dict[Node, torch.Tensor] = {}
    for shard in own:
        add_node(nodes, (0, shard), data[cut[shard]].sum(0), len(cut), torch.Tensor.add_)
    out = torch.empty(data.shape[1])
    group.sum_in_order(nodes, len(cut), out)
    table = group.gather({shard: data[cut[shard], :2].sum(0) for shard in own}, len(cut), 2)
    rows = np.concatenate([cut[shard] for shard in own]) if own else np.zeros(0, np.int64)
    return SimpleNamespace(own=own, rows=rows, total=out.numpy().tobytes(), table=table.numpy().tobytes())


@pytest.mark.parametrize("shards", [256, 300])
def test_256_ranks_share_a_batch(shards):
    """All samples once, and the bits of one process; also in the last batch, which leaves ranks without a shard."""
    size, batch = 256, 512
    data = torch.randn(2 * batch + 100, 301, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(
        -8, 293
    ).clamp(max=2)
    alone = [share_batch(ProcessGroup(), step, data, batch, shards) for step in (1, 2)]
    memory = Memory(size)
    seen: list[list[SimpleNamespace]] = [[] for _ in range(size)]

    def work(rank: int) -> None:
        memory.here.rank = rank
        group = ProcessGroup(memory)
        seen[rank] = [share_batch(group, step, data, batch, shards) for step in (1, 2)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, whole in enumerate(alone):
        assert sorted(n for rank in seen for n in rank[at].own) == whole.own
        assert sorted(np.concatenate([rank[at].rows for rank in seen])) == sorted(whole.rows)
        assert {rank[at].total for rank in seen} == {whole.total}
        assert {rank[at].table for rank in seen} == {whole.table}
    assert any(not rank[1].own for rank in seen) and all(rank[0].own for rank in seen)
