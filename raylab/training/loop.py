"""The training loop: plain torch, identical for one process and many.

One optimiser step: cut the global batch into logical shards; each rank runs forward and backward on its shards; sum the
shards' gradients (exactly, on a CPU); clip; step. Nothing depends on which rank computed which shard, so a run that is
resized, killed or resumed follows the same curve. On a GPU the host reads nothing of a step: losses and norms stay on
the device until they are fetched together (deferred_metrics.py). The loop's only connections to the outside are
`report(metrics, checkpoint)` and the peers with which it trains.

A step changes nothing that lasts before its last collective has completed, and what is due next follows from the state
alone (`next_action`). So when a peer is lost in the middle, those who are left form a group, whoever is behind takes
the state of whoever is ahead, and the loop goes on: at most the step in flight is computed again, to the same bits.
"""

import copy
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.old_names import rename_progress
from raylab.config.recipe import Recipe
from raylab.data.prefetch import Prefetcher
from raylab.data.samples import HostBatch, Samples
from raylab.errors import CheckpointError, UsageError
from raylab.models.baselines import Fitted
from raylab.tasks.base import Task
from raylab.training.adamw import AdamW
from raylab.training.batchnorm import ShardStatistics, is_too_few_values, reestimate
from raylab.training.deferred_metrics import DeferredMetrics
from raylab.training.finetune import FinetuneSchedule
from raylab.training.gradients import clip_norm, flatten_gradients
from raylab.training.loading import loader_threads, pin, read_batch, to_device
from raylab.training.peers import FixedPeers, Peers
from raylab.training.predict import forward, name_metrics, predict, validate
from raylab.training.process_group import PeerLost, ProcessGroup
from raylab.training.progress import Metrics, Progress
from raylab.training.scope import LocalScope, Scope, ShardSums
from raylab.training.shard_gradients import ShardGradients, ShardInputs

Loaded = tuple[range, Tensor | HostBatch, Tensor]
"""Consecutive shards with the same number of rows, and their inputs x and y in host memory, as in ShardInputs."""


class Report:
    """What the loop tells the outside. All ranks call it alike; this one listens to nothing."""

    def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
        """Called once for every step, in order, with that step's metrics, and with the state when a checkpoint is due,
        after all steps up to it. On a CPU that is right after the step, on a GPU up to deferred_metrics.SECONDS later.
        Returns True to ask for a checkpoint at the next step boundary (a clock)."""
        return False

    def start_group(self, group: ProcessGroup, step: int) -> None:
        """A new group goes on from `step`: with a new attempt, or as what is left or has become of the group before. A
        collective."""

    def start_step(self, step: int, group: ProcessGroup, input_seconds: float) -> None:
        """A step after the first `step` ones begins; this process has spent `input_seconds` waiting for inputs so far,
        and `group.seconds` in collectives of this group."""

    def finish_checkpoint(self, wait: bool = False) -> CheckpointError | None:
        """Note that the checkpoint reported last is complete, if it is by now, or `wait` for it. Returns why it could
        not be written. Raises PeerLost where others may have gone on without this process."""
        return None

    def saved_step(self, step: int) -> int:
        """Called by a new rank 0: the step of the last checkpoint up to `step` that is complete or being written."""
        return step

    def carried(self) -> dict[str, Any]:
        """What travels with the state, such as the metrics that may not have arrived where they go."""
        return {}

    def carry(self, carried: dict[str, Any]) -> None:
        """Take over what another rank's `carried` returned."""

    def arrived(self) -> int:
        """The last step whose metrics have arrived, as far as this rank knows; 0 where another rank does."""
        return 0

    def forget(self, step: int) -> None:
        """The metrics up to `step` have arrived: nobody needs to carry them."""

    def note_average(self, step: int, sites: tuple[str, ...], weights_sha256: str) -> None:
        """The weights after `step` steps are now the average over those of `sites`, and have this SHA-256."""

    def note_leaving(self, ranks: list[int]) -> None:
        """These ranks of the present group leave at this step boundary, as they were told to."""

    def hand_over(self, step: int) -> None:
        """This rank ends here, and so do all others: the run goes on elsewhere, from the checkpoint of `step`."""

    def finish(self, result: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Any]:
        """The run is over, with `result` and the `weights` of its best epoch. Returns the result with what this adds to
        it."""
        return result


