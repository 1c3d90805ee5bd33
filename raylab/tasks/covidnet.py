"""COVID-Net: chest X-rays told apart as healthy, pneumonia and Covid-19."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from raylab.config.recipe import (
    CXR_FRONTAL,
    CovidNetModel,
    ImageData,
    Loop,
    Optim,
    Recipe,
    Schedule,
    Search,
)
from raylab.data.images.meta import ImageMeta
from raylab.tasks.base import Task
from raylab.tasks.images import PREPARATION, SITE_STATISTICS
from raylab.tasks.outcomes import Multiclass

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import NewRows, Samples


class CovidnetRecipe(Recipe):
    inputs: ClassVar[str] = CXR_FRONTAL

    task: Literal["covidnet"]
    """name of the task"""
    data: ImageData = ImageData()


FULL = CovidnetRecipe(
    task="covidnet",
    data=ImageData(size=224),
    model=CovidNetModel(name="covidnet", dropout=0.3),
    # the published recipe is Adam at 2e-5 with batch 8 and a factor of .7 on plateau (facts of COVID-Net's repository)
    optim=Optim(lr=2e-4, weight_decay=1e-2),
    schedule=Schedule(kind="plateau", warmup_steps=50, factor=0.7, patience=5),
    loop=Loop(epochs=22, global_batch_size=64, shards=4, ema_decay=0.99, checkpoint_steps=50),
    search=Search(
        space={
            "optim.lr": "loguniform(1e-5,1e-3)",
            "optim.weight_decay": "loguniform(1e-4,1e-1)",
            "model.dropout": "uniform(0.0,0.5)",
        },
        points=({"optim.lr": 2e-4, "optim.weight_decay": 1e-2, "model.dropout": 0.3},),
    ),
)
SMOKE = FULL.model_copy(
    update={
        "data": ImageData(size=64),
        "model": CovidNetModel(name="covidnet", width=0.25, depth=0.4),
        "optim": Optim(lr=1e-3),
        "schedule": Schedule(kind="cosine"),
        "loop": Loop(epochs=3, global_batch_size=32, shards=4, checkpoint_steps=10),
    }
)


def load(directory: Path, split: str, data: ImageData, spec: dict[str, Any] | None) -> "Samples":
    from raylab.data.images.augment import AUGMENT
    from raylab.data.images.dataset import load_images

    augment = {name: value * data.strength for name, value in AUGMENT.items() if name != "flip"}
    augment["erase"] = data.erase
    return load_images(directory, split, size=data.size, spec=spec, augment=augment, mask=data.mask, task="covidnet")


def read_new(files: Any, data: ImageData, spec: dict[str, Any]) -> "NewRows":
    from raylab.data.images.new_images import read_new_images

    return read_new_images(files, spec)


TASK = Task(
    name="covidnet",
    kind="images",
    outcome=Multiclass(),
    objective="macro_recall",
    load=load,
    meta=ImageMeta,
    preparation=PREPARATION,
    read_new=read_new,
    site_statistics=SITE_STATISTICS,
    full=FULL,
    smoke=SMOKE,
    primary=("macro_recall", "accuracy"),
    secondary=("sensitivity/",),
)
