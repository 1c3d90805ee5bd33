"""Pretraining on brain sections without labels: patches that lie beside each other get similar embeddings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylab.data.images.sections.meta import SectionMeta
from raylab.tasks import sections
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Proximity
from raylab.tasks.scenes import SceneData

if TYPE_CHECKING:  # as in base.py
    from raylab.data.images.sections.dataset import SectionSamples

NAME = "sections-pretraining"


class PretrainingRecipe(sections.PatchRecipe):
    task: Literal["sections-pretraining"]
    """name of the task"""


def adopt(recipe: sections.SectionRecipe) -> PretrainingRecipe:
    """The recipe of depths, for this task."""
    return PretrainingRecipe.model_validate({**dict(recipe), "task": NAME})


def load(directory: Path, split: str, data: SceneData, spec: dict[str, Any] | None) -> "SectionSamples":
    from raylab.data.images.sections.dataset import load_sections

    return load_sections(directory, split, sections.NAME, data.size, spec, pairs=True)


TASK = Task(
    name=NAME,
    kind="sections",
    outcome=Proximity(),
    objective="matching",
    load=load,
    meta=SectionMeta,
    data_of=sections.NAME,
    full=adopt(sections.FULL),
    smoke=adopt(sections.SMOKE),
    primary=("matching",),
)