class AttemptHandedOver(Exception):
    """Raised in a worker that leaves at a step boundary: the others go on, or the next attempt from its checkpoint."""


def fit(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    train: Samples,
    val: Samples,
    report: Report,
    load: Callable[[], dict[str, Any] | None] = lambda: None,
    device: str = "cpu",
    transferred: bool = False,
    peers: Peers | None = None,
    scope: Scope | None = None,
) -> dict[str, Any]:
    """Train `model` from its present weights, or from the state that `load` returns, to the last planned step.

    Rank 0 alone calls `load`, and only where no other process has the state of the run.

    `transferred`: the current weights were pretrained, so the recipe's transfer part applies (finetune.py). `scope`:
    whose rows the run trains on, if not all of them are here (scope.py).

    Returns {"steps", "planned_steps", "epochs", "stopped" ("planned" or "early"), "val": metrics of the last epoch,
    "best": metrics of the best epoch with its "epoch" (from 0) and its last "step" (from 1), "weights_sha256"}, and
    leaves the best epoch's weights in `model`.

    The row of an epoch's last step also has "train/epoch_loss", the mean loss over the epoch's samples, each with the
    weights of its own step; the "val/..." scores; and the same as "best/val/..." if this epoch is the best so far.
    Raises NonFiniteError for an infinite or NaN loss or gradient, before the weights are scored or saved again,
    AttemptHandedOver where this process leaves, and PeerLost where it is on a GPU, whose queue may hold a spoilt step.
    """
    training = Training(recipe, task, model, train, val, report, device, transferred, load, peers, scope)
    try:
        training.regroup()
        while (action := training.next_action()) is not None:
            try:
                action()
            except PeerLost:
                if device != "cpu":
                    raise
                training.regroup()
    finally:
        training.inputs.close()
    model.load_state_dict(training.progress.best_model)
    return training.final


