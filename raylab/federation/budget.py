"""What a run with a privacy budget spends: the check before it begins, the statistics with noise, and the account."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raylab.config.recipe import Recipe
from raylab.data.moments import settle_moments
from raylab.data.sampler import site_rows, steps_per_epoch
from raylab.data.samples import Samples
from raylab.errors import DataError, UsageError
from raylab.federation import fixed_point
from raylab.federation.agreement import Agreement
from raylab.federation.federation import Counts, Federation
from raylab.federation.privacy import MOST_VALUES, Privacy, count_participation
from raylab.federation.rounds import Round
from raylab.federation.sums import Sums
from raylab.tasks.base import SiteStatistics, Task
from raylab.training.batchnorm import ShardStatistics


def check_budget(
    agreement: Agreement, privacy: Privacy, recipe: Recipe, task: Task, members: Mapping[str, Path], sums: Sums
) -> Counts:
    """Return the rows of all sites; UsageError, before anything else of the rows is sent, if the network has batch norm
    or the planned steps would spend more than the budget. A collective."""
    train = {name: task.load(directory, "train", recipe.data, None) for name, directory in members.items()}
    val = {name: task.load(directory, "val", recipe.data, train[name].spec) for name, directory in members.items()}
    for samples in train.values():
        model = task.model(recipe, samples.spec)
        if ShardStatistics(model).layers:
            raise UsageError(
                f"the network '{recipe.model.name}' has batch norm, and a run with a privacy budget cannot",
                "its statistics are values of the rows without a bound",
                "choose a network without batch norm",
            )
        if (size := sum(weight.numel() for weight in model.parameters())) > MOST_VALUES:
            raise UsageError(f"the network has {size:,} weights, a run with a privacy budget {MOST_VALUES:,} at most")
    own = [Counts.of(task, train[name], val[name]).without_classes().to_integers() for name in members]
    counts = Counts.from_integers(sums.add_up(Round("rows", 0), fixed_point.add_all(own)))
    epochs = recipe.loop.epochs
    steps = epochs * steps_per_epoch(counts.train, recipe.loop.global_batch_size)
    for name in members:
        participation = largest_participation(agreement, recipe.seed, name, train[name], val[name], steps, epochs)
        if (epsilon := privacy.spent_epsilon(len(agreement.sites), participation)) > privacy.epsilon:
            needed = privacy.find_multiplier(len(agreement.sites), participation)
            raise UsageError(
                f"{steps} steps would spend epsilon {epsilon:.3g} of the patients of site '{name}', "
                f"{privacy.epsilon:g} is agreed",
                f"noise multiplier {privacy.noise_multiplier:g}, delta {privacy.delta:g}",
                f"make a new agreement with --noise-multiplier {needed:g} or more, fewer epochs, or a larger --epsilon",
            )
    return counts


def pool_noisy_statistics(
    agreement: Agreement, privacy: Privacy, statistics: SiteStatistics, members: Mapping[str, Path], sums: Sums
) -> tuple[NDArray[np.float64], int]:
    """Return the sums of the statistics over all patients, with noise, and how many inputs that are measured here do
    not stand out from it, and are left out. DataError if no input does. A collective."""
    assert statistics.add_up_patients is not None, "check_private has looked"
    parts = {name: statistics.add_up_patients(directory) for name, directory in members.items()}
    bound = math.sqrt(next(iter(parts.values())).shape[1])  # of values between 0 and 1
    scale = privacy.scale(len(agreement.sites), bound)
    own = fixed_point.add_all([np.rint(part * scale).astype(np.int64).sum(0) for part in parts.values()])
    total = sums.add_up(Round("statistics", 0), own, noisy=len(own))
    settled = settle_moments(total / scale, privacy.deviation(len(agreement.sites), bound))
    is_here, is_clear = (counts.reshape(3, -1)[0] > 0 for counts in (own, settled))
    if not is_clear.any():
        raise DataError(
            "no input of the model stands out from the noise: there are too few patients",
            f"noise multiplier {privacy.noise_multiplier:g}; one sum of the statistics is spent",
            "make a new agreement with less noise, or with more patients",
        )
    return settled, int((is_here & ~is_clear).sum())


def spent_epsilon(federation: Federation, site: str, steps: int) -> float:
    """Return the epsilon that the patients of a site that is here spend in so many steps of a run with a privacy
    budget."""
    agreement, privacy = federation.agreement, federation.agreement.privacy
    assert privacy is not None
    epochs = steps // federation.steps_per_epoch
    train, val = federation.train[site], federation.val[site]
    participation = largest_participation(agreement, federation.recipe.seed, site, train, val, steps, epochs)
    return privacy.spent_epsilon(len(agreement.sites), participation)


def largest_participation(
    agreement: Agreement, seed: int, site: str, train: Samples, val: Samples, steps: int, epochs: int
) -> int:
    """The participation of the patient of a site that takes part in most sums of a run: of train in one sum of the
    statistics and in steps, of val in the loss after each epoch."""
    number, rows = agreement.names.index(site), agreement.find(site).rows
    read = (site_rows(step, len(train), rows, seed, number) for step in range(steps))
    of_train = 1 + count_participation(train.group, read)
    return max(of_train, epochs * count_participation(val.group, [np.arange(len(val))]))
