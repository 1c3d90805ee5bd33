"""The processes of one run, and sums over shards that do not depend on the number of processes."""

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
        """Return the shards of `rank` (default: this rank) out of `count`: contiguous, and as even as possible."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def gather(self, rows: dict[int, Tensor], count: int, width: int, device: str = "cpu") -> Tensor:
        """Gather the rows of all shards in shard order, float64 [count, width] on `device`; missing shards are zero.

        Each row comes from one rank and the others add zero, so the sum is bitwise equal to the row.
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
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def sum_in_order(self, nodes: dict[Node, Tensor], count: int, out: Tensor) -> None:
        """Write the sum of all `count` shards' vectors [P] to `out`, bitwise identical for any placement of the shards.

        `nodes` are the sums of this rank's shards (shard_tree.py). Each rank receives one part of every node's vector,
        sums it, and sends the sum to all ranks.
        """
        rank_nodes = [nodes_of(self.own_shards(count, rank), count) for rank in range(self.size)]
        if sum(map(len, rank_nodes)) <= 2:  # a + b does not depend on the order
            self.sum_in_any_order(nodes, out)
            return
        part = -(-out.numel() // self.size)
        padded = [torch.nn.functional.pad(node, (0, part * self.size - len(node))) for node in nodes.values()]
        sent = torch.stack([node.view(self.size, part) for node in padded], 1) if padded else out[:0]
        received = out.new_empty(sum(map(len, rank_nodes)), part)
        counts = [len(each) * part for each in rank_nodes]
        dist.all_to_all_single(received.view(-1), sent.reshape(-1), counts, [len(nodes) * part] * self.size)
        parts: dict[Node, Tensor] = {}
        for node, values in zip([node for each in rank_nodes for node in each], received, strict=True):
            add_node(parts, node, values, count, Tensor.add_)
        total = out.new_empty(self.size * part)
        dist.all_gather_into_tensor(total, parts[root(count)])
        out.copy_(total[: len(out)])

    def sum_in_any_order(self, nodes: dict[Node, Tensor], out: Tensor) -> None:
        """Write the same sum to `out`; with more than two workers it is equal only up to rounding."""
        out.zero_()
        for values in nodes.values():
            out += values
        if self.size > 1:
            dist.all_reduce(out)
