"""The scope of a run whose rows are divided among sites: the training loop's sums as sums over all sites, or, where the
sites average their weights, its averages."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.data.sampler import site_rows
from raylab.errors import RunError
from raylab.federation import fixed_point
from raylab.federation.agreement import DEFAULT_BOUND
from raylab.federation.federation import Federation, PooledSamples
from raylab.federation.fixed_point import Integers
from raylab.federation.privacy import LOSS_BOUND, Privacy
from raylab.federation.rounds import Round
from raylab.training.gradients import norm_of
from raylab.training.imbalance import Batches, offsets_of
from raylab.training.loop import weights_sha256
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.scope import LocalShardSums, Scope, ShardSums

LARGEST_VALUE = 2.0**20  # of a weight, or of a batch-norm statistic of a shard; the sums' resolution is 2^-42
LARGEST_COUNT = 2.0**40  # of shards that batch norm has seen
LARGEST_LOSS = 1024.0  # mean loss of rows; training has long failed at a larger one
DIVERGED = "their computers computed different bits from the same numbers"


class SiteScope(Scope):
    """The rows of one site, or of all of them in a pooled run, which repeats what the sites do. A step is one of all
    sites: its sums are."""

    def __init__(self, federation: Federation) -> None:
        agreement, recipe, counts = federation.agreement, federation.recipe, federation.counts
        self.agreement, self.recipe, self.task = agreement, recipe, federation.task
        self.val, self.sums = federation.val, federation.sums
        self.counts = {name: len(samples) for name, samples in federation.train.items()}
        self.starts = PooledSamples(federation.train).starts
        self.per_epoch = federation.steps_per_epoch
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
        return FixedPointSums(self, step, shards, width)

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
        total_loss, total_rows = self.add_up_scores(round, model, np.array([*loss, rows]), sites)
        return {"loss": float(fixed_point.decode(np.array([total_loss]), self.largest_loss_sum)[0]) / int(total_rows)}

    def add_up_scores(
        self, round: Round, model: nn.Module, values: Integers, sites: int, noisy: int = 0
    ) -> list[np.int64]:
        """Return the sums of `values` over all sites, of which `sites` are here, the first `noisy` with noise; RunError
        if the sites' weights differ."""
        digest = np.frombuffer(bytes.fromhex(weights_sha256(model)), dtype="<i8").astype(np.int64)
        taking_part = self.sums.sites(round)
        with np.errstate(over="ignore"):
            total = self.sums.add_up(round, np.concatenate([values, digest * sites]), noisy)
            if not np.array_equal(total[len(values) :], digest * len(taking_part)):
                raise RunError(
                    f"the sites' weights differ after {round.number} steps",
                    DIVERGED,
                    "compare the sites' CPUs and libraries; sites that differ cannot train together",
                )
        return list(total[: len(values)])


class PrivateScope(SiteScope):
    """The same with a privacy budget: of the rows nothing leaves but sums with noise. Every row is a shard, and no site
    is ever left out. A message is never computed again, so bits need not be the same."""

    repeats_bits = False

    def __init__(self, federation: Federation, privacy: Privacy) -> None:
        super().__init__(federation)
        self.privacy, self.val_rows = privacy, federation.counts.val

    def start_sums(self, group: ProcessGroup, step: int, shards: list[int], width: int) -> ShardSums:
        return NoisySums(self, step, len(shards))

    def scale(self, bound: float) -> float:
        """Return how many integers stand for 1 in a sum whose parts have at most norm `bound`."""
        return self.privacy.scale(len(self.agreement.sites), bound)

    def validate(self, model: nn.Module, group: ProcessGroup, epoch: int) -> dict[str, float]:
        """Return the loss of all sites' validation rows with noise, for which a row's loss counts at most LOSS_BOUND;
        RunError if the sites' weights differ."""
        round, scale = Round("validation", (epoch + 1) * self.per_epoch), self.scale(LOSS_BOUND)
        total, log_loss = np.zeros(1, dtype=np.int64), self.task.outcome.log_loss
        for samples in self.val.values():
            p = predict(self.task, model, samples, ProcessGroup(), self.recipe, "cpu")
            losses = np.array([log_loss(samples.y[k : k + 1], p[k : k + 1]) for k in range(len(samples))])
            fixed_point.check(losses, np.inf, "the loss of a validation row")
            total += np.rint(np.minimum(losses, LOSS_BOUND) * scale).astype(np.int64).sum()
        (loss,) = self.add_up_scores(round, model, total, len(self.val), noisy=1)
        return {"loss": float(loss) / scale / self.val_rows}


class AveragingScope(SiteScope):
    """The rows of one site, which takes steps of its own; now and then the weights of all sites are averaged, each
    weighted with the rows that it has used since, which are agreed (federated averaging, McMahan et al., arXiv
    1602.05629). The running statistics of batch norm are averaged like weights: means of means, and of variances. Each
    site keeps its AdamW's moments."""

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        ((self.name, self.samples),) = self.counts.items()
        self.site = self.agreement.find(self.name)
        self.number = self.agreement.names.index(self.name)
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
        """See Scope. Raises NonFiniteError for a value that is not finite or beyond LARGEST_VALUE."""
        round = Round("average", step)
        taking_part = self.sums.sites(round)
        share = self.site.rows / sum(self.agreement.find(name).rows for name in taking_part)
        what = f"the weights after step {step}"
        values = [tensor for tensor in tensors if tensor.is_floating_point()]
        counts = [tensor for tensor in tensors if not tensor.is_floating_point()]
        parts = [_weigh(values, share, LARGEST_VALUE, what), _weigh(counts, share, LARGEST_COUNT, what)]
        total = self.sums.add_up(round, np.concatenate(parts))
        of_values, of_counts = np.split(total, [len(parts[0])])
        _fill(values, fixed_point.decode(of_values, LARGEST_VALUE))
        _fill(counts, np.rint(fixed_point.decode(of_counts, LARGEST_COUNT)))
        return taking_part


