"""Rare classes, three ways that a recipe may combine: a fraction of every batch (`data.class_fraction`), a weight in
the loss (`optim.class_weight`), and logit adjustment (`optim.logit_adjustment`)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raylab.config.recipe import Recipe
from raylab.data.sampler import balanced_shards_of, shards_of, steps_per_epoch
from raylab.data.samples import Samples
from raylab.errors import DataError, UsageError, unknown


@dataclass(frozen=True)
class Batches:
    """What of the training rows each step sees."""

    per_epoch: int
    shards_of: Callable[[int], tuple[int, list[np.ndarray]]]


def sampler(recipe: Recipe, train: Samples) -> Batches:
    """The batches of a run: plain, or with recipe.data.class_fraction of one class in each."""
    batch, shards, seed, share = (
        recipe.loop.global_batch_size,
        recipe.loop.shards,
        recipe.seed,
        recipe.data.class_fraction,
    )
    per_epoch = steps_per_epoch(len(train), batch)
    if share is None:
        return Batches(per_epoch, lambda step: shards_of(step, len(train), batch, shards, seed))
    chosen = train.y == _chosen(recipe, train.spec["classes"])
    return Batches(per_epoch, lambda step: balanced_shards_of(step, chosen, batch, shards, seed, share))


def prior(recipe: Recipe, train: Samples) -> np.ndarray:
    """How often each class is met in training, float64 [classes], summing to 1."""
    classes = train.spec["classes"]
    seen = np.bincount(train.y, minlength=len(classes)) / len(train)
    if recipe.data.class_fraction is not None:
        k = _chosen(recipe, classes)
        seen *= (1 - recipe.data.class_fraction) / (1 - seen[k])
        seen[k] = recipe.data.class_fraction
    return seen


def offsets(recipe: Recipe, train: Samples, device: str) -> Tensor | None:
    """What is added to the logits in the loss: tau log prior (Menon et al., arXiv 2007.07314, equation 10), of a
    binary task the difference of the two. Predictions use the plain logits, which are then those of equal classes."""
    tau = recipe.optim.logit_adjustment
    if tau == 0:
        return None
    log_prior = tau * np.log(prior(recipe, train))
    values = log_prior if len(log_prior) > 2 else log_prior[1:] - log_prior[:1]
    return torch.tensor(values, dtype=torch.float32, device=device)


def check(recipe: Recipe, train: Samples) -> None:
    """Raise for a class without training rows, and for settings that the classes do not fit."""
    classes = train.spec["classes"]
    if train.y.ndim > 1:  # values, not classes
        if (
            recipe.optim.class_weight is not None
            or recipe.data.class_fraction is not None
            or recipe.optim.logit_adjustment
        ):
            raise UsageError("a regression has no classes", do="leave class_weight, share and logit_adjustment alone")
        return
    if absent := [name for k, name in enumerate(classes) if not (train.y == k).any()]:
        raise DataError(
            f"no row of class {', '.join(absent)} in the training data",
            "a class that was never seen cannot be learnt",
            "prepare lists that have all classes",
        )
    weights = recipe.optim.class_weight
    if weights is not None and len(weights) != len(classes):
        raise UsageError(
            f"optim.class_weight has {len(weights)} values for {len(classes)} classes",
            do=f"one weight for each of: {', '.join(classes)}",
        )
    if recipe.data.class_fraction_of is not None:
        _chosen(recipe, classes)


def _chosen(recipe: Recipe, classes: list[str]) -> int:
    name = recipe.data.class_fraction_of
    if name is None:
        return len(classes) - 1
    if name not in classes:
        raise unknown("class", name, classes)
    return classes.index(name)
