"""A task is data, recipes, an outcome and the scores that count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylab.config.recipe import NetworkModel, Recipe, Search
from raylab.tasks.outcomes import Outcome

if TYPE_CHECKING:  # `raylab recipe` and `compare` read tasks, and need no torch, which takes seconds to load
    from torch import nn

    from raylab.data.samples import Samples


@dataclass(frozen=True)
class Task:
    """What a run needs to know of its problem. A new one is a file beside this, and a line in TASKS."""

    name: str
    kind: Literal["icu", "images", "sweep"]
    """of its data: which preparation, and what is said of its scores beyond their intervals"""
    outcome: Outcome
    objective: str
    """the validation score that picks epochs and trials; higher is better"""
    load: Callable[[Path, str, Any, dict[str, Any] | None], "Samples"]
    """(prepared directory, split, recipe.data, spec of a trained model or None) -> samples"""
    full: Recipe
    smoke: Recipe
    """the recipes that ship"""
    primary: tuple[str, ...]
    """scores that tables show, the one that ranks first"""
    secondary: tuple[str, ...] = ()
    """scores that reports show beside them; `sensitivity/` stands for that of every class"""
    searches: Mapping[str, Search] = field(default_factory=dict)
    """what `tune` searches for models other than that of the recipe, by the model's name"""

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
