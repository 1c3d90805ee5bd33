"""Land cover with several classes in a scene, as in BigEarthNet's patches."""

from typing import Literal

from raylab.data.images.scenes.meta import SceneMeta
from raylab.tasks import landcover
from raylab.tasks.base import Task
from raylab.tasks.outcomes import MultiLabel
from raylab.tasks.scenes import PREPARATION, SITE_STATISTICS, SceneRecipe, make_load, read_new

NAME = "landcover-multilabel"


class MultiLabelRecipe(SceneRecipe):
    task: Literal["landcover-multilabel"]
    """name of the task"""


def adopt(recipe: SceneRecipe) -> MultiLabelRecipe:
    """The recipe of single labels, for this task."""
    return MultiLabelRecipe.model_validate({**dict(recipe), "task": NAME})


TASK = Task(
    name=NAME,
    kind="scenes",
    outcome=MultiLabel(),
    objective="map",
    load=make_load(NAME),
    meta=SceneMeta,
    preparation=PREPARATION,
    read_new=read_new,
    site_statistics=SITE_STATISTICS,
    full=adopt(landcover.FULL),
    smoke=adopt(landcover.SMOKE),
    searches=landcover.SEARCHES,
    primary=("map", "macro_f1"),
    secondary=("ap/",),
)
