"""Land cover: the class of a remote-sensing scene."""

from typing import Literal

from raylab.config.recipe import Loop, Optim, SceneCnnModel, Schedule, Search, VisionModel
from raylab.data.images.scenes.meta import SceneMeta
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Multiclass
from raylab.tasks.scenes import PREPARATION, SITE_STATISTICS, SceneRecipe, make_load, read_new

NAME = "landcover"


class LandcoverRecipe(SceneRecipe):
    task: Literal["landcover"]
    """name of the task"""


FULL = LandcoverRecipe(
    task="landcover",
    model=VisionModel(name="resnet50"),
    optim=Optim(lr=1e-3, weight_decay=1e-2),
    schedule=Schedule(kind="cosine", warmup_steps=50),
    loop=Loop(epochs=30, global_batch_size=128, shards=4, ema_decay=0.99, checkpoint_steps=100),
    search=Search(
        space={"optim.lr": "loguniform(1e-4,1e-2)", "optim.weight_decay": "loguniform(1e-4,1e-1)"},
        points=({"optim.lr": 1e-3, "optim.weight_decay": 1e-2},),
    ),
)
SMOKE = FULL.model_copy(
    update={
        "model": SceneCnnModel(name="cnn", width=16),
        "optim": Optim(lr=3e-3),
        "schedule": Schedule(kind="cosine"),
        "loop": Loop(epochs=4, global_batch_size=64, shards=4, checkpoint_steps=10),
    }
)
SEARCHES = {
    "boosting": Search(
        space={
            "model.learning_rate": "loguniform(2e-2,3e-1)",
            "model.trees": "choice(100,200,400)",
            "model.leaves": "choice(8,16,32)",
            "model.l2": "loguniform(1e-1,1e2)",
        },
        points=({"model.learning_rate": 0.1, "model.trees": 200, "model.leaves": 16, "model.l2": 1.0},),
    ),
}

TASK = Task(
    name=NAME,
    kind="scenes",
    outcome=Multiclass(),
    objective="accuracy",
    load=make_load(NAME),
    meta=SceneMeta,
    preparation=PREPARATION,
    read_new=read_new,
    site_statistics=SITE_STATISTICS,
    full=FULL,
    smoke=SMOKE,
    searches=SEARCHES,
    primary=("accuracy", "macro_f1"),
    secondary=("sensitivity/",),
)