class Training:
    """The state of a run in this process, and the operations that `fit` consists of; all ranks call the same ones."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        model: nn.Module,
        train: Samples,
        val: Samples,
        report: Report,
        device: str,
        transferred: bool,
        load: Callable[[], dict[str, Any] | None] = lambda: None,
        peers: Peers | None = None,
        scope: Scope | None = None,
    ) -> None:
        loop = recipe.loop
        torch.set_num_threads(loop.threads)
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # otherwise matrix products on a GPU may differ between runs
        # the same flags as use_deterministic_algorithms(True, warn_only=True), which first imports torch's compiler
        torch.set_deterministic_debug_mode("warn")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # for speed
        self.recipe, self.task, self.model, self.train = recipe, task, model, train
        self.report, self.load, self.device = report, load, device
        self.peers, self.group = peers or FixedPeers(), ProcessGroup()
        self.scope = scope or LocalScope(recipe, task, train, val, device)
        self.batches = self.scope.batches
        self.augmentation = train.augmentation if recipe.data.augments else None
        self.planned = loop.epochs * self.batches.per_epoch
        self.inputs = self.create_prefetcher()
        model.to(device)
        if loop.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(model).to(device).requires_grad_(False) if loop.ema_decay else None
        # the tensors of the average and those that it follows: listing them takes longer than averaging
        self.averages = [] if self.average is None else list(self.average.state_dict().values())
        self.averaged = list(model.state_dict().values())
        self.phases = FinetuneSchedule(recipe, model, self.batches.per_epoch, transferred)
        self.weights = [weight for _, weight in self.phases.learning]
        self.gradient = flatten_gradients(self.weights)
        self.shard_gradients = ShardGradients(
            model, self.weights, recipe.seed, device, loop.bf16, self.scope.repeats_bits
        )
        self.optimizer = AdamW(self.weights)
        self.class_weight = _class_weight(recipe, device)
        self.progress = Progress()
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=device)  # sum over the epoch's samples so far
        self.statistics, self.metrics = ShardStatistics(model), DeferredMetrics(device)
        self.has_state = False  # of the run, not just initial weights
        self.final: dict[str, Any] = {}  # the result, once the run is over
        self.must_reestimate = transferred and recipe.transfer.reestimate
        self.rows: list[Metrics] = []  # fetched and not reported yet
        self.wants_checkpoint = False
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.averaged_step = 0  # whose weights were averaged over sites; a checkpoint is written after that
        self.timed_since, self.timed_samples = time.perf_counter(), 0
        self.input_seconds = 0.0  # that steps have waited for their inputs

    @property
    def scored_model(self) -> nn.Module:
        """The network that is scored and saved: the moving average if the recipe has one."""
        return self.average or self.model

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from the state of a checkpoint; CheckpointError if it is beyond the planned end, or if the run started
        with another version of the augmentation."""
        if self.augmentation is not None and state.get("augmentation", 1) != self.augmentation:
            raise CheckpointError(
                "this run was started by an earlier version of raylab, which augments images differently",
                "a run with two augmentations could not be reproduced",
                "resume it with the version that started it, or train it again under another name",
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optim"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress = Progress(**rename_progress(state["progress"]))
        self.epoch_loss.fill_(state.get("epoch_loss", math.nan))  # missing in old checkpoints
        if self.progress.step > self.planned:
            raise CheckpointError(
                f"the checkpoint is at step {self.progress.step}, the recipe ends at {self.planned}",
                do="resume with the recipe that wrote it, or train under another name",
            )
        self.must_reestimate = False
        self.saved_step = self.averaged_step = self.progress.step

    def regroup(self) -> None:
        """Form a group with all who may train, and go on from the state of whoever is farthest, or begin."""
        self.inputs.close()  # another group has other shards
        while True:
            self.group, leader = self.peers.form_group(self.position())
            is_attempt = leader is None and not self.has_state
            try:
                if is_attempt and self.group.rank == 0 and (state := self.load()) is not None:
                    self.restore(state)
                if leader is not None or is_attempt:
                    self.take_state(leader or 0)
                self.has_state = True
                self.report.start_group(self.group, self.progress.step)
            except PeerLost:
                continue
            if self.group.rank == 0:
                saved_step = self.report.saved_step(self.saved_step)
                self.wants_checkpoint |= saved_step < self.saved_step  # the rank 0 before did not complete it
                self.saved_step = saved_step
            self.inputs = self.create_prefetcher()
            return

    def create_prefetcher(self) -> Prefetcher[list[Loaded]]:
        """What loads the inputs of this rank in the present group ahead."""
        return Prefetcher(self.load_inputs, self.planned, loader_threads(self.recipe, self.group, self.device))

    def position(self) -> int:
        """How far the state is: -1 for none yet; it changes with each action that lasts."""
        return self.progress.step + self.progress.epoch + 2 - self.must_reestimate if self.has_state else -1

    def take_state(self, source: int) -> None:
        """Replace the state of every rank by that of rank `source`; collective."""
        if self.group.size == 1:
            return
        file = io.BytesIO()
        if self.group.rank == source:
            more = {"must_reestimate": self.must_reestimate, "saved_step": self.saved_step, "waiting": self.rows}
            torch.save({**self.state(), **more, "carried": self.report.carried()}, file)
        content = self.group.share(file.getvalue(), source)
        if self.group.rank != source:
            state = torch.load(io.BytesIO(content), weights_only=True, map_location=self.device)
            self.restore(state)
            self.must_reestimate, self.saved_step = state["must_reestimate"], state["saved_step"]
            self.rows = state["waiting"]
            self.report.carry(state["carried"])

    def next_action(self) -> Callable[[], None] | None:
        """What is due, by the state alone; None when the run is over."""
        if self.must_reestimate:
            return self.reestimate_batchnorm
        if self.metrics.rows and self.must_fetch():
            return self.fetch_metrics
        if self.is_average_due():
            return self.average_over_sites
        if self.is_epoch_due():
            return self.finish_epoch
        if self.rows:
            return self.report_rows
        if self.is_checkpoint_due():
            return self.save
        if self.is_finished():
            return None if self.final else self.finish
        return self.train_step

    def is_average_due(self) -> bool:
        return self.averaged_step < self.progress.step and self.scope.is_average_due(self.progress.step)

    def is_finished(self) -> bool:
        return self.progress.step >= self.planned or self.progress.stopped is not None

    def is_epoch_end(self) -> bool:
        return self.progress.step > 0 and self.progress.step % self.batches.per_epoch == 0

    def is_epoch_due(self) -> bool:
        """Whether an epoch's steps are done and the epoch is not."""
        return self.progress.epoch + 1 < self.progress.step // self.batches.per_epoch

    def is_checkpoint_due(self) -> bool:
        """Whether the recipe or the end of the run asks for a checkpoint of this step; clocks ask in `meet_peers`."""
        is_due = self.is_finished() or self.is_checkpoint_step()
        return is_due and self.saved_step < self.progress.step

    def reestimate_batchnorm(self) -> None:
        """Replace the parent's batch-norm statistics by those of this data."""
        reestimate(self.model, self.train, self.group, self.recipe.seed, self.device)
        if self.average is not None:
            self.average.load_state_dict(self.model.state_dict())
        self.must_reestimate = False

    def ask_peers(self) -> Callable[[], bool]:
        """At the boundary before a step: ask whether any rank wants something done now. Returns the function that waits
        for the answers, does it, and returns whether to go on with the step."""
        seconds = self.recipe.loop.checkpoint_seconds
        overdue = seconds is not None and time.monotonic() - self.saved_at >= seconds
        wants_checkpoint = (self.wants_checkpoint or overdue) and self.saved_step < self.progress.step
        is_leaving = self.peers.is_leaving()
        failure = self.report.finish_checkpoint()
        own = [is_leaving and rank == self.group.rank for rank in range(self.group.size)]
        wait = self.group.start_add_up(
            [self.peers.must_regroup(), wants_checkpoint, self.report.arrived(), failure is not None, *own]
        )
        return lambda: self.meet_peers(wait(), is_leaving, failure)

    def meet_peers(self, answers: list[int], is_leaving: bool, failure: CheckpointError | None) -> bool:
        """Do what the sums over all ranks of what `ask_peers` asks say; return whether to go on with the step."""
        changing, saving, arrived, failing, *leaving = answers
        if failing:
            self.raise_everywhere(failure)
        self.report.forget(arrived)
        self.report.note_leaving([rank for rank, leaves in enumerate(leaving) if leaves])
        everyone_leaves = all(leaving)
        if saving or (everyone_leaves and self.saved_step < self.progress.step):
            self.fetch_all()
            self.save()
        if is_leaving:
            if everyone_leaves:
                self.complete_checkpoint()
                self.report.hand_over(self.progress.step)
            raise AttemptHandedOver
        if changing or any(leaving):
            self.fetch_all()
            self.regroup()
            return False
        return True

    def train_step(self) -> None:
        """One optimiser step on the next batch; its numbers go to the deferred metrics."""
        recipe, step = self.recipe, self.progress.step
        self.report.start_step(step, self.group, self.input_seconds)
        may_go_on = self.ask_peers()
        # The answers travel beside a short step; before a long one, a worker that leaves must not compute in vain
        is_short = self.shard_gradients.takes_passes
        if not is_short and not may_go_on():
            return
        epoch, shards = self.shards_of(step)
        count = sum(len(rows) for rows in shards)
        lr_scales = self.phases.prepare_step(self.model, step)
        sums = self.compute_shards(step, shards, count)
        if is_short and not may_go_on():
            return
        if self.phases.starts_finetuning(step):
            self.progress.reset_patience()
        loss_sum = self.complete_sums(sums)  # the last collectives: what follows lasts
        norm = clip_norm(self.gradient, recipe.optim.max_grad_norm)
        lr = self.phases.lr(step, self.progress.lr_reductions)
        self.optimizer.step(lr, recipe.optim, lr_scales)
        if self.average is not None and recipe.loop.ema_decay is not None:
            # Young averages follow the weights more closely: otherwise the first epochs score the initial weights
            update_average(self.averages, self.averaged, min(recipe.loop.ema_decay, (1 + step) / (10 + step)))
        self.progress.step = step + 1
        self.timed_samples += count
        self.epoch_loss += loss_sum
        row = {"step": self.progress.step, "epoch": epoch, "train/lr": lr}
        self.metrics.add(row, loss_sum / count, norm)

    def shards_of(self, step: int) -> tuple[int, list[np.ndarray]]:
        """Return the epoch of `step` and the row indices of its shards, without empty ones (in a small batch)."""
        epoch, shards = self.batches.shards_of(step)
        return epoch, [rows for rows in shards if len(rows) > 0]

    def compute_shards(self, step: int, shards: list[np.ndarray], count: int) -> ShardSums:
        """Return the sums over this rank's shards of the gradients of the mean loss over all `shards` (row indices,
        `count` in total), of losses and of batch-norm statistics. Changes nothing."""
        sums = self.scope.start_sums(self.group, step, [len(rows) for rows in shards], 1 + self.statistics.width)
        with self.statistics.per_shard():
            began = time.perf_counter()
            loaded = self.inputs.get(step)
            self.input_seconds += time.perf_counter() - began
            for group, x, y in loaded:
                inputs = ShardInputs(group, to_device(x, self.device), to_device(y, self.device))
                for shard, loss, gradient in self.shard_gradients.compute(inputs, step, count, self.sample_losses):
                    sums.add(shard, gradient, torch.cat([loss.double().reshape(1), *self.statistics.row()]))
        return sums

    def complete_sums(self, sums: ShardSums) -> Tensor:
        """Write the gradient over all shards to `self.gradient`, fold their batch-norm statistics, and return the sum
        of the samples' losses."""
        table = sums.complete(self.gradient)
        self.statistics.fold(table[:, 1:])  # after the last collective, because it lasts
        return table[:, 0].sum()

    def load_inputs(self, step: int) -> list[Loaded]:
        """Inputs of this rank's shards; in one group a function of `step` alone."""
        epoch, shards = self.shards_of(step)
        augment = (self.recipe.seed, epoch) if self.recipe.data.augments else None
        loaded: list[Loaded] = []
        own = self.scope.own_shards(self.group, step, len(shards))
        for group in self.shard_gradients.group_shards(shards, own):
            rows = np.concatenate([shards[shard] for shard in group])
            x, y = read_batch(self.train, rows, augment, self.device), torch.from_numpy(self.train.y[rows])
            loaded.append((group, x, pin(y, self.device)))
        return loaded

    def sample_losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample, with its autograd graph."""
        recipe = self.recipe
        try:
            logits = forward(self.model, x, recipe.loop.bf16, recipe.loop.channels_last, self.device)
        except ValueError as error:  # raised by batch norm for a single sample with a feature map of one pixel
            if not is_too_few_values(error):
                raise
            raise UsageError(
                f"a shard of {len(x)} sample at step {self.progress.step} is too small for batch norm",
                str(error),
                "use fewer loop.shards, larger images, or a loop.global_batch_size that leaves a larger last batch",
            ) from error
        logits = logits if self.scope.offset is None else logits + self.scope.offset
        return self.task.outcome.loss(logits, y, self.class_weight)

    def must_fetch(self) -> bool:
        """Whether the host needs the numbers of the steps so far."""
        return self.is_epoch_end() or self.is_checkpoint_step() or self.is_finished() or self.metrics.is_overdue()

    def is_checkpoint_step(self) -> bool:
        every = self.recipe.loop.checkpoint_steps
        return every is not None and self.progress.step % every == 0

    def fetch_metrics(self) -> None:
        """Make rows of the numbers of the steps since the last fetch; when one is not finite, report the rows before
        it and raise its error."""
        rows, failure = self.metrics.fetch(
            f"lower optim.lr (now {self.recipe.optim.lr:g}) or optim.class_weight, set optim.max_grad_norm, "
            "or check the inputs"
        )
        samples_per_s = self.timed_samples / (time.perf_counter() - self.timed_since)
        for row in rows:
            row["train/samples_per_s"] = samples_per_s
        self.rows += rows
        if failure is not None:
            self.report_rows()
            raise failure

    def fetch_all(self) -> None:
        """Fetch and report what is still on the device."""
        if self.metrics.rows:
            self.fetch_metrics()
        self.report_rows()

    def report_rows(self) -> None:
        rows, self.rows = self.rows, []
        for row in rows:
            self.wants_checkpoint |= self.report(row, None)

    def average_over_sites(self) -> None:
        """Replace the weights and batch-norm statistics, and their moving averages, by the averages over all sites.
        AdamW's moments stay each site's own."""
        step = self.progress.step
        sites = self.scope.average(step, [*self.averaged, *self.averages])
        self.averaged_step = step
        self.report.note_average(step, sites, weights_sha256(self.scored_model))

    def finish_epoch(self) -> None:
        """Score the epoch on the validation split; its last step's row also has the scores."""
        step = self.progress.step
        scores = self.scope.validate(self.scored_model, self.group, self.progress.epoch + 1)
        is_probe = self.phases.is_probing(step - 1) and step < self.planned
        self.progress.end_epoch(self.recipe, scores, self.task.objective, self.scored_model, may_stop=not is_probe)
        row = self.rows[-1]
        row |= {"train/epoch_loss": float(self.epoch_loss) / self.scope.rows_per_epoch, **name_metrics(scores)}
        if self.progress.best_epoch == self.progress.epoch:
            row |= name_metrics(scores, "best/val")
        self.epoch_loss.zero_()
        self.timed_since, self.timed_samples = time.perf_counter(), 0

    def save(self) -> None:
        """Report the state as a checkpoint of this step."""
        self.report({"step": self.progress.step}, self.state())
        self.saved_at, self.saved_step, self.wants_checkpoint = time.monotonic(), self.progress.step, False

    def complete_checkpoint(self) -> None:
        """Wait until the checkpoint reported last is complete; a collective."""
        failure = self.report.finish_checkpoint(wait=True)
        if self.group.add_up([failure is not None]) == [1]:
            self.raise_everywhere(failure)

    def raise_everywhere(self, failure: CheckpointError | None) -> None:
        """Raise rank 0's `failure` on all ranks; a collective."""
        reasons = "" if failure is None else json.dumps(failure.args)
        raise CheckpointError(*json.loads(self.group.share(reasons.encode(), 0)))

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs. Sampler position and random numbers depend on (seed, step) alone
        (see `shard_seed`, `shards_of` and the loaders' augmentation), so they need no further state."""
        return {
            "seed": self.recipe.seed,
            "model": self.model.state_dict(),
            "optim": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "progress": self.progress.state(),
            "epoch_loss": self.epoch_loss,
            "augmentation": self.augmentation,
        }

    def finish(self) -> None:
        """Report the result; nobody ends before that is done, so that another rank can do it again."""
        self.complete_checkpoint()
        final = self.report.finish(self.result(), self.progress.best_model)
        self.group.add_up([0])
        self.final = final

    def result(self) -> dict[str, Any]:
        progress, per_epoch = self.progress, self.batches.per_epoch
        return {
            "steps": progress.step,
            "planned_steps": self.planned,
            "epochs": progress.step // per_epoch,
            "stopped": progress.stopped or "planned",
            "val": progress.val,
            "best": {"epoch": progress.best_epoch, "step": (progress.best_epoch + 1) * per_epoch, **progress.best},
            "weights_sha256": weights_sha256(self.scored_model),
        }


def fit_at_once(
    recipe: Recipe,
    task: Task,
    model: Fitted,
    train: Samples,
    val: Samples,
    report: Report,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Do the same as `fit` for a model without steps: one step and epoch, and no checkpoint, because a refit is quick.

    Every rank fits the same model, on its CPU, so that a group of workers gives the result of a single process.
    """
    torch.set_num_threads(recipe.loop.threads)
    group, _ = (peers or FixedPeers()).form_group(0)
    report.start_group(group, 0)
    began = time.perf_counter()
    with torch.no_grad():
        model.fit(train.batch(np.arange(len(train))), train.y)
    samples_per_s = len(train) / (time.perf_counter() - began)
    train_loss = task.outcome.log_loss(train.y, predict(task, model, train, group, recipe, "cpu"))
    scores = validate(task, model, val, group, recipe, "cpu")
    row = {"step": 1, "epoch": 0, "train/loss": train_loss, "train/epoch_loss": train_loss, "train/lr": 0.0}
    row |= {"train/samples_per_s": samples_per_s, **name_metrics(scores), **name_metrics(scores, "best/val")}
    report(row, None)
    result = {
        "steps": 1,
        "planned_steps": 1,
        "epochs": 1,
        "stopped": "planned",
        "val": scores,
        "best": {"epoch": 0, "step": 1, **scores},
        "weights_sha256": weights_sha256(model),
    }
    final = report.finish(result, model.state_dict())
    group.add_up([0])  # nobody ends before the result is reported
    return final


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _class_weight(recipe: Recipe, device: str) -> Tensor | None:
    if recipe.optim.class_weight is None:
        return None
    return torch.tensor(recipe.optim.class_weight, device=device)


@torch.no_grad()
def update_average(average: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Move each tensor of `average` towards that of `values`; copy integers."""
    floats = [value.is_floating_point() for value in values]
    rest = [not is_float for is_float in floats]
    torch._foreach_lerp_(list(compress(average, floats)), list(compress(values, floats)), 1 - decay)
    if any(rest):
        torch._foreach_copy_(list(compress(average, rest)), list(compress(values, rest)))
