"""The scope of a run whose rows are divided among sites: the training loop's sums as sums over all sites, or, where the
sites average their weights, its averages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.recipe import Recipe
from raylab.data.sampler import site_rows, steps_per_epoch
from raylab.data.samples import Samples
from raylab.errors import RunError
from raylab.federation import fixed_point
from raylab.federation.agreement import DEFAULT_BOUND, Agreement
from raylab.federation.fixed_point import Integers
from raylab.federation.rounds import Round
from raylab.federation.sums import Sums
from raylab.tasks.base import Task
from raylab.training.gradients import norm_of
from raylab.training.imbalance import Batches, offsets_of
from raylab.training.loop import weights_sha256
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.scope import LocalShardSums, Scope, ShardSums

LARGEST_WEIGHT = 1024.0
LARGEST_LOSS = 1024.0  # mean loss of rows; training has long failed at a larger one
DIVERGED = "their computers computed different bits from the same numbers"


@dataclass(frozen=True)
class Counts:
    """Rows of all sites: of train, of val, and of train by class [classes]."""

    train: int
    val: int
    classes: tuple[int, ...]

    @classmethod
    def of(cls, train: Samples, val: Samples) -> "Counts":
        """Count the rows of one site."""
        classes = np.bincount(train.y, minlength=len(train.spec["classes"]))
        return cls(len(train), len(val), tuple(int(n) for n in classes))

    def to_integers(self) -> Integers:
        return np.array([self.train, self.val, *self.classes], dtype=np.int64)

    @classmethod
    def from_integers(cls, numbers: Integers) -> "Counts":
        train, val, *classes = (int(n) for n in numbers)
        return cls(train, val, tuple(classes))


class PooledSamples:
    """The samples of several sites, one after the other: see Samples. Each site's rows are read as the site reads them.

    `starts`: number of the first row of each site.
    """

    def __init__(self, parts: Mapping[str, Samples]) -> None:
        self.parts = list(parts.values())
        ends = np.cumsum([len(part) for part in self.parts])
        self.starts = {name: int(end) - len(part) for (name, part), end in zip(parts.items(), ends, strict=True)}
        self.spec: dict[str, Any] = self.parts[0].spec
        self.y = np.concatenate([part.y for part in self.parts])
        patients = np.cumsum([0, *(int(part.group.max()) + 1 for part in self.parts)])
        self.group = np.concatenate([part.group + first for part, first in zip(self.parts, patients, strict=False)])
        self.source = np.concatenate([part.source for part in self.parts])
        self.ids = np.concatenate([part.ids for part in self.parts])
        self.augmentation = self.parts[0].augmentation

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> Tensor:
        """See Samples. Augmentation follows each site's own row numbers."""
        starts = np.array(list(self.starts.values()))
        owner = np.searchsorted(starts, index, side="right") - 1
        out: Tensor | None = None
        for number in np.unique(owner):
            here = owner == number
            x = self.parts[number].batch(index[here] - starts[number], augment)
            out = x.new_empty(len(index), *x.shape[1:]) if out is None else out
            out[torch.from_numpy(here)] = x
        if out is None:
            return self.parts[0].batch(index, augment)
        return out


class SiteScope(Scope):
    """The rows of one site, or of all of them in a pooled run, which repeats what the sites do. A step is one of all
    sites: its sums are."""

    def __init__(
        self,
        agreement: Agreement,
        recipe: Recipe,
        task: Task,
        train: Mapping[str, Samples],
        val: Mapping[str, Samples],
        counts: Counts,
        sums: Sums,
    ) -> None:
        self.agreement, self.recipe, self.task, self.val, self.sums = agreement, recipe, task, val, sums
        self.counts = {name: len(samples) for name, samples in train.items()}
        self.starts = PooledSamples(train).starts
        self.per_epoch = steps_per_epoch(counts.train, recipe.loop.global_batch_size)
        self.rows_per_epoch = self.per_epoch * recipe.loop.global_batch_size
        self.batches = Batches(self.per_epoch, self.shards_of)
        self.offset = offsets_of(recipe, np.array(counts.classes) / counts.train, "cpu")
        self.largest_loss_sum = LARGEST_LOSS * max(recipe.loop.global_batch_size, counts.val)
        self.gradient_bound = agreement.gradient_bound or DEFAULT_BOUND
        self.clipped = 0  # shards whose gradient exceeded the agreed bound

    def shards_of(self, step: int) -> tuple[int, list[np.ndarray]]:
        """Return the epoch of `step` and its shards, site by site: row numbers, or -1 for each row of another site."""
        shards: list[np.ndarray] = []
        taking_part = self.sums.sites(Round("step", step))
        for number, site in enumerate(self.agreement.sites):
            if site.site not in taking_part:
                continue
            rows = np.full(site.rows, -1)
            if site.site in self.counts:
                own = site_rows(step, self.counts[site.site], site.rows, self.recipe.seed, number)
                rows = self.starts[site.site] + own
            shards += np.array_split(rows, site.shards)
        return step // self.per_epoch, shards

    def own_shards(self, group: ProcessGroup, step: int, count: int) -> range:
        _, shards = self.shards_of(step)
        own = [number for number, rows in enumerate(shards) if rows[0] >= 0]
        return range(own[0], own[-1] + 1)

    def start_sums(self, group: ProcessGroup, step: int, shards: list[int], width: int) -> ShardSums:
        return FixedPointSums(self, step, shards)

    def validate(self, model: nn.Module, group: ProcessGroup, epoch: int) -> dict[str, float]:
        """Return the loss of all sites' validation rows; RunError if the sites' weights differ. Other scores are not
        sums: `raylab evaluate` computes them at each site."""
        round = Round("validation", (epoch + 1) * self.per_epoch)
        taking_part = self.sums.sites(round)
        loss, rows, sites = np.zeros(1, dtype=np.int64), 0, 0
        for name, samples in self.val.items():
            if name not in taking_part:
                continue
            p = predict(self.task, model, samples, ProcessGroup(), self.recipe, "cpu")
            total = np.array([self.task.outcome.log_loss(samples.y, p) * len(samples)])
            loss = fixed_point.add(loss, fixed_point.encode(total, self.largest_loss_sum, "the validation loss"))
            rows, sites = rows + len(samples), sites + 1
        digest = np.frombuffer(bytes.fromhex(weights_sha256(model)), dtype="<i8").astype(np.int64)
        with np.errstate(over="ignore"):
            values = np.concatenate([loss, [rows], digest * sites])
            total_loss, total_rows, *digests = self.sums.add_up(round, values)
            if not np.array_equal(np.array(digests, dtype=np.int64), digest * len(taking_part)):
                raise RunError(
                    f"the sites' weights differ after {round.number} steps",
                    DIVERGED,
                    "compare the sites' CPUs and libraries; sites that differ cannot train together",
                )
        return {"loss": float(fixed_point.decode(np.array([total_loss]), self.largest_loss_sum)[0]) / int(total_rows)}


