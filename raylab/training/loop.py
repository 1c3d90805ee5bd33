"""The training loop: plain torch, the same on one process or many.

One optimiser step is: cut the global batch into logical shards; each rank runs forward and backward on whole
shards; sum the shards' gradients (exactly, on a CPU); clip; step. Nothing in it depends on which rank computed
which shard, so a run that is resized, killed or resumed follows the same curve (DESIGN rule 1). On a GPU the host
reads nothing of a step: its numbers stay on the card until they are fetched together (readings.py). The loop's only
way to the world is `report(metrics, checkpoint)`.
"""

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.recipe import Recipe
from raylab.data.samples import Samples
from raylab.errors import CheckpointError, UsageError
from raylab.models.baselines import Fitted
from raylab.tasks.base import Task
from raylab.training.adamw import AdamW
from raylab.training.batchnorm import ShardStatistics, reestimate
from raylab.training.deferred_metrics import Readings
from raylab.training.finetune import Plan
from raylab.training.imbalance import offsets, sampler
from raylab.training.process_group import World

NORM_PART = 2**16  # elements
EVAL_BATCH = 256  # rows scored at a time; fixed, so that scores do not depend on the workers

Metrics = dict[str, Any]
Report = Callable[[Metrics, dict[str, Any] | None], bool]
"""Called by every rank once for every step, in order, with that step's metrics, and with the state when a checkpoint is
due, after all steps up to it. On a CPU that is right after the step, on a GPU up to readings.SECONDS later.
Returns True to ask for a checkpoint at once (a preemption, a clock)."""


