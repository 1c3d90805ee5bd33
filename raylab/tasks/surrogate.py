"""A network in the lung model's place: blood gases and pressures of virtual patients from their inputs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raylab.config.recipe import LUNG_PARAMETERS, Data, Loop, Optim, Recipe, ResidualModel, Schedule, Search, SweepData
from raylab.data.lung.meta import SweepMeta
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Regression

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import Samples


class SurrogateRecipe(Recipe):
    inputs: ClassVar[str] = LUNG_PARAMETERS

    task: Literal["surrogate"]
    """name of the task"""
    data: SweepData = SweepData()


FULL = SurrogateRecipe(
    task="surrogate",
    model=ResidualModel(name="residual", hidden=192, layers=4),
    optim=Optim(lr=3e-3, weight_decay=1e-4),
    schedule=Schedule(kind="cosine", warmup_steps=100),
    loop=Loop(epochs=60, global_batch_size=512, shards=4, ema_decay=0.99, checkpoint_steps=500),
    search=Search(
        space={
            "optim.lr": "loguniform(5e-4,1e-2)",
            "model.hidden": "choice(96,192,384)",
            "model.layers": "randint(2,6)",
        },
        points=({"optim.lr": 3e-3, "model.hidden": 192, "model.layers": 4},),
    ),
)
SMOKE = FULL.model_copy(
    update={
        "model": ResidualModel(name="residual", hidden=48, layers=2),
        "schedule": Schedule(kind="cosine"),
        "loop": Loop(epochs=4, global_batch_size=128, shards=4, checkpoint_steps=20),
    }
)


def load(directory: Path, split: str, data: Data, spec: dict[str, Any] | None) -> "Samples":
    from raylab.data.lung.sweep_dataset import load_sweep

    return load_sweep(directory, split, spec, "surrogate")


TASK = Task(
    name="surrogate",
    kind="sweep",
    outcome=Regression(),
    objective="r2_min",
    load=load,
    meta=SweepMeta,
    full=FULL,
    smoke=SMOKE,
    primary=("r2_min", "r2_mean"),
)
