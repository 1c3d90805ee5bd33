"""What tasks on remote-sensing scenes share: data, preparation and recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from raylab.config.recipe import SCENES, Data, Recipe
from raylab.data.images.scenes.meta import SceneMeta
from raylab.errors import UsageError, unknown
from raylab.tasks.base import SiteStatistics
from raylab.tasks.preparation import Preparation, PrepareOptions, Resources

if TYPE_CHECKING:  # as in base.py
    import numpy as np
    from numpy.typing import NDArray

    from raylab.data.images.scenes.dataset import SceneSamples
    from raylab.data.samples import NewRows


class SceneData(Data):
    size: int | None = Field(None, ge=1)
    """pixels per side; none means the prepared size"""
    augment: bool = True
    """flips and quarter turns of the training scenes"""

    @property
    def augments(self) -> bool:
        return self.augment


class SceneRecipe(Recipe):
    inputs: ClassVar[str] = SCENES

    data: SceneData = SceneData()


class SceneOptions(PrepareOptions):
    """Options of `prepare` for remote-sensing scenes."""

    source: str | None = None
    """statlog, eurosat, bigearthnet or synthetic"""
    path: Path | None = None
    """file of Statlog, folder of EuroSAT's classes or of BigEarthNet's patches"""
    patients: int = Field(400, ge=1)
    """synthetic: how many scenes"""
    corine: int = 19
    """bigearthnet: how many classes of CORINE, 19 or 43"""
    tile_km: float = Field(10.0, gt=0)
    """kilometres a side of the tiles that stay in one split, where places are known"""
    random_split: bool = False
    """split scenes at random although their places are known"""
    skip_bad: bool = False
    """leave unreadable images out, listed"""


def prepare(task: str, out: Path, options: SceneOptions, replace: bool, resources: Resources) -> SceneMeta:
    """Read the scenes of a source into `out`; UsageError if the task is of another number of labels than the source."""
    from raylab.data.images.scenes.prepare import prepare_scenes
    from raylab.data.images.scenes.scene import SceneRequest
    from raylab.data.images.scenes.sources import SOURCES

    if options.source is None:
        raise UsageError(f"prepare {task} needs --source", do=f"give one of {', '.join(SOURCES)}")
    if options.source not in SOURCES:
        raise unknown("source of scenes", options.source, SOURCES)
    request = SceneRequest(options.path, options.seed, options.patients, options.corine)
    source = SOURCES[options.source](request)
    own = TASK_OF[source.several_labels]
    if task != own:
        labels = "several labels" if source.several_labels else "one label"
        raise UsageError(
            f"a scene of {source.name} has {labels}, which is task '{own}', not '{task}'",
            do=f"raylab prepare {own} --source {source.name} ...",
        )
    return prepare_scenes(
        task,
        out,
        source,
        seed=options.seed,
        tile_km=options.tile_km,
        random_split=options.random_split,
        skip_bad=options.skip_bad,
        replace=replace,
        raw=[] if options.path is None else [options.path],
        progress=resources.progress,
    )


TASK_OF = {False: "landcover", True: "landcover-multilabel"}
"""The task by whether a scene may have several labels."""


def describe(meta: SceneMeta) -> list[str]:
    """What is said of a prepared directory, beside what is said of every one."""
    ground = "" if meta.resolution_m is None else f", {meta.resolution_m:g} m a pixel"
    lines = [f"  {len(meta.bands)} bands of {meta.bits} bits, {meta.size} px a side{ground}: {', '.join(meta.bands)}"]
    lines.append(f"  splits: {meta.split_by}")
    if meta.skipped:
        lines.append(f"  unreadable and skipped: {len(meta.skipped)}")
    return lines


def read_new(files: Any, data: SceneData, spec: dict[str, Any]) -> "NewRows":
    """Files and patches as a trained model reads them."""
    from raylab.data.images.scenes.new_scenes import read_new_scenes

    return read_new_scenes(files, spec)


PREPARATION = Preparation("remote-sensing scenes", SceneOptions, prepare, describe)


def make_load(task: str) -> Any:
    """The function `load` of a task on scenes."""

    def load(directory: Path, split: str, data: SceneData, spec: dict[str, Any] | None) -> "SceneSamples":
        from raylab.data.images.scenes.dataset import load_scenes

        return load_scenes(directory, split, task, data.size, spec)

    return load


def sum_statistics(meta: SceneMeta, directory: Path) -> "NDArray[np.float64]":
    """See SiteStatistics."""
    from raylab.data.images.scenes import site_statistics

    return site_statistics.sum_statistics(meta, directory)


def pool_statistics(meta: SceneMeta, sums: "NDArray[np.float64]") -> dict[str, Any]:
    """See SiteStatistics."""
    from raylab.data.images.scenes import site_statistics

    return site_statistics.pool_statistics(meta, sums)


SITE_STATISTICS = SiteStatistics(sum_statistics, pool_statistics, bound=2.0**30)  # scenes
