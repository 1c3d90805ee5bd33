"""Three ways to handle rare classes, which a recipe can combine: a fixed fraction of every batch
(`data.class_fraction`), a weight in the loss (`optim.class_weight`), logit adjustment (`optim.logit_adjustment`)."""

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
    """The plan of batches: how many per epoch, and the epoch and shards (row indices) of each step."""

    per_epoch: int
    shards_of: Callable[[int], tuple[int, list[np.ndarray]]]


def sampler(recipe: Recipe, train: Samples) -> Batches:
    """Return the batches of a run: uniform, or with recipe.data.class_fraction of one class in each."""
    batch, shards, seed, class_fraction = (
        recipe.loop.global_batch_size,
        recipe.loop.shards,
        recipe.seed,
        recipe.data.class_fraction,
    )
    per_epoch = steps_per_epoch(len(train), batch)
    if class_fraction is None:
        return Batches(per_epoch, lambda step: shards_of(step, len(train), batch, shards, seed))
    in_class = train.y == _class_index(recipe, train.spec["classes"])
    return Batches(per_epoch, lambda step: balanced_shards_of(step, in_class, batch, shards, seed, class_fraction))


def prior(recipe: Recipe, train: Samples) -> np.ndarray:
    """Return the frequency of each class in training batches, float64 [classes], summing to 1."""
    classes = train.spec["classes"]
    frequencies = np.bincount(train.y, minlength=len(classes)) / len(train)
    if recipe.data.class_fraction is not None:
        k = _class_index(recipe, classes)
        frequencies *= (1 - recipe.data.class_fraction) / (1 - frequencies[k])
        frequencies[k] = recipe.data.class_fraction
    return frequencies


def offsets(recipe: Recipe, train: Samples, device: str) -> Tensor | None:
    """Return the offsets that the loss adds to the logits in training on `train`; None if there are none."""
    return None if recipe.optim.logit_adjustment == 0 else offsets_of(recipe, prior(recipe, train), device)


def offsets_of(recipe: Recipe, frequencies: np.ndarray, device: str) -> Tensor | None:
    """Return the offsets that the loss adds to the logits: tau log prior (Menon et al., arXiv 2007.07314, equation 10),
    for a binary task the difference of the two; None if tau is 0. Predictions use the logits without offsets, which
    then correspond to balanced classes. `frequencies` of the classes in training batches sum to 1."""
    tau = recipe.optim.logit_adjustment
    if tau == 0:
        return None
    log_prior = tau * np.log(frequencies)
    values = log_prior if len(log_prior) > 2 else log_prior[1:] - log_prior[:1]
    return torch.tensor(values, dtype=torch.float32, device=device)


def check(recipe: Recipe, train: Samples) -> None:
    """Raise DataError for a class without training rows, and UsageError for settings that do not match the classes."""
    classes = train.spec["classes"]
    absent = [] if train.y.ndim > 1 else [name for k, name in enumerate(classes) if not (train.y == k).any()]
    if absent:
        raise DataError(
            f"no row of class {', '.join(absent)} in the training data",
            "a model cannot learn a class without examples",
            "prepare lists that contain all classes",
        )
    check_settings(recipe, train)


def check_settings(recipe: Recipe, train: Samples) -> None:
    """Raise UsageError for settings that do not match the classes of `train`, whatever rows it has."""
    classes = train.spec["classes"]
    if train.y.ndim > 1:  # values, or several classes
        if (
            recipe.optim.class_weight is not None
            or recipe.data.class_fraction is not None
            or recipe.optim.logit_adjustment
        ):
            raise UsageError(
                "no row is of one class: it is a regression, or has several labels",
                do="remove class_weight, class_fraction and logit_adjustment",
            )
        return
    weights = recipe.optim.class_weight
    if weights is not None and len(weights) != len(classes):
        raise UsageError(
            f"optim.class_weight has {len(weights)} values for {len(classes)} classes",
            do=f"give one weight for each of: {', '.join(classes)}",
        )
    if recipe.data.class_fraction_of is not None:
        _class_index(recipe, classes)


def _class_index(recipe: Recipe, classes: list[str]) -> int:
    name = recipe.data.class_fraction_of
    if name is None:
        return len(classes) - 1
    if name not in classes:
        raise unknown("class", name, classes)
    return classes.index(name)
