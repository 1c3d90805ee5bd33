"""A task is data + model + loss + score. A new one is a function here or in its own file, and a line in TASKS."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raylab.config.recipe import Data, IcuData, ImageData, NetworkModel, Recipe
from raylab.data.icu.dataset import load_icu
from raylab.data.images.augment import AUGMENT
from raylab.data.images.dataset import load_images
from raylab.data.lung.sweep_dataset import load_sweep, outputs
from raylab.data.samples import Samples
from raylab.errors import unknown
from raylab.evaluation.metrics import binary_scores, multiclass_scores, point, regression_scores
from raylab.models import network
from raylab.models.ensemble import Ensemble

EPSILON = 1e-7  # probabilities are kept this far from 0 and 1 in a log loss


@dataclass(frozen=True)
class Task:
    """What a run needs to know of its problem; the network itself is in MODELS, chosen by the recipe."""

    name: str
    outcome: Literal["binary", "multiclass", "regression"]  # of a regression, "classes" of the spec are its outputs
    objective: str  # the validation score that picks epochs and trials; higher is better
    load: Callable[[Path, str, Any, dict[str, Any] | None], Samples]
    """(prepared directory, split, recipe.data, spec of a trained model or None) -> samples"""

    def outputs(self, spec: dict[str, Any]) -> int:
        return 1 if self.outcome == "binary" else len(spec["classes"])

    def model(self, recipe: Recipe, spec: dict[str, Any]) -> nn.Module:
        """A freshly initialised network: the same weights for the same seed."""
        make = network(spec["kind"], recipe.model.name)
        members = []
        for member in range(recipe.model.members if isinstance(recipe.model, NetworkModel) else 1):
            torch.manual_seed(recipe.seed + member)
            members.append(make(recipe.model, spec, self.outputs(spec)))
        return members[0] if len(members) == 1 else Ensemble(members)

    def loss(self, logits: Tensor, y: Tensor, class_weight: Tensor | None) -> Tensor:
        """Loss of each sample, [B], from logits [B, outputs] and classes int64 [B] (of a regression, values float32
        [B, outputs]); of an ensemble's logits [B, members, outputs], the mean of the members' losses."""
        if logits.ndim == 3:
            return torch.stack([self.loss(member, y, class_weight) for member in logits.unbind(1)]).mean(0)
        if self.outcome == "regression":
            return (logits - y).square().mean(1)
        if self.outcome == "binary":
            each = F.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype), reduction="none")
        else:
            each = F.cross_entropy(logits, y, reduction="none")
        return each if class_weight is None else each * class_weight[y]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[B, outputs] in the logits' type: of the positive class, or of each class, or the values of a regression; of
        an ensemble, the mean."""
        if self.outcome == "regression":
            return logits.mean(1) if logits.ndim == 3 else logits
        p = torch.sigmoid(logits) if self.outcome == "binary" else torch.softmax(logits, -1)
        return p.mean(1) if logits.ndim == 3 else p

    def log_loss(self, y: np.ndarray, p: np.ndarray) -> float:
        """Mean negative log likelihood of y int [N] under p [N] or [N, K]; of a regression, the mean squared error."""
        if self.outcome == "regression":
            return float(np.square(p - y).mean())
        of_truth = np.where(y == 1, p, 1 - p) if self.outcome == "binary" else p[np.arange(len(y)), y]
        return float(-np.log(np.clip(of_truth, EPSILON, 1)).mean())

    def point(self, y: np.ndarray, p: np.ndarray) -> dict[str, float]:
        return point(self.outcome, y, p)

    def scores(self, samples: Samples, p: np.ndarray, bootstraps: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Every score with its 95 % interval, clustered by patient."""
        if self.outcome == "binary":
            return binary_scores(samples.y, p, samples.group, bootstraps, seed)
        classes = samples.spec["classes"]
        if self.outcome == "regression":
            truth, values = outputs(samples.y, samples.spec), outputs(p, samples.spec)
            return regression_scores(truth, values, samples.group, classes, bootstraps, seed)
        return multiclass_scores(samples.y, p, samples.group, classes, samples.source, bootstraps, seed)


def _icu(directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> Samples:
    return load_icu(directory, split, data.cohort, spec, data.fill, data.virtual_patient)


def _images(directory: Path, split: str, data: ImageData, spec: dict[str, Any] | None) -> Samples:
    augment = {name: value * data.strength for name, value in AUGMENT.items() if name != "flip"}
    return load_images(directory, split, size=data.size, spec=spec, augment=augment, mask=data.mask)


def _sweep(directory: Path, split: str, data: Data, spec: dict[str, Any] | None) -> Samples:
    return load_sweep(directory, split, spec)


TASKS = {
    "ards": Task("ards", "binary", "auroc", _icu),
    "covidnet": Task("covidnet", "multiclass", "macro_recall", _images),
    "surrogate": Task("surrogate", "regression", "r2_min", _sweep),
}


def task(name: str) -> Task:
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
