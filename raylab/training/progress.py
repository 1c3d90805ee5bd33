"""The progress of a run: its step, its best epoch, and its counters of patience."""

import math
from typing import Any

from torch import Tensor, nn

from raylab.config.recipe import Recipe

Metrics = dict[str, Any]


class Progress:
    """The state of a run except the tensors of model and optimizer."""

    def __init__(
        self,
        step: int = 0,
        lr_reductions: int = 0,
        epochs_since_best: int = 0,
        epochs_since_lr_reduction: int = 0,
        stopped: str | None = None,
        val: Metrics | None = None,
        best: Metrics | None = None,
        best_epoch: int = -1,
        best_model: dict[str, Tensor] | None = None,
        epoch: int = -1,
    ) -> None:
        self.step = step
        self.lr_reductions = lr_reductions  # by the plateau schedule
        self.epochs_since_best = epochs_since_best
        self.epochs_since_lr_reduction = epochs_since_lr_reduction  # or since the best score, if that was later
        self.stopped = stopped
        self.val = val or {}
        self.best = best or {}
        self.best_epoch = best_epoch
        self.best_model = best_model or {}
        self.epoch = epoch  # the last one that ended

    def end_epoch(
        self, recipe: Recipe, scores: Metrics, objective: str, model: nn.Module, may_stop: bool = True
    ) -> None:
        """Record the scores of an epoch; keep its weights if it is the best by the task's validation objective, or by
        loss if that is undefined; and stop early if the patience is used up."""
        self.epoch += 1
        self.val = scores
        if not self.best or _key(scores, objective) > _key(self.best, objective):
            self.best, self.best_epoch = scores, self.epoch
            self.epochs_since_best = self.epochs_since_lr_reduction = 0
            self.best_model = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        else:
            self.epochs_since_best += 1
            self.epochs_since_lr_reduction += 1
        if recipe.schedule.kind == "plateau" and self.epochs_since_lr_reduction > recipe.schedule.patience:
            self.lr_reductions, self.epochs_since_lr_reduction = self.lr_reductions + 1, 0
        patience = recipe.loop.early_stopping_patience
        if may_stop and patience is not None and self.epochs_since_best >= patience:
            self.stopped = "early"

    def reset_patience(self) -> None:
        """Restart the counters, because each phase has its own patience."""
        self.epochs_since_best = self.epochs_since_lr_reduction = self.lr_reductions = 0

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def _key(scores: Metrics, objective: str) -> tuple[float, float]:
    return (scores.get(objective, -math.inf), -scores["loss"])
