"""The processes that share one run, and sums over shards that do not depend on how many there are."""

import math
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 18  # elements converted at a time: the float64 copy of one chunk stays in cache
LOOK = timedelta(milliseconds=20)  # how long a wait for the others lasts before it looks whether the group still stands


class PeerLost(Exception):
    """Raised where a collective did not complete: a member is gone, and this group is of no more use."""


class ProcessGroup:
    """This process alone, all ranks of the initialised torch.distributed group, or those of `backend`.

    Shard i is computed by rank i mod size. Every method is a collective: all ranks call it in the same order. Raises
    PeerLost when one of them is gone; `is_broken` says that it is where this process cannot see it: of five ranks only
    the neighbours of one that was killed get an error.
    """

    def __init__(self, backend: Any = None, is_broken: Callable[[], bool] = lambda: False) -> None:
        if backend is None and dist.is_available() and dist.is_initialized():
            backend = dist.group.WORLD
        self.backend, self.is_broken = backend, is_broken
        self.rank: int = 0 if backend is None else backend.rank()
        self.size: int = 1 if backend is None else backend.size()

    def own_shards(self, shards: int) -> range:
        return range(self.rank, shards, self.size)

    def gather(self, rows: dict[int, Tensor], count: int, width: int, device: str = "cpu") -> Tensor:
        """Rows of all shards in shard order, float64 [count, width] on `device`; a shard that nobody has is zero.

        Each row comes from one rank and the others add zero, so the sum is the row itself, to the bit.
        """
        table = torch.zeros(count, width, dtype=torch.float64, device=device)
        for shard, row in rows.items():
            table[shard] = row.to(device, torch.float64)
        self.all_reduce(table)
        return table

    def add_up(self, numbers: list[int]) -> list[int]:
        """The sums over all ranks of whole numbers that each rank has."""
        if self.size == 1:
            return numbers
        totals = torch.tensor(numbers)
        self.all_reduce(totals)
        return [int(total) for total in totals]

    def all_reduce(self, tensor: Tensor, operation: Any = dist.ReduceOp.SUM) -> None:
        """Replace `tensor` by its sum, or another reduction, over all ranks."""
        if self.size > 1:
            options = dist.AllreduceOptions()
            options.reduceOp = operation
            self._complete(lambda: self.backend.allreduce([tensor], options), tensor)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replace `tensor` by that of rank `source`."""
        if self.size > 1:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = source, 0
            self._complete(lambda: self.backend.broadcast([tensor], options), tensor)

    def _complete(self, start: Callable[[], Any], tensor: Tensor) -> None:
        """Start a collective on `tensor` and wait for it; on a GPU, whose queue it joins, the host does not wait.

        Gloo has no way to end one that hangs. Its thread keeps to the tensor, which nobody may use after PeerLost.
        """
        try:
            work = start()
            if tensor.device.type == "cpu":
                while not work.is_completed():
                    if self.is_broken():
                        raise PeerLost("another member has noticed that this group is broken")
                    with suppress(RuntimeError):  # it is not complete yet, or failed: `wait` below tells which
                        work.wait(LOOK)
            work.wait()
        except RuntimeError as error:
            raise PeerLost(str(error)) from error

    def sum_exact(self, shards: list[Tensor], count: int, like: Tensor) -> Tensor:
        """Sum of all `count` shards' float32 [P] vectors, the same to the bit for any placement of the shards.

        `shards` are those of this rank, `like` any vector [P] on their device. Each is multiplied by one power of two
        (exact), rounded to int64 and added as integers, whose addition does not depend on order. The exponent comes
        from the largest magnitude of all, so that the sum of `count` shards stays under 2^62: the resolution is
        2^-60 of the largest element times the number of shards, far below float32's own. Fixed-point summation as
        in Demmel and Nguyen, "Parallel reproducible summation", IEEE Trans. Computers 64 (2015), with one bin.

        All is done on that device, the host reads nothing. When any element of any shard is infinite or not a number,
        every element of the sum is not a number.
        """
        # by tensor, because Python's max() overlooks a NaN that is not first
        top = torch.stack([torch.zeros((), device=like.device), *(g.abs().max().float() for g in shards)])
        # MAX over ranks drops NaN on some backends: make it infinite, which wins everywhere
        largest = top.max().double().nan_to_num_(nan=math.inf, posinf=math.inf)
        self.all_reduce(largest, dist.ReduceOp.MAX)
        exponent = 62 - torch.frexp(largest).exponent.long() - math.ceil(math.log2(max(count, 2)))
        scale, back = _power_of_two(exponent), _power_of_two(-exponent)
        total = torch.zeros(like.numel(), dtype=torch.int64, device=like.device)
        for vector in shards:
            for at in range(0, vector.numel(), CHUNK):
                total[at : at + CHUNK] += vector[at : at + CHUNK].double().mul_(scale).round_().long()
        self.all_reduce(total)
        return total.double().mul_(torch.where(largest.isfinite(), back, math.nan)).to(like)

    def sum_float(self, shards: list[Tensor], like: Tensor) -> Tensor:
        """Sum of all shards' vectors in their own type: fast on a GPU, equal to rounding error only."""
        total = torch.zeros_like(like)
        for vector in shards:
            total += vector
        self.all_reduce(total)
        return total


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to an int64 scalar of -1022 to 1023, float64, made of its bits: `pow` of a GPU need not be exact."""
    return ((exponent + 1023) << 52).view(torch.float64)