def make_scope(federation: Federation) -> SiteScope:
    """Return a new scope for the training loop."""
    if federation.agreement.privacy is not None:
        return PrivateScope(federation, federation.agreement.privacy)
    return SiteScope(federation) if federation.agreement.local_steps is None else AveragingScope(federation)


def _weigh(tensors: Sequence[Tensor], share: float, bound: float, what: str) -> Integers:
    """Return all values of `tensors` times `share` as integers for sums within `bound`; raises like `check`."""
    own = np.concatenate([tensor.double().numpy().ravel() for tensor in tensors] or [np.zeros(0)])
    fixed_point.check(own, bound, what)
    return fixed_point.encode(own * share, bound, what)


def _fill(tensors: Sequence[Tensor], values: NDArray[np.float64]) -> None:
    """Write `values` one after the other into `tensors`."""
    parts = torch.split(torch.from_numpy(values), [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


class FixedPointSums(ShardSums):
    """The sums of one step: of each shard's gradient, at most as long as the agreed bound, of its losses, and of its
    batch-norm statistics, weighted with its rows.

    The running averages of batch norm take up the mean over the shards, as often as there are shards. Taking up one
    shard after the other, as a run at one place does, would need the statistics of each, and favour the last site.
    """

    def __init__(self, scope: SiteScope, step: int, shards: list[int], width: int) -> None:
        self.scope, self.step, self.shards, self.count = scope, step, shards, sum(shards)
        self.bound = scope.gradient_bound
        self.gradient: Integers | None = None
        self.loss = np.zeros(1, dtype=np.int64)
        self.statistics = np.zeros(width - 1, dtype=np.int64)

    def add(self, shard: int, gradient: Tensor, row: Tensor) -> None:
        """See ShardSums. Raises NonFiniteError for a gradient, a loss or a statistic that is not finite, or for a
        statistic beyond LARGEST_VALUE."""
        values = gradient.double().numpy()
        share = self.shards[shard] / self.count
        longest = self.bound * share  # the gradient is a part of the mean over all rows
        norm = float(norm_of(gradient))
        if norm > longest:
            values = values * (longest / norm)
            self.scope.clipped += 1
        where = f"step {self.step}"
        integers = fixed_point.encode(values, self.bound, f"{where}, the gradient of a shard")
        self.gradient = integers if self.gradient is None else fixed_point.add(self.gradient, integers)
        loss = fixed_point.encode(row[:1].numpy(), self.scope.largest_loss_sum, f"{where}, the loss of a shard")
        self.loss = fixed_point.add(self.loss, loss)
        statistics = _weigh([row[1:]], share, LARGEST_VALUE, f"{where}, the batch-norm statistics of a shard")
        self.statistics = fixed_point.add(self.statistics, statistics)

    def complete(self, gradient: Tensor) -> Tensor:
        own = np.zeros(gradient.numel(), dtype=np.int64) if self.gradient is None else self.gradient
        total = self.scope.sums.add_up(Round("step", self.step), np.concatenate([own, self.loss, self.statistics]))
        of_gradient, of_loss, of_statistics = np.split(total, [len(own), len(own) + 1])
        gradient.copy_(torch.from_numpy(fixed_point.decode(of_gradient, self.bound)))
        rows = np.zeros((len(self.shards), 1 + len(of_statistics)))
        rows[0, 0] = fixed_point.decode(of_loss, self.scope.largest_loss_sum)[0]
        rows[:, 1:] = fixed_point.decode(of_statistics, LARGEST_VALUE)
        return torch.from_numpy(rows)


class NoisySums(ShardSums):
    """The sums of one step with noise: of the gradient of each row, at most as long as the agreed bound. The losses do
    not leave; their sum is estimated from the rows that are here."""

    def __init__(self, scope: PrivateScope, step: int, count: int) -> None:
        self.scope, self.step, self.count = scope, step, count
        self.bound = scope.gradient_bound / count  # the gradient of a row is a part of the mean over all rows
        self.scale = scope.scale(self.bound)
        self.gradient: Tensor | None = None
        self.loss, self.rows = 0.0, 0

    def add(self, shard: int, gradient: Tensor, row: Tensor) -> None:
        """See ShardSums. Raises NonFiniteError for a gradient that is not finite."""
        exact = gradient.double()
        norm = float(norm_of(exact))
        if not math.isfinite(norm):
            fixed_point.check(exact.numpy(), np.inf, f"step {self.step}, the gradient of a row")
        factor = 1.0
        if norm > self.bound:
            factor = self.bound / norm
            self.scope.clipped += 1
        integers = exact.mul_(factor * self.scale).round_().long()
        self.gradient = integers if self.gradient is None else self.gradient.add_(integers)
        self.loss, self.rows = self.loss + float(row[0]), self.rows + 1

    def complete(self, gradient: Tensor) -> Tensor:
        assert self.gradient is not None, "a site gives rows to every step"
        total = self.scope.sums.add_up(Round("step", self.step), self.gradient.numpy(), noisy=len(self.gradient))
        gradient.copy_(torch.from_numpy(total / self.scale))
        rows = torch.zeros(self.count, 1, dtype=torch.float64)
        rows[0] = self.loss / self.rows * self.count
        return rows
