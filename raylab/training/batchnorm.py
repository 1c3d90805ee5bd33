"""Batch-norm statistics that do not depend on which rank saw which samples."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.recipe import Recipe
from raylab.data.sampler import last_batch, smallest_shard, steps_per_epoch
from raylab.data.samples import Samples
from raylab.errors import UsageError
from raylab.training.finetune import FinetuneSchedule
from raylab.training.process_group import ProcessGroup

REESTIMATE = 1024  # maximum rows; means over that many are stable
CHUNK = 32


class ShardStatistics:
    """Batch-norm running averages that do not depend on which rank saw which shard.

    During a step every shard is normalised by its own batch statistics, which `row` returns; afterwards `fold` updates
    the running averages as if the shards had been processed one after the other, in shard order.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = nn.modules.batchnorm._BatchNorm
        self.layers = [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]
        self.width = sum(2 * m.num_features for m in self.layers)
        # Lists, because on a GPU one call for all layers takes as long as one for each layer
        self.averages: list[Tensor] = [t for m in self.layers for t in (m.running_mean, m.running_var)]  # type: ignore[misc]
        self.sizes = [len(average) for average in self.averages]
        self.counts = [m.num_batches_tracked for m in self.layers if m.num_batches_tracked is not None]

    @contextmanager
    def per_shard(self) -> Iterator[None]:
        """Inside this context, a layer's running averages are the statistics of its last batch (momentum 1)."""
        momenta = [layer.momentum for layer in self.layers]
        # also the batch counts, because `fold` counts the shards of all ranks
        kept: list[tuple[list[Tensor], tuple[Tensor, ...]]] = []
        if self.averages:
            kept.append((self.averages, torch.split(torch.cat(self.averages), self.sizes)))
        if self.counts:
            kept.append((self.counts, torch.unbind(torch.stack(self.counts))))
        for layer in self.layers:
            layer.momentum = 1.0
        try:
            yield
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum
            for tensors, before in kept:
                torch._foreach_copy_(tensors, before)

    def row(self) -> list[Tensor]:
        """Return the statistics of the last shard: mean [features] and unbiased variance [features] of every layer, S
        float64 values in total, on the layers' device."""
        return [torch.cat(self.averages).double()] if self.layers else []

    @torch.no_grad()
    def fold(self, rows: Tensor) -> None:
        """Update the running averages with rows [shards, S], in shard order; layers in eval mode do not change."""
        learning = [layer for layer in self.layers if layer.training]
        if not learning:
            return
        learns = [layer.training for layer in self.layers for _ in range(2)]
        averages = list(itertools.compress(self.averages, learns))
        momenta = [0.1 if layer.momentum is None else layer.momentum for layer in learning for _ in range(2)]
        for row in rows.to(averages[0].dtype):
            parts = torch.split(row, self.sizes)
            torch._foreach_lerp_(averages, list(itertools.compress(parts, learns)), momenta)
        counts = [layer.num_batches_tracked for layer in learning if layer.num_batches_tracked is not None]
        if counts:
            torch._foreach_add_(counts, len(rows))


@torch.no_grad()
def check_smallest_shard(recipe: Recipe, model: nn.Module, samples: Samples, transferred: bool) -> None:
    """Raise UsageError if training `model` would fail at a shard of one row, because a batch norm then has one value
    per channel. The network computes one row as in the last step, so it cannot be used for training any more.
    """
    batch, shards = recipe.loop.global_batch_size, recipe.loop.shards
    if smallest_shard(len(samples), batch, shards) > 1:
        return
    schedule = FinetuneSchedule(recipe, model, steps_per_epoch(len(samples), batch), transferred)
    schedule.prepare_step(model, schedule.planned - 1)  # of no step do more layers learn
    try:
        model(samples.batch(np.zeros(1, dtype=np.int64)))
    except ValueError as error:
        if not is_too_few_values(error):
            raise
        last = last_batch(len(samples), batch)
        raise UsageError(
            "a shard of one sample is too small for the batch norm of this network",
            f"the last of {len(samples)} samples in batches of {batch} are {last}, cut into {shards} shard(s)",
            f"set {advise_batches(len(samples), batch, shards)}, or use larger images",
        ) from error


def is_too_few_values(error: ValueError) -> bool:
    """Whether batch norm has raised `error`, for a single row with a map of one pixel."""
    return "more than 1 value per channel" in str(error)


def advise_batches(samples: int, batch: int, shards: int) -> str:
    """Settings with which every shard has two rows or more: the nearest batch, and as many shards as possible."""
    choices = []
    fitting = [size for size in range(1, samples + 1) if smallest_shard(samples, size, shards) > 1]
    if fitting:
        choices.append(f"loop.global_batch_size={min(fitting, key=lambda size: abs(size - batch))}")
    if (most := last_batch(samples, batch) // 2) > 0:
        choices.append(f"loop.shards={most}")
    return " or ".join(choices)


@torch.no_grad()
def reestimate(model: nn.Module, samples: Samples, group: ProcessGroup, seed: int, device: str) -> None:
    """Re-estimate the running averages on `samples`, the training inputs of the target data; labels are not used.

    Up to REESTIMATE rows, sampled with `seed`, pass through the network in chunks; only batch norm is in train mode.
    Each layer gets the mean and variance over all rows: the mean of the chunk means, and the mean of the chunk
    variances plus the variance of the chunk means. Collective: each rank computes some of the chunks, and all ranks
    get bitwise identical results.
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
