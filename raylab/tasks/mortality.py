"""Mortality: whether a patient dies in hospital, from the first hours in intensive care (Johnson et al., "Predicting
in-hospital mortality of ICU patients: the PhysioNet/Computing in Cardiology Challenge 2012")."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylab.config.recipe import IcuData, Recipe
from raylab.tasks import ards
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Binary

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import Samples


class MortalityRecipe(ards.IcuRecipe):
    task: Literal["mortality"]
    """name of the task"""


def load(directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> "Samples":
    from raylab.data.icu.dataset import load_icu

    return load_icu(directory, split, data.cohort, spec, data.fill, data.virtual_patient, task="mortality")


def of_ards(recipe: Recipe) -> MortalityRecipe:
    """The same recipe for this task: the inputs are those of ards."""
    return MortalityRecipe.model_validate({**recipe.model_dump(), "task": "mortality"})


TASK = Task(
    name="mortality",
    kind="icu",
    outcome=Binary(),
    objective="auroc",
    load=load,
    full=of_ards(ards.FULL),
    smoke=of_ards(ards.SMOKE),
    searches=ards.SEARCHES,
    primary=("auroc", "auprc"),
    secondary=("brier", "calibration_slope"),
)
