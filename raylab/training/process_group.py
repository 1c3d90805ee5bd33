"""The processes that share one run, and sums over shards that do not depend on how many there are."""

import torch
import torch.distributed as dist
from torch import Tensor

from raylab.training.shard_tree import Node, add_node, nodes_of, root


class ProcessGroup:
    """This process alone, or all ranks of the initialised torch.distributed group.

    Every method that takes values is a collective: all ranks call it in the same order.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if distributed else 0
        self.size: int = dist.get_world_size() if distributed else 1

    def own_shards(self, count: int, rank: int | None = None) -> range:
        """The shards of `rank`, else of this rank, out of `count`: neighbours, as even as possible."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def gather(self, rows: dict[int, Tensor], count: int, width: int, device: str = "cpu") -> Tensor:
        """Rows of all shards in shard order, float64 [count, width] on `device`; a shard that nobody has is zero.

        Each row comes from one rank and the others add zero, so the sum is the row itself, to the bit.
        """
        table = torch.zeros(count, width, dtype=torch.float64, device=device)
        for shard, row in rows.items():
            table[shard] = row.to(device, torch.float64)
        if self.size > 1:
            dist.all_reduce(table)
        return table

    def any(self, flag: bool) -> bool:
        if self.size == 1:
            return flag
        seen = torch.tensor([int(flag)])
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

    def sum_in_order(self, nodes: dict[Node, Tensor], count: int, out: Tensor) -> None:
        """Put the sum of all `count` shards' vectors [P] into `out`: for any placement of the shards the same bits.

        `nodes` are the sums of this rank's shards (shard_tree.py). Each rank adds up one part of the vectors, for which
        it gets that part of every node, and hands it to all.
        """
        held = [nodes_of(self.own_shards(count, rank), count) for rank in range(self.size)]
        if sum(map(len, held)) <= 2:  # a + b, in whatever order
            self.sum_in_any_order(nodes, out)
            return
        part = -(-out.numel() // self.size)
        padded = [torch.nn.functional.pad(node, (0, part * self.size - len(node))) for node in nodes.values()]
        sent = torch.stack([node.view(self.size, part) for node in padded], 1) if padded else out[:0]
        got = out.new_empty(sum(map(len, held)), part)
        dist.all_to_all_single(
            got.view(-1), sent.reshape(-1), [len(each) * part for each in held], [len(nodes) * part] * self.size
        )
        parts: dict[Node, Tensor] = {}
        for node, values in zip([node for each in held for node in each], got, strict=True):
            add_node(parts, node, values, count, Tensor.add_)
        total = out.new_empty(self.size * part)
        dist.all_gather_into_tensor(total, parts[root(count)])
        out.copy_(total[: len(out)])

    def sum_in_any_order(self, nodes: dict[Node, Tensor], out: Tensor) -> None:
        """The same, equal to rounding error only where there are more than two workers."""
        out.zero_()
        for values in nodes.values():
            out += values
        if self.size > 1:
            dist.all_reduce(out)
