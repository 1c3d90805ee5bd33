"""The processes of one run, and sums over shards that do not depend on the number of processes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylab.training.shard_tree import Node, add_node, nodes_of, root

LOOK = timedelta(milliseconds=20)  # how long a wait for the others lasts before it looks whether the group still stands


class PeerLost(Exception):
    """Raised where a collective did not complete: a member is gone, and this group is of no more use."""


class ProcessGroup:
    """This process alone, all ranks of the initialised torch.distributed group, or those of `backend`.

    Every method that takes values is a collective: all ranks call it in the same order. Raises PeerLost when one of
    them is gone; `is_broken` says that it is where this process cannot see it: of five ranks only the neighbours of one
    that was killed get an error.
    """

    def __init__(self, backend: Any = None, is_broken: Callable[[], bool] = lambda: False) -> None:
        if backend is None and dist.is_available() and dist.is_initialized():
            backend = dist.group.WORLD
        self.backend, self.is_broken = backend, is_broken
        self.rank: int = 0 if backend is None else backend.rank()
        self.size: int = 1 if backend is None else backend.size()
        self.seconds = 0.0  # that this process has spent in collectives, waiting for others included

    def own_shards(self, count: int, rank: int | None = None) -> range:
        """Return the shards of `rank` (default: this rank) out of `count`: contiguous, and as even as possible."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.size, (rank + 1) * count // self.size)

    def gather(self, rows: dict[int, Tensor], count: int, width: int, device: str = "cpu") -> Tensor:
        """Gather the rows of all shards in shard order, float64 [count, width] on `device`; missing shards are zero."""
        return self.start_gather(rows, count, width, device)()

    def start_gather(
        self, rows: dict[int, Tensor], count: int, width: int, device: str = "cpu"
    ) -> Callable[[], Tensor]:
        """Start `gather`, so that other collectives can run beside it. Returns the function that waits for the table.

        Each row comes from one rank and the others add zero, so the sum is bitwise equal to the row.
        """
        table = torch.zeros(count, width, dtype=torch.float64, device=device)
        for shard, row in rows.items():
            table[shard] = row.to(device, torch.float64)
        wait = self.start_all_reduce(table)

        def complete() -> Tensor:
            wait()
            return table

        return complete

    def add_up(self, numbers: list[int]) -> list[int]:
        """The sums over all ranks of whole numbers that each rank has."""
        return self.start_add_up(numbers)()

    def start_add_up(self, numbers: list[int]) -> Callable[[], list[int]]:
        """Start `add_up`. Returns the function that waits for the sums."""
        totals = torch.tensor(numbers)
        wait = self.start_all_reduce(totals)

        def complete() -> list[int]:
            wait()
            return [int(total) for total in totals]

        return complete

    def all_reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Replace `tensor` by its sum, or another reduction, over all ranks."""
        self.start_all_reduce(tensor, operation)()

    def start_all_reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> Callable[[], None]:
        """Start `all_reduce`. Returns the function that waits for its end."""
        if self.size == 1:
            return lambda: None
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        return self._start(lambda: self.backend.allreduce([tensor], options), tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by that of rank `source`."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self._complete(lambda: self.backend.broadcast([tensor], options), tensor)

    def share(self, content: bytes, source: int) -> bytes:
        """The `content` of rank `source`, on every rank."""
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
        size = torch.tensor([len(content)])
        self.broadcast(size, source)
        if self.rank != source:
            tensor = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(tensor, source)
        return tensor.numpy().tobytes()

    def all_to_all(self, out: Tensor, out_parts: list[int], sent: Tensor, sent_part: int) -> None:
        """Put what every rank sends to this one into `out`, `out_parts[r]` elements of rank r; `sent` has `sent_part`
        elements for each rank."""
        parts, options = [sent_part] * self.size, dist.AllToAllOptions()
        self._complete(lambda: self.backend.alltoall_base(out, sent, out_parts, parts, options), out)

    def all_gather(self, out: Tensor, part: Tensor) -> None:
        """Put the `part` of every rank, all of one length, into `out`, rank by rank."""
        self._complete(lambda: self.backend._allgather_base(out, part), out)

    def _complete(self, start: Callable[[], Any], tensor: Tensor) -> None:
        self._start(start, tensor)()

    def _start(self, start: Callable[[], Any], tensor: Tensor) -> Callable[[], None]:
        """Start a collective on `tensor`. Returns the function that waits for its end; on a GPU, whose queue it joins,
        the host does not wait.

        Gloo has no way to end one that hangs. Its thread keeps to the tensor, which nobody may use after PeerLost.
        """
        if self.is_broken():
            raise PeerLost("this group has ended")
        with self._timed():
            work = start()

        def wait() -> None:
            with self._timed():
                if tensor.device.type == "cpu":
                    while not work.is_completed():
                        if self.is_broken():
                            raise PeerLost("another member has noticed that this group is broken")
                        with suppress(RuntimeError):  # it is not complete yet, or failed: `wait` below tells which
                            work.wait(LOOK)
                work.wait()

        return wait

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time of the block to `seconds`; an error of torch in it is raised as PeerLost."""
        began = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            raise PeerLost(str(error)) from error
        finally:
            self.seconds += time.perf_counter() - began

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
        sent = torch.stack([node.view(self.size, part) for node in padded], 1) if padded else out.new_empty(0)
        received = out.new_empty(sum(map(len, rank_nodes)), part)
        counts = [len(each) * part for each in rank_nodes]
        self.all_to_all(received.view(-1), counts, sent.reshape(-1), len(nodes) * part)
        parts: dict[Node, Tensor] = {}
        for node, values in zip([node for each in rank_nodes for node in each], received, strict=True):
            add_node(parts, node, values, count, Tensor.add_)
        total = out.new_empty(self.size * part)
        self.all_gather(total, parts[root(count)])
        out.copy_(total[: len(out)])

    def sum_in_any_order(self, nodes: dict[Node, Tensor], out: Tensor) -> None:
        """Write the same sum to `out`; with more than two workers it is equal only up to rounding."""
        if self.size == 1:
            (total,) = nodes.values()
        else:  # in new memory: after PeerLost, a thread of gloo may still write to what it adds up
            total = torch.zeros_like(out)
            for values in nodes.values():
                total += values
            self.all_reduce(total)
        out.copy_(total)
