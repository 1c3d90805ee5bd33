"""Whose rows a run trains on: its batches, and the sums over shards and rows from which its steps and scores follow."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from raylab.config.recipe import Recipe
from raylab.data.samples import Samples
from raylab.tasks.base import Task
from raylab.training.imbalance import Batches, offsets, sampler
from raylab.training.predict import validate
from raylab.training.process_group import ProcessGroup
from raylab.training.shard_tree import Node, add_node


class ShardSums(ABC):
    """The sums of one step over its shards, to which this process adds those that it has computed."""

    @abstractmethod
    def add(self, shard: int, gradient: Tensor, row: Tensor) -> None:
        """Add the gradient [P] of a shard, which may change it, and its `row` [1 + S]: the sum of its samples' losses
        and its batch-norm statistics."""

    @abstractmethod
    def complete(self, gradient: Tensor) -> Tensor:
        """Write the gradient over all shards to `gradient` [P]. Returns rows, float64 [shards, 1 + S], whose first
        column adds up to the losses of all samples; the others are the batch-norm statistics of each shard, or in every
        row their mean over all. A collective."""


class Scope(ABC):
    """What a run trains on.

    batches         the rows of each step, as indices of the training samples that are here
    rows_per_epoch  how many rows an epoch has
    offset          what the loss adds to the logits [outputs], or None
    """

    batches: Batches
    rows_per_epoch: int
    offset: Tensor | None
    repeats_bits: bool = True
    """whether the gradient of a shard must have the same bits wherever and whenever it is computed"""

    @abstractmethod
    def own_shards(self, group: ProcessGroup, step: int, count: int) -> range:
        """Return which of the `count` shards of a step this process computes."""

    @abstractmethod
    def start_sums(self, group: ProcessGroup, step: int, shards: list[int], width: int) -> ShardSums:
        """Return the empty sums of `step`, whose `shards` have so many rows each; `width` is 1 + S."""

    def is_average_due(self, step: int) -> bool:
        """Whether the weights are averaged after `step` steps, because others have taken steps of their own."""
        return False

    def average(self, step: int, tensors: list[Tensor]) -> tuple[str, ...]:
        """Replace the values of `tensors` after `step` steps by their average over all who train the run, integers by
        the rounded one, and return the names of those; none where nobody else does. Changes nothing if it raises. A
        collective."""
        return ()

    @abstractmethod
    def validate(self, model: nn.Module, group: ProcessGroup, epoch: int) -> dict[str, float]:
        """Return the loss and the point scores of all validation rows at the end of `epoch` (from 0). A collective."""


class LocalShardSums(ShardSums):
    """Sums over the ranks of a group."""

    def __init__(self, group: ProcessGroup, count: int, width: int, is_exact: bool) -> None:
        self.group, self.count, self.width, self.is_exact = group, count, width, is_exact
        self.rows: dict[int, Tensor] = {}
        self.nodes: dict[Node, Tensor] = {}

    def add(self, shard: int, gradient: Tensor, row: Tensor) -> None:
        add_node(self.nodes, (0, shard), gradient, self.count, Tensor.add_)
        self.rows[shard] = row

    def complete(self, gradient: Tensor) -> Tensor:
        gather = self.group.start_gather(self.rows, self.count, self.width, str(gradient.device))
        if self.is_exact:
            self.group.sum_in_order(self.nodes, self.count, gradient)
        else:
            self.group.sum_in_any_order(self.nodes, gradient)
        return gather()


class LocalScope(Scope):
    """All rows are here: every rank of a group reads them, and computes some of the shards."""

    def __init__(self, recipe: Recipe, task: Task, train: Samples, val: Samples, device: str) -> None:
        self.recipe, self.task, self.val, self.device = recipe, task, val, device
        self.batches = sampler(recipe, train)
        self.rows_per_epoch = len(train)
        self.offset = offsets(recipe, train, device)
        reduction = recipe.loop.gradient_reduction
        self.is_exact = reduction == "exact" or (reduction == "auto" and torch.device(device).type == "cpu")

    def own_shards(self, group: ProcessGroup, step: int, count: int) -> range:
        return group.own_shards(count)

    def start_sums(self, group: ProcessGroup, step: int, shards: list[int], width: int) -> ShardSums:
        return LocalShardSums(group, len(shards), width, self.is_exact)

    def validate(self, model: nn.Module, group: ProcessGroup, epoch: int) -> dict[str, float]:
        return validate(self.task, model, self.val, group, self.recipe, self.device)
