"""ARDS: whether hypoxaemic respiratory failure begins within hours after a landmark, from the hours before it."""

from typing import Literal

from raylab.config.recipe import Loop, Optim, RecurrentModel, Schedule, Search
from raylab.data.icu.labels import LABELS
from raylab.tasks.icu import IcuRecipe, icu_task


class ArdsRecipe(IcuRecipe):
    task: Literal["ards"]
    """name of the task"""


FULL = ArdsRecipe(
    task="ards",
    model=RecurrentModel(name="gru", hidden=16, dropout=0.5),
    optim=Optim(lr=1e-3, weight_decay=0.1),
    schedule=Schedule(kind="cosine", warmup_steps=20),
    loop=Loop(epochs=20, global_batch_size=128, shards=4, ema_decay=0.98, checkpoint_steps=50),
    search=Search(
        space={
            "optim.lr": "loguniform(3e-4,3e-3)",
            "optim.weight_decay": "loguniform(1e-2,1.0)",
            "model.hidden": "choice(8,16,32)",
            "model.dropout": "uniform(0.3,0.7)",
        },
        points=({"optim.lr": 1e-3, "optim.weight_decay": 0.1, "model.hidden": 16, "model.dropout": 0.5},),
    ),
)
SMOKE = FULL.model_copy(
    update={
        "model": RecurrentModel(name="gru", hidden=16),
        "loop": Loop(epochs=3, global_batch_size=64, shards=6, checkpoint_steps=5),
        "schedule": Schedule(kind="cosine"),
    }
)
SEARCHES = {
    "boosting": Search(
        space={
            "model.learning_rate": "loguniform(2e-2,2e-1)",
            "model.trees": "choice(100,200,400)",
            "model.leaves": "choice(4,8,16)",
            "model.l2": "loguniform(1e-1,1e2)",
        },
        points=({"model.learning_rate": 0.05, "model.trees": 200, "model.leaves": 8, "model.l2": 10.0},),
    ),
    "logistic": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
    "last_pf": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
    "last_sf": Search(space={"model.l2": "loguniform(1e-1,1e4)"}, points=({"model.l2": 10.0},)),
}


TASK = icu_task(
    ArdsRecipe, LABELS, FULL, SMOKE, SEARCHES, benchmark_members=5, primary=("auroc", "auprc", "ventilated_pf/auroc")
)
