"""Dropout that samples its mask faster on a CPU."""

import torch
from torch import Tensor, nn

from raylab.models.shard_pass import current_pass


class Dropout(nn.Dropout):
    """torch.nn.Dropout with its mask from uniform numbers, which takes torch a quarter of the time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or self.p == 0:
            return super().forward(x)
        shards = current_pass()
        numbers = torch.rand_like(x) if shards is None else shards.sample_uniform(x)
        return x * numbers.ge_(self.p).mul_(1 / (1 - self.p))
