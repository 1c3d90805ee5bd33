"""The processes that share one run, and sums over shards that do not depend on how many there are."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1 << 18  # elements converted at a time: the float64 copy of one chunk stays in cache


class ProcessGroup:
    """This process alone, or all ranks of the initialised torch.distributed group.

    Shard i is computed by rank i mod size. Every method is a collective: all ranks call it in the same order.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if distributed else 0
        self.size: int = dist.get_world_size() if distributed else 1

    def own_shards(self, shards: int) -> range:
        return range(self.rank, shards, self.size)

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
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        exponent = 62 - torch.frexp(largest).exponent.long() - math.ceil(math.log2(max(count, 2)))
        scale, back = _power_of_two(exponent), _power_of_two(-exponent)
        total = torch.zeros(like.numel(), dtype=torch.int64, device=like.device)
        for vector in shards:
            for at in range(0, vector.numel(), CHUNK):
                total[at : at + CHUNK] += vector[at : at + CHUNK].double().mul_(scale).round_().long()
        if self.size > 1:
            dist.all_reduce(total)
        return total.double().mul_(torch.where(largest.isfinite(), back, math.nan)).to(like)

    def sum_float(self, shards: list[Tensor], like: Tensor) -> Tensor:
        """Sum of all shards' vectors in their own type: fast on a GPU, equal to rounding error only."""
        total = torch.zeros_like(like)
        for vector in shards:
            total += vector
        if self.size > 1:
            dist.all_reduce(total)
        return total


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to an int64 scalar of -1022 to 1023, float64, made of its bits: `pow` of a GPU need not be exact."""
    return ((exponent + 1023) << 52).view(torch.float64)
