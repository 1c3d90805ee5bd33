"""Check a finished run against its ledger: the chain, the repeated steps, the model, and intervals computed again.

The ledger has the loss of every step and the hash of the state at every checkpoint, and its chain covers them. So an
interval begins at a checkpoint that is kept (or at step 0, where the recipe gives the state) and ends at the next
checkpoint in the ledger, whether that one is kept or not: computed again, all its losses and the state at its end must
be equal to the bit.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raylab.config.overrides import without_weights
from raylab.config.recipe import Recipe
from raylab.data.prepared import sha256
from raylab.errors import CheckpointError, DataError
from raylab.models.baselines import Fitted
from raylab.tasks import find_task
from raylab.training import checkpoint, ledger
from raylab.training.loop import Report, Training
from raylab.training.progress import Metrics
from raylab.training.run import WEIGHTS, inherit, is_transferred


class Interval(NamedTuple):
    """Steps `start` + 1 to `stop`, both of which are in the ledger as checkpoints; 0 is the beginning."""

    start: int
    stop: int


@dataclass(frozen=True)
class Claims:
    """What a ledger claims."""

    losses: dict[int, float]
    states: dict[int, str]
    """SHA-256 of the state by step, of the checkpoints that have one"""
    contradictions: list[str]
    """steps and checkpoints that two attempts computed with different results, and missing steps"""
    finish: ledger.Finish | None
    recipes: set[str]
    """hashes of the recipes with which attempts started"""


def read_claims(entries: Iterable[ledger.Entry]) -> Claims:
    """Collect what the entries of a ledger claim."""
    losses: dict[int, float] = {}
    states: dict[int, str] = {}
    wrong: list[str] = []
    recipes: set[str] = set()
    finish = None
    for entry in entries:
        if isinstance(entry, ledger.Step):
            if losses.setdefault(entry.step, entry.loss) != entry.loss:
                wrong.append(f"step {entry.step} has two losses: {losses[entry.step]!r}, {entry.loss!r}")
        elif isinstance(entry, ledger.Checkpoint) and entry.state_sha256:
            if states.setdefault(entry.checkpoint, entry.state_sha256) != entry.state_sha256:
                wrong.append(f"the checkpoint of step {entry.checkpoint} has two states")
        elif isinstance(entry, ledger.Finish):
            finish = entry
        elif isinstance(entry, ledger.Start) and entry.recipe_sha256:
            recipes.add(entry.recipe_sha256)
    if missing := ledger.count_gaps(set(losses)):
        first = next(step for step in itertools.count(1) if step not in losses)
        wrong.append(f"{missing} steps are missing, the first is step {first}")
    if len(recipes) > 1:
        wrong.append("attempts started with different recipes")
    return Claims(losses, states, wrong, finish, recipes)


def list_intervals(states: dict[int, str], kept: Iterable[int]) -> list[Interval]:
    """The intervals that can be computed again, from the steps of the checkpoints in the ledger and those kept."""
    steps = sorted(states)
    starts = {0, *kept}
    return [
        Interval(start, stop)
        for start, stop in zip([0, *steps], steps, strict=False)
        if start in starts and (start == 0 or start in states)
    ]


def check_model(directory: Path, claims: Claims) -> list[str]:
    """What is wrong with the model and the newest checkpoint of the finished run in `directory`: the file must be the
    one in the ledger, and the best network of the last state."""
    if claims.finish is None:
        return ["the ledger has no end: the run has not finished, or an earlier version wrote it"]
    wrong = []
    model = directory / "model" / WEIGHTS
    if not model.is_file() or sha256(model) != claims.finish.model_sha256:
        wrong.append(f"model/{WEIGHTS} is not the file that the ledger names")
    for path in checkpoint.list_checkpoints(directory / "checkpoints"):
        if not checkpoint.is_valid(path):
            wrong.append(f"checkpoints/{path.name} is damaged: its checksum does not match")
            continue
        try:
            state, step = checkpoint.load(path), int(path.name.removeprefix("step-"))
        except CheckpointError as error:
            wrong.append(f"checkpoints/{path.name} could not be read: {error.why}")
            continue
        if step in claims.states and checkpoint.hash_state(state) != claims.states[step]:
            wrong.append(f"checkpoints/{path.name} does not have the state that the ledger names")
        elif step == claims.finish.finished and model.is_file():
            wrong += _compare_model(model, state.get("progress", {}).get("best_model", {}))
    return wrong


def _compare_model(model: Path, best: dict[str, Any]) -> list[str]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(model)
    except (OSError, SafetensorError) as error:
        return [f"model/{WEIGHTS} could not be read as safetensors: {error}"]
    same = tensors.keys() == best.keys() and all(torch.equal(tensors[name], best[name].cpu()) for name in best)
    return [] if same else [f"model/{WEIGHTS} is not the best network of the last checkpoint"]


class _Losses(Report):
    """Remembers the loss of every step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
        if state is None:
            self.losses[metrics["step"]] = metrics["train/loss"]
        return False


class Verifier:
    """Computes intervals of the run in `directory` again, in this process, on its CPU.

    Raises DataError for a run whose bits nothing promises: one on GPUs, one with floating-point sums over shards, and a
    model that is fitted at once.
    """

    def __init__(self, directory: Path, recipe: Recipe, data: Path, parent: Path | None) -> None:
        if recipe.scaling.gpu or recipe.loop.gradient_reduction == "float":
            raise DataError(
                f"run {directory.name} cannot be verified to the bit",
                "it was trained on GPUs, or with loop.gradient_reduction=float, whose sums depend on the order",
                "verify runs on CPUs with the exact sum, which is the default there",
            )
        scratch = recipe.transfer.mode == "scratch"
        self.recipe = without_weights(recipe) if scratch else recipe
        self.directory, self.parent = directory, None if scratch else parent
        self.transferred = is_transferred(recipe, parent)
        self.task = find_task(recipe.task)
        self.train = self.task.load(data, "train", recipe.data, None)
        self.val = self.task.load(data, "val", recipe.data, self.train.spec)

    def check(self, interval: Interval, claims: Claims) -> str | None:
        """Compute an interval again; returns the first difference from what the ledger claims, None if all is equal."""
        losses, state = self.compute(interval)
        for step in range(interval.start + 1, interval.stop + 1):
            if losses.get(step) != claims.losses.get(step):
                return f"step {step}: loss {losses.get(step)!r}, the ledger has {claims.losses.get(step)!r}"
        if state != claims.states[interval.stop]:
            return f"step {interval.stop}: all losses are equal, but the state is not"
        return None

    def compute(self, interval: Interval) -> tuple[dict[int, float], str]:
        """Train from the state at the start of an interval to its end; returns losses by step and the state's hash."""
        model, report = self.task.model(self.recipe, self.train.spec), _Losses()
        if isinstance(model, Fitted):
            raise DataError(f"run {self.directory.name} has no steps", "its model is fitted at once", "raylab rerun")
        if interval.start == 0 and self.parent is not None:
            inherit(model, self.parent, self.train.spec)
        place = self.directory / "checkpoints" / f"step-{interval.start:08d}"
        begin = checkpoint.load(place) if interval.start else None
        training = Training(
            self.recipe, self.task, model, self.train, self.val, report, "cpu", self.transferred, lambda: begin
        )
        last = (training.train_step, training.save, training.finish)
        try:
            training.regroup()
            while (action := training.next_action()) is not None:
                if training.progress.step == interval.stop and action in last:
                    break  # all that the checkpoint of this step has seen is done
                action()
            return report.losses, checkpoint.hash_state(training.state())
        finally:
            training.inputs.close()
