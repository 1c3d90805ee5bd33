"""What several sites train together: their agreement, and the rows of those sites that are in this process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylab.config.recipe import Recipe
from raylab.data.sampler import steps_per_epoch
from raylab.data.samples import Samples
from raylab.federation.agreement import Agreement
from raylab.federation.fixed_point import Integers
from raylab.federation.sums import Sums
from raylab.tasks.base import Task


@dataclass(frozen=True)
class Counts:
    """Rows of all sites: of train, of val, and of train by class [classes], unless a privacy budget hides these."""

    train: int
    val: int
    classes: tuple[int, ...]

    @classmethod
    def of(cls, task: Task, train: Samples, val: Samples) -> "Counts":
        """Count the rows of one site; one with several labels counts in each of its classes."""
        return cls(len(train), len(val), tuple(task.outcome.class_counts(train).values()))

    def without_classes(self) -> "Counts":
        """The same without the rows by class."""
        return Counts(self.train, self.val, ())

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


@dataclass(frozen=True)
class Federation:
    """What the sites have agreed on and found out together before the first step.

    train, val   the samples of the sites that are here, by site, with the statistics of all sites
    """

    agreement: Agreement
    recipe: Recipe
    task: Task
    train: Mapping[str, Samples]
    val: Mapping[str, Samples]
    counts: Counts
    sums: Sums
    inputs_left_out: int
    """inputs that are measured here, and do not stand out from the noise of a privacy budget"""

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the sites have used as many rows as all of them have."""
        return steps_per_epoch(self.counts.train, self.recipe.loop.global_batch_size)

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return self.recipe.loop.epochs * self.steps_per_epoch
