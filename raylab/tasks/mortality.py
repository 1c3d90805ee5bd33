"""Mortality: whether a patient dies in hospital, from the first hours in intensive care (Johnson et al., "Predicting
in-hospital mortality of ICU patients: the PhysioNet/Computing in Cardiology Challenge 2012")."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from raylab.config.recipe import BoostingModel, IcuData, LinearModel, Recipe, RecurrentModel, family_name
from raylab.data.icu.dataset import load_icu
from raylab.data.samples import Samples
from raylab.tasks import ards
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Binary


class MortalityRecipe(Recipe):
    families = (RecurrentModel, BoostingModel, LinearModel)

    task: Literal["mortality"]
    """name of the task"""
    data: IcuData = IcuData()
    model: Annotated[
        Annotated[RecurrentModel, Tag("RecurrentModel")]
        | Annotated[BoostingModel, Tag("BoostingModel")]
        | Annotated[LinearModel, Tag("LinearModel")],
        Discriminator(family_name),
    ]


def load(directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> Samples:
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
