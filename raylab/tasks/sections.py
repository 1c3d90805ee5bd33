"""Brain sections: the depth in the brain of the section that a patch is from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from raylab.config.recipe import SECTIONS, Loop, Optim, Recipe, SceneCnnModel, Schedule, Search, VisionModel
from raylab.data.images.sections.meta import SectionMeta
from raylab.errors import UsageError, unknown
from raylab.tasks.base import Task
from raylab.tasks.outcomes import SectionDepth
from raylab.tasks.preparation import Preparation, PrepareOptions, Resources
from raylab.tasks.scenes import SceneData

if TYPE_CHECKING:  # as in base.py
    from raylab.data.images.sections.dataset import SectionSamples

NAME = "sections"


class PatchRecipe(Recipe):
    """Of tasks on patches of sections."""

    inputs: ClassVar[str] = SECTIONS

    data: SceneData = SceneData()


class SectionRecipe(PatchRecipe):
    task: Literal["sections"]
    """name of the task"""


FULL = SectionRecipe(
    task="sections",
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


class SectionOptions(PrepareOptions):
    """Options of `prepare` for brain sections."""

    source: str | None = None
    """files or synthetic"""
    path: Path | None = None
    """folder of the sections' images"""
    manifest: Path | None = None
    """CSV file with file, section and depth (default: sections.csv in or beside the folder)"""
    patients: int = Field(400, ge=1)
    """synthetic: how many sections"""
    depth: str = "depth"
    """the table's column of the depth"""
    level: int = Field(0, ge=0)
    """level of pyramids that is read, 0 the largest"""
    patch: int = 64
    """pixels a side of a patch"""
    tissue: float = 0.5
    """fraction of a patch that must be tissue"""
    interval: int | None = None
    """consecutive sections that stay in one split (default: a fifteenth of them)"""
    fold: int = 0
    """which of five folds: every fifth interval is test, and the next one val"""
    gap: int = 1
    """sections left out between intervals of different splits"""


def prepare(task: str, out: Path, options: SectionOptions, replace: bool, resources: Resources) -> SectionMeta:
    """Cut the sections of a source into patches in `out`."""
    from raylab.data.images.sections.prepare import Cutting, prepare_sections
    from raylab.data.images.sections.section import SectionRequest
    from raylab.data.images.sections.sources import SOURCES

    if options.source is None:
        raise UsageError(f"prepare {task} needs --source", do=f"give one of {', '.join(SOURCES)}")
    if options.source not in SOURCES:
        raise unknown("source of sections", options.source, SOURCES)
    request = SectionRequest(
        options.path, options.manifest, options.depth, options.level, options.seed, options.patients, options.patch
    )
    return prepare_sections(
        task,
        out,
        SOURCES[options.source](request),
        Cutting(options.patch, options.tissue, options.interval, options.fold, options.gap),
        seed=options.seed,
        replace=replace,
        raw=[path for path in (options.path, options.manifest) if path is not None],
        progress=resources.progress,
    )


def describe(meta: SectionMeta) -> list[str]:
    """What is said of a prepared directory, beside what is said of every one."""
    scale = "" if meta.um_per_px is None else f", {meta.um_per_px:.4g} um a pixel"
    bands = f"{len(meta.bands)} band{'' if len(meta.bands) == 1 else 's'}"
    return [
        f"  {bands} of {meta.bits} bits, {meta.size} px a side{scale}: {', '.join(meta.bands)}",
        f"  splits: by intervals of {meta.interval} sections, fold {meta.fold}, with gaps of {meta.gap}",
        f"  {meta.depth_name}: {meta.depth_per_section:.4g} from one section number to the next",
        "  pretraining on the same directory: raylab train sections-pretraining --data DIR",
    ]


def load(directory: Path, split: str, data: SceneData, spec: dict[str, Any] | None) -> "SectionSamples":
    from raylab.data.images.sections.dataset import load_sections

    return load_sections(directory, split, NAME, data.size, spec)


TASK = Task(
    name=NAME,
    kind="sections",
    outcome=SectionDepth(),
    objective="r2",
    load=load,
    meta=SectionMeta,
    preparation=Preparation("brain sections", SectionOptions, prepare, describe),
    full=FULL,
    smoke=SMOKE,
    primary=("r2",),
    secondary=("section_error", "patch_error"),
)