def fit(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    train: Samples,
    val: Samples,
    report: Report,
    resume: dict[str, Any] | None = None,
    device: str = "cpu",
    transferred: bool = False,
) -> dict[str, Any]:
    """Train `model` from its present weights, or from the state `resume`, to the last planned step.

    `transferred`: those weights were trained elsewhere, so that the recipe's transfer part holds (finetune.py).

    Returns {"steps", "planned_steps", "epochs", "stopped" ("planned" or "early"), "val": metrics of the last epoch,
    "best": metrics of the best epoch with its "epoch" (from 0) and its last "step" (from 1), "weights_sha256"}, and
    leaves the best epoch's weights in `model`.

    The row of an epoch's last step also has "train/epoch_loss", the mean loss over the epoch's samples, each with the
    weights of its own step; the "val/..." scores; and the same as "best/val/..." if this epoch is the best so far.
    Raises NonFiniteError when a loss or a gradient is no number, before the weights are scored or saved again.
    """
    loop = recipe.loop
    torch.set_num_threads(loop.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time
    world = World()
    exact = loop.sum == "exact" or (loop.sum == "auto" and device == "cpu")
    batches = sampler(recipe, train)
    per_epoch = batches.per_epoch
    planned = loop.epochs * per_epoch

    model.to(device)
    if loop.channels_last:
        model.to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False) if loop.ema else None
    plan = Plan(recipe, model, per_epoch, transferred)
    weights = [p for _, p in plan.learning]
    flat = _flatten_gradients(weights)
    optim = AdamW(weights)
    offset = offsets(recipe, train, device)
    class_weight = _class_weight(recipe, train, device)
    progress = Progress()
    epoch_loss = torch.zeros((), dtype=torch.float64, device=device)  # summed over the samples of the epoch so far
    if resume is not None:
        model.load_state_dict(resume["model"])
        optim.load_state_dict(resume["optim"])
        if average is not None:
            average.load_state_dict(resume["average"])
        progress = Progress(**resume["progress"])
        epoch_loss.fill_(resume.get("epoch_loss", math.nan))  # not in checkpoints of before it was kept: unknown
    elif transferred and recipe.transfer.reestimate:
        reestimate(model, train, world, recipe.seed, device)
        if average is not None:
            average.load_state_dict(model.state_dict())
    if progress.step > planned:
        raise CheckpointError(f"the checkpoint is at step {progress.step}, the recipe ends at {planned}")

    statistics, readings = ShardStatistics(model), Readings(device)
    saved_at = time.monotonic()
    pace_since, pace_samples = time.perf_counter(), 0
    while progress.step < planned and progress.stopped is None:
        step = progress.step
        if plan.starts_tuning(step):
            progress.waited = progress.cut_wait = progress.cuts = 0
        epoch, shards = batches.shards_of(step)
        count = sum(len(s) for s in shards)
        shares = plan.enter(model, step)
        rows: dict[int, Tensor] = {}  # per shard: loss sum, then batch-norm statistics
        gradients: list[Tensor] = []
        with statistics.per_shard():
            for shard in world.mine(loop.shards):
                index = shards[shard]
                if len(index) == 0:
                    continue
                _seed(recipe.seed, step, shard, device)
                x = train.batch(index, augment=(recipe.seed, epoch) if recipe.data.augments else None)
                y = _onto(torch.from_numpy(train.y[index]), device)
                try:
                    logits = _forward(model, x, loop.bf16, loop.channels_last, device)
                except ValueError as error:  # batch norm's, of one sample whose feature map is one pixel
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise UsageError(
                        f"a shard of {len(index)} sample at step {step} is too small for batch norm",
                        str(error),
                        "choose a loop.batch that leaves more in the last batch, fewer loop.shards, or larger images",
                    ) from error
                loss = task.loss(logits if offset is None else logits + offset, y, class_weight).sum()
                flat.zero_()
                (loss / count).backward()  # type: ignore[no-untyped-call]
                gradients.append(flat.clone())
                rows[shard] = torch.cat([loss.detach().double().reshape(1), *statistics.row()])
        table = world.gather(rows, loop.shards, 1 + statistics.width, device)  # [shards, 1 + S]
        statistics.fold(table[:, 1:], [shard for shard in range(loop.shards) if len(shards[shard]) > 0])
        flat.copy_(world.sum_exact(gradients, loop.shards, flat) if exact else world.sum_float(gradients, flat))
        norm = norm_of(flat)
        if recipe.optim.clip is not None:
            flat.mul_(torch.where(norm > recipe.optim.clip, recipe.optim.clip / norm, 1.0))
        rate = plan.rate(step, progress.cuts)
        optim.step(rate, recipe.optim, shares)
        if average is not None and loop.ema is not None:
            # Young averages follow the weights more closely: otherwise the first epochs score the initial weights
            _update_average(average, model, min(loop.ema, (1 + step) / (10 + step)))
        progress.step = step + 1
        pace_samples += count

        loss_sum = table[:, 0].sum()
        epoch_loss += loss_sum
        readings.add({"step": progress.step, "epoch": epoch, "train/lr": rate}, loss_sum / count, norm)
        ended = progress.step % per_epoch == 0
        due = loop.checkpoint_steps is not None and progress.step % loop.checkpoint_steps == 0
        if not (ended or due or readings.overdue(world)):
            continue
        fetched, failed = readings.fetch(
            f"lower optim.lr (now {recipe.optim.lr:g}) or optim.class_weight, set optim.clip, or look at the inputs"
        )
        pace = pace_samples / (time.perf_counter() - pace_since)
        for metrics in fetched:
            metrics["train/samples_per_s"] = pace
        if ended and failed is None:
            scores = validate(task, average or model, val, world, recipe, device)
            settling = plan.probing(step) and progress.step < planned
            progress.end_epoch(recipe, scores, task.objective, average or model, may_stop=not settling)
            fetched[-1] |= {"train/epoch_loss": float(epoch_loss) / len(train), **name_metrics(scores)}
            if progress.best_epoch == epoch:
                fetched[-1] |= name_metrics(scores, "best/val")
            epoch_loss.zero_()
            pace_since, pace_samples = time.perf_counter(), 0
        asked = any([report(metrics, None) for metrics in fetched])
        if failed is not None:
            raise failed
        last = progress.step == planned or progress.stopped is not None
        overdue = loop.checkpoint_seconds is not None and time.monotonic() - saved_at >= loop.checkpoint_seconds
        if last or due or world.any(asked or overdue):
            saved_at = time.monotonic()
            report({"step": progress.step}, _state(recipe, model, optim, average, progress, epoch_loss))

    digest = weights_sha256(average or model)
    model.load_state_dict(progress.best_model)
    return {
        "steps": progress.step,
        "planned_steps": planned,
        "epochs": progress.step // per_epoch,
        "stopped": progress.stopped or "planned",
        "val": progress.val,
        "best": {"epoch": progress.best_epoch, "step": (progress.best_epoch + 1) * per_epoch, **progress.best},
        "weights_sha256": digest,
    }