class AveragingScope(SiteScope):
    """The rows of one site, which takes steps of its own; now and then the weights of all sites are averaged, each
    weighted with the rows that it has used since, which are agreed (federated averaging, McMahan et al., arXiv
    1602.05629). Each site keeps its AdamW's moments."""

    def __init__(
        self,
        agreement: Agreement,
        recipe: Recipe,
        task: Task,
        train: Mapping[str, Samples],
        val: Mapping[str, Samples],
        counts: Counts,
        sums: Sums,
    ) -> None:
        super().__init__(agreement, recipe, task, train, val, counts, sums)
        ((self.name, self.samples),) = self.counts.items()
        self.site = agreement.find(self.name)
        self.number = agreement.names.index(self.name)
        self.rows_per_epoch = self.per_epoch * self.site.rows

    def shards_of(self, step: int) -> tuple[int, list[np.ndarray]]:
        """Return the epoch of `step` and the shards of this site's rows."""
        rows = site_rows(step, self.samples, self.site.rows, self.recipe.seed, self.number)
        return step // self.per_epoch, np.array_split(rows, self.site.shards)

    def own_shards(self, group: ProcessGroup, step: int, count: int) -> range:
        return range(count)

    def start_sums(self, group: ProcessGroup, step: int, shards: list[int], width: int) -> ShardSums:
        return LocalShardSums(group, len(shards), width, True)

    def is_average_due(self, step: int) -> bool:
        every = self.agreement.local_steps
        return step % self.per_epoch == 0 or (isinstance(every, int) and step % every == 0)

    def average(self, step: int, tensors: list[Tensor]) -> tuple[str, ...]:
        """See Scope. Raises NonFiniteError for a weight that is not finite or beyond LARGEST_WEIGHT."""
        round = Round("average", step)
        taking_part = self.sums.sites(round)
        own = torch.cat([tensor.flatten() for tensor in tensors]).double().numpy()
        what = f"the weights after step {step}"
        fixed_point.check(own, LARGEST_WEIGHT, what)
        rows = sum(self.agreement.find(name).rows for name in taking_part)
        share = fixed_point.encode(own * (self.site.rows / rows), LARGEST_WEIGHT, what)
        total = fixed_point.decode(self.sums.add_up(round, share), LARGEST_WEIGHT)
        parts = torch.split(torch.from_numpy(total), [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return taking_part


class FixedPointSums(ShardSums):
    """The sums of one step: of each shard's gradient, at most as long as the agreed bound, and of its losses."""

    def __init__(self, scope: SiteScope, step: int, shards: list[int]) -> None:
        self.scope, self.step, self.shards, self.count = scope, step, shards, sum(shards)
        self.bound = scope.gradient_bound
        self.gradient: Integers | None = None
        self.loss = np.zeros(1, dtype=np.int64)

    def add(self, shard: int, gradient: Tensor, row: Tensor) -> None:
        """See ShardSums. Raises NonFiniteError for a gradient or a loss that is not finite."""
        values = gradient.double().numpy()
        longest = self.bound * self.shards[shard] / self.count  # the gradient is a part of the mean over all rows
        norm = float(norm_of(gradient))
        if norm > longest:
            values = values * (longest / norm)
            self.scope.clipped += 1
        where = f"step {self.step}"
        integers = fixed_point.encode(values, self.bound, f"{where}, the gradient of a shard")
        self.gradient = integers if self.gradient is None else fixed_point.add(self.gradient, integers)
        loss = fixed_point.encode(row[:1].numpy(), self.scope.largest_loss_sum, f"{where}, the loss of a shard")
        self.loss = fixed_point.add(self.loss, loss)

    def complete(self, gradient: Tensor) -> Tensor:
        own = np.zeros(gradient.numel(), dtype=np.int64) if self.gradient is None else self.gradient
        total = self.scope.sums.add_up(Round("step", self.step), np.concatenate([own, self.loss]))
        gradient.copy_(torch.from_numpy(fixed_point.decode(total[:-1], self.bound)))
        return torch.from_numpy(fixed_point.decode(total[-1:], self.scope.largest_loss_sum))[:, None]
