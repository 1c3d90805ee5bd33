"""ARDS: whether hypoxaemic respiratory failure begins within hours after a landmark, from the hours before it."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raylab.config.recipe import (
    IcuData,
    Loop,
    Optim,
    RecurrentModel,
    Schedule,
    Search,
)
from raylab.data.icu.labels import LABELS
from raylab.data.icu.meta import IcuMeta
from raylab.tasks.base import Task
from raylab.tasks.icu import EVENTS, SITE_STATISTICS, IcuRecipe, icu_preparation, read_new
from raylab.tasks.outcomes import Binary

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import Samples


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


def load(directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> "Samples":
    from raylab.data.icu.dataset import load_icu

    return load_icu(directory, split, data.cohort, spec, data.fill, data.virtual_patient, "ards")


TASK = Task(
    name="ards",
    kind="icu",
    outcome=Binary(),
    objective="auroc",
    load=load,
    meta=IcuMeta,
    preparation=icu_preparation(LABELS),
    read_new=partial(read_new, LABELS),
    frame=EVENTS,
    site_statistics=SITE_STATISTICS,
    full=FULL,
    smoke=SMOKE,
    searches=SEARCHES,
    benchmark_members=5,
    primary=("auroc", "auprc", "ventilated_pf/auroc"),
    secondary=("brier", "calibration_slope"),
)