def fit_at_once(
    recipe: Recipe, task: Task, model: Fitted, train: Samples, val: Samples, report: Report, device: str = "cpu"
) -> dict[str, Any]:
    """`fit` for a model without steps: one step, one epoch, and no checkpoint, as doing it again takes seconds.

    Every rank fits the same, so that a group of workers gives what one process gives.
    """
    torch.set_num_threads(recipe.loop.threads)
    began = time.perf_counter()
    with torch.no_grad():
        model.fit(train.batch(np.arange(len(train))), train.y)
    pace = len(train) / (time.perf_counter() - began)
    world = World()
    train_loss = task.log_loss(train.y, predict(task, model, train, world, recipe, device))
    scores = validate(task, model, val, world, recipe, device)
    row = {"step": 1, "epoch": 0, "train/loss": train_loss, "train/epoch_loss": train_loss, "train/lr": 0.0}
    row |= {"train/samples_per_s": pace, **name_metrics(scores), **name_metrics(scores, "best/val")}
    report(row, None)
    return {
        "steps": 1,
        "planned_steps": 1,
        "epochs": 1,
        "stopped": "planned",
        "val": scores,
        "best": {"epoch": 0, "step": 1, **scores},
        "weights_sha256": weights_sha256(model),
    }


class Progress:
    """Where a run stands: all of it that is not tensors of model and optimiser."""

    def __init__(
        self,
        step: int = 0,
        cuts: int = 0,
        waited: int = 0,
        cut_wait: int = 0,
        stopped: str | None = None,
        val: Metrics | None = None,
        best: Metrics | None = None,
        best_epoch: int = -1,
        best_model: dict[str, Tensor] | None = None,
        epoch: int = -1,
    ) -> None:
        self.step = step
        self.cuts = cuts  # times the plateau schedule has lowered the rate
        self.waited = waited  # epochs since the best score
        self.cut_wait = cut_wait  # epochs since the best score or the last cut
        self.stopped = stopped
        self.val = val or {}
        self.best = best or {}
        self.best_epoch = best_epoch
        self.best_model = best_model or {}
        self.epoch = epoch  # the last one that ended

    def end_epoch(
        self, recipe: Recipe, scores: Metrics, objective: str, model: nn.Module, may_stop: bool = True
    ) -> None:
        """Keep the best epoch (by the task's validation objective, by loss where that is undefined)."""
        self.epoch += 1
        self.val = scores
        if not self.best or _key(scores, objective) > _key(self.best, objective):
            self.best, self.best_epoch, self.waited, self.cut_wait = scores, self.epoch, 0, 0
            self.best_model = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        else:
            self.waited += 1
            self.cut_wait += 1
        if recipe.schedule.kind == "plateau" and self.cut_wait > recipe.schedule.patience:
            self.cuts, self.cut_wait = self.cuts + 1, 0
        if may_stop and recipe.loop.early_stop is not None and self.waited >= recipe.loop.early_stop:
            self.stopped = "early"

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


