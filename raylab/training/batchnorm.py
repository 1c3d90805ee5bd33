"""Batch-norm statistics that do not depend on which rank saw which samples."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from raylab.data.samples import Samples
from raylab.training.process_group import ProcessGroup

REESTIMATE = 1024  # rows at most: means of so many are settled
CHUNK = 32


class ShardStatistics:
    """Batch-norm running averages that do not depend on which rank saw which shard.

    During a step every shard normalises by its own batch and its statistics are taken down (`row`); afterwards the
    running averages are updated as if the shards had come one after the other in shard order (`fold`).
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = nn.modules.batchnorm._BatchNorm
        self.layers = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        self.width = sum(2 * m.num_features for m in self.layers)

    @contextmanager
    def per_shard(self) -> Iterator[None]:
        """While open, a layer's running averages are the statistics of its last batch alone (momentum 1)."""
        kept = [
            ([t.clone() for t in m.buffers()], m.momentum)  # the count of batches too: `fold` counts all ranks' shards
            for m in self.layers
        ]
        for layer in self.layers:
            layer.momentum = 1.0
        try:
            yield
        finally:
            for layer, (before, momentum) in zip(self.layers, kept, strict=True):
                for buffer, value in zip(layer.buffers(), before, strict=True):
                    buffer.copy_(value)
                layer.momentum = momentum

    def row(self) -> list[Tensor]:
        """S values float64, on the layers' device: mean [features] and unbiased variance [features] of every layer, of
        the shard just computed."""
        return [t.detach().double() for m in self.layers for t in (m.running_mean, m.running_var)]  # type: ignore[union-attr]

    def fold(self, rows: Tensor) -> None:
        """Update the running averages with rows [shards, S], in that order. Layers in eval mode stay as they are."""
        at = 0
        for layer in self.layers:
            n = layer.num_features
            mean, var = rows[:, at : at + n], rows[:, at + n : at + 2 * n]
            at += 2 * n
            if not layer.training:
                continue
            momentum = 0.1 if layer.momentum is None else layer.momentum
            for shard in range(len(rows)):
                layer.running_mean.lerp_(mean[shard].to(layer.running_mean), momentum)  # type: ignore[union-attr]
                layer.running_var.lerp_(var[shard].to(layer.running_var), momentum)  # type: ignore[union-attr]
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked += len(rows)


@torch.no_grad()
def reestimate(model: nn.Module, samples: Samples, group: ProcessGroup, seed: int, device: str) -> None:
    """Make the running averages those of `samples`, the target's training inputs, without a look at labels.

    Up to REESTIMATE rows, drawn by `seed`, go through the network in chunks; batch norm alone is in train mode. A
    layer's mean and variance are those over all rows: mean of the chunks' means, and mean of their variances plus
    variance of their means. Collective: each rank computes some of the chunks, and all ranks end with the same bits.
    """
    statistics = ShardStatistics(model)
    if not statistics.layers:
        return
    chosen = np.random.Generator(np.random.Philox(key=[seed, 1 << 40])).permutation(len(samples))[:REESTIMATE]
    chunks = np.array_split(chosen, max(1, len(chosen) // CHUNK))
    was = model.training
    model.eval()
    for layer in statistics.layers:
        layer.train()
    rows = {}
    try:
        with statistics.per_shard():
            for chunk in group.own_shards(len(chunks)):
                model(samples.batch(chunks[chunk]).to(device))
                rows[chunk] = torch.cat(statistics.row())
        table = group.gather(rows, len(chunks), statistics.width)  # [chunks, S]
    finally:
        model.train(was)
    at = 0
    for layer in statistics.layers:
        n = layer.num_features
        mean, var = table[:, at : at + n], table[:, at + n : at + 2 * n]
        at += 2 * n
        layer.running_mean.copy_(mean.mean(0))  # type: ignore[union-attr]
        layer.running_var.copy_(var.mean(0) + mean.var(0, unbiased=False))  # type: ignore[union-attr]
