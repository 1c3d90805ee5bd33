"""A task is data, recipes, an outcome and the scores that count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylab.config.recipe import NetworkModel, Recipe, Search
from raylab.data.prepared import Meta, read_meta
from raylab.tasks.outcomes import Outcome
from raylab.tasks.preparation import Preparation

if TYPE_CHECKING:  # `raylab recipe` and `compare` read tasks, and need no torch, which takes seconds to load
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from raylab.data.samples import NewRows, Samples


@dataclass(frozen=True)
class Frame:
    """A frame of new data: `columns` as (name, type, whether it is required), and the rows of a SYNTHETIC `example`.
    `results` and `remarks` are (name, type) of the columns before and after those of the prediction in its answer."""

    columns: tuple[tuple[str, Literal["string", "double"], bool], ...]
    results: tuple[tuple[str, Literal["string", "double"]], ...]
    remarks: tuple[tuple[str, Literal["string", "strings"]], ...]
    example: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True)
class SiteStatistics:
    """How several sites form the statistics of their inputs from sums, without showing one another their own."""

    add_up: Callable[[Any, Path], "NDArray[np.float64]"]
    """(meta, prepared directory) of a site -> its sums, a vector of the same length at every site"""
    pool: Callable[[Any, "NDArray[np.float64]"], dict[str, Any]]
    """(meta of a site, sums of all sites) -> spec of a model trained on all of them"""
    bound: float
    """magnitude that no sum of all sites exceeds"""
    add_up_patients: Callable[[Path], "NDArray[np.float64]"] | None = None
    """prepared directory -> what each training patient adds, [patients, K], between 0 and 1: sums of it can have noise
    that hides a patient. None where the task has no such sums"""


@dataclass(frozen=True)
class Task:
    """What a run needs to know of its problem. A new one is a file beside this, and a line in TASKS."""

    name: str
    kind: Literal["icu", "images", "scenes", "sections", "sweep"]
    """of its data: which preparation, and what is said of its scores beyond their intervals"""
    outcome: Outcome
    objective: str
    """the validation score that picks epochs and trials; higher is better"""
    load: Callable[[Path, str, Any, dict[str, Any] | None], "Samples"]
    """(prepared directory, split, recipe.data, spec of a trained model or None) -> samples"""
    meta: type[Meta]
    """of its prepared directories"""
    full: Recipe
    smoke: Recipe
    """the recipes that ship"""
    primary: tuple[str, ...]
    """scores that tables show, the one that ranks first"""
    secondary: tuple[str, ...] = ()
    """scores that reports show beside them; `sensitivity/` stands for that of every class"""
    preparation: Preparation[Any, Any] | None = None
    """what `raylab prepare` does for it; None where another verb makes its data"""
    data_of: str | None = None
    """the task whose prepared directories it reads, if not its own"""
    read_new: Callable[[Any, Any, dict[str, Any]], "NewRows"] | None = None
    """(new data without labels, recipe.data, spec of a trained model) -> rows to predict, prepared as `preparation`
    prepares; None where raylab does not predict new data"""
    frame: "Frame | None" = None
    """the frame that `read_new` takes; None where it takes something else"""
    site_statistics: SiteStatistics | None = None
    """None where `raylab federate` does not train it"""
    searches: Mapping[str, Search] = field(default_factory=dict)
    """what `tune` searches for models other than that of the recipe, by the model's name"""
    benchmark_members: int = 1
    """networks in the ensembles that its benchmark compares; if its recipe has fewer, `train` says how to get them"""

    @property
    def data_task(self) -> str:
        """The task for which its directories are prepared."""
        return self.data_of or self.name

    def read_meta(self, directory: Path) -> Meta:
        """The checked meta.json of a directory prepared for this task."""
        return read_meta(directory, self.data_task, self.meta)

    def model(self, recipe: Recipe, spec: dict[str, Any]) -> "nn.Module":
        """A freshly initialised network: the same weights for the same seed."""
        import torch

        from raylab.models import network
        from raylab.models.ensemble import Ensemble

        make = network(spec["kind"], recipe.model.name)
        members = []
        for member in range(recipe.model.members if isinstance(recipe.model, NetworkModel) else 1):
            torch.manual_seed(recipe.seed + member)
            members.append(make(recipe.model, spec, self.outcome.count(spec)))
        return members[0] if len(members) == 1 else Ensemble(members)