@torch.no_grad()
def predict(task: Task, model: nn.Module, samples: Samples, world: World, recipe: Recipe, device: str) -> np.ndarray:
    """Probabilities, float64 [N] (binary) or [N, classes], on every rank alike; rank c mod size scores chunk c."""
    model.eval()
    chunks = [np.arange(a, min(a + EVAL_BATCH, len(samples))) for a in range(0, len(samples), EVAL_BATCH)]
    width = task.outputs(samples.spec)
    rows = {}
    for chunk in world.mine(len(chunks)):
        x = samples.batch(chunks[chunk])
        p = task.probabilities(_forward(model, x, recipe.loop.bf16, recipe.loop.channels_last, device).float().double())
        padded = torch.zeros(EVAL_BATCH, width, dtype=torch.float64)
        padded[: len(p)] = p.cpu().reshape(len(p), width)
        rows[chunk] = padded.reshape(-1)
    table = world.gather(rows, len(chunks), EVAL_BATCH * width).reshape(-1, width)[: len(samples)]
    return table.numpy()[:, 0] if width == 1 else table.numpy()


def validate(
    task: Task, model: nn.Module, samples: Samples, world: World, recipe: Recipe, device: str
) -> dict[str, float]:
    """Loss and point scores over the gathered predictions; never an average of per-rank scores."""
    p = predict(task, model, samples, world, recipe, device)
    return {"loss": task.log_loss(samples.y, p), **task.point(samples.y, p)}


def name_metrics(scores: dict[str, float], prefix: str = "val") -> dict[str, float]:
    """Validation scores under their metric names, `val/auroc`."""
    return {f"{prefix}/{name}": score for name, score in scores.items()}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _forward(model: nn.Module, x: Tensor, bf16: bool, channels_last: bool, device: str) -> Tensor:
    x = _onto(x, device)
    if channels_last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    with torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        out: Tensor = model(x)
    return out.float()


def _onto(x: Tensor, device: str) -> Tensor:
    """x on `device`. From pinned memory, because a GPU's host waits for any other copy to end."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def _flatten_gradients(weights: list[nn.Parameter]) -> Tensor:
    """One vector [P] of which every parameter's gradient is a view, so that a shard's gradient is one copy."""
    flat = torch.zeros(sum(w.numel() for w in weights), device=weights[0].device)
    at = 0
    for w in weights:
        w.grad = flat[at : at + w.numel()].view_as(w)
        at += w.numel()
    return flat


def norm_of(flat: Tensor) -> Tensor:
    """Euclidean norm of a vector, float64, in parts: torch adds up float32 on a CPU one after the other, which is a
    thousandth too little at 20 M elements."""
    whole = len(flat) // NORM_PART * NORM_PART
    parts = torch.linalg.vector_norm(flat[:whole].view(whole // NORM_PART, NORM_PART), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    norm: Tensor = torch.linalg.vector_norm(torch.cat([parts, rest[None]]).double())
    return norm


def _seed(seed: int, step: int, shard: int, device: str) -> None:
    """Dropout and the like: a function of (seed, step, shard), whoever computes the shard."""
    drawn = int(np.random.SeedSequence([seed, step, shard]).generate_state(1, np.uint64)[0] >> 1)
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed does the same for all devices, at .6 ms a call
    if device != "cpu":
        torch.cuda.manual_seed(drawn)


def _key(scores: Metrics, objective: str) -> tuple[float, float]:
    return (scores.get(objective, -math.inf), -scores["loss"])


def _class_weight(recipe: Recipe, train: Samples, device: str) -> Tensor | None:
    if recipe.optim.class_weight is None:
        return None
    return torch.tensor(recipe.optim.class_weight, device=device)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for old, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def _state(
    recipe: Recipe,
    model: nn.Module,
    optim: AdamW,
    average: nn.Module | None,
    progress: Progress,
    epoch_loss: Tensor,
) -> dict[str, Any]:
    """All that a resumed run needs. Sampler position and random numbers are functions of (seed, step): see `_seed`,
    `shards_of` and the loaders' augmentation, so seed and step are their whole state."""
    return {
        "seed": recipe.seed,
        "model": model.state_dict(),
        "optim": optim.state_dict(),
        "average": average.state_dict() if average is not None else None,
        "progress": progress.state(),
        "epoch_loss": epoch_loss,
    }
