"""Recipes: complete, checked descriptions of runs.

A recipe is a tree of frozen pydantic models. One path syntax serves all: `optim.lr=3e-4` overrides a field on the
command line (overrides.py), and `optim.lr=loguniform(1e-5,1e-3)` makes the same field a dimension of a search
(search_space.py). Unknown paths and values of a wrong type raise UsageError with similar names.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from raylab.errors import UsageError, unknown


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject true and false for numbers: pydantic takes true as 1, so `loop.epochs=true` would train one epoch."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a value that is not true or false")
        return value


class Data(Part):
    """How a prepared directory is used; each kind of data adds its own fields."""

    class_fraction: float | None = Field(None, gt=0, lt=1)
    """fraction of every batch that is filled with one class; none keeps the class frequencies"""
    class_fraction_of: str | None = None
    """the class to which `class_fraction` applies; none means the last one"""

    @property
    def augments(self) -> bool:
        """Whether samples are augmented in training."""
        return False


class IcuData(Data):
    cohort: str = "all"
    """cohort for training and scoring: all, ventilated_pf, ventilated, gas, matched"""
    virtual_patient: bool = False
    """adds the features of the lung model fitted by `prepare ards --virtual-patient`"""
    fill: str = "mask"
    """imputation of missing values: mask (last value, mask and age), forward (last value), mean (of train)"""


class ImageData(Data):
    size: int | None = Field(None, ge=16)
    """pixels per side; none means the prepared size"""
    augment: bool = True
    """augments the training images"""
    mask: Literal["centre", "border"] | None = None
    """centre masks the lung field, as a control; border masks all but the lung field"""
    erase: float = Field(0.0, ge=0, le=1)
    """probability that a rectangle of a training image is erased"""
    strength: float = Field(1.0, ge=0)
    """multiplies the ranges of the augmentation"""

    @property
    def augments(self) -> bool:
        return self.augment


class SweepData(Data):
    pass


class Model(Part):
    """A network, or a model that is fitted at once; each family adds its own fields."""

    name: str
    """name of the model"""

    @property
    def weights_path(self) -> str | None:
        """The source of the initial weights; None if they are random."""
        return getattr(self, "weights", None)


class NetworkModel(Model):
    members: int = Field(1, ge=1)
    """size of the ensemble: networks that differ only in their seed, whose probabilities are averaged"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout probability"""


class RecurrentModel(NetworkModel):
    name: Literal["gru", "lstm", "grud"]
    """name of the model"""
    hidden: int = Field(64, ge=1)
    """units per layer"""
    layers: int = Field(1, ge=1)
    """recurrent layers"""


class BoostingModel(Model):
    name: Literal["boosting"]
    """name of the model"""
    trees: int = Field(200, ge=1)
    """number of trees"""
    leaves: int = Field(8, ge=2)
    """leaves of each tree"""
    learning_rate: float = Field(0.05, gt=0)
    """learning rate"""
    feature_fraction: float = Field(0.3, gt=0, le=1)
    """fraction of the features considered at each split"""
    l2: float = Field(10.0, gt=0)
    """L2 penalty of the leaf values"""


class LinearModel(Model):
    name: Literal["logistic", "last_pf", "last_sf"]
    """name of the model"""
    l2: float = Field(10.0, gt=0)
    """L2 penalty of the weights"""


class CovidNetModel(NetworkModel):
    name: Literal["covidnet", "covidnet-large"]
    """name of the model"""
    width: float = Field(1.0, gt=0)
    """multiplies the published stage channels"""
    depth: float = Field(1.0, gt=0)
    """multiplies the published number of blocks per stage"""
    weights: str | None = None
    """initial weights: a path (.safetensors, or .pt without pickle), torchvision:NAME.VERSION, or
    models:/NAME/VERSION"""


class VisionModel(NetworkModel):
    """A classifier of torchvision, by its name there."""

    weights: str | None = None
    """initial weights: a path (.safetensors, or .pt without pickle), torchvision:NAME.VERSION, or
    models:/NAME/VERSION"""


class ResidualModel(NetworkModel):
    name: Literal["residual"]
    """name of the model"""
    hidden: int = Field(64, ge=1)
    """units per layer"""
    layers: int = Field(1, ge=1)
    """residual layers"""


class SceneCnnModel(NetworkModel):
    name: Literal["cnn"]
    """name of the model"""
    width: int = Field(32, ge=1)
    """channels of the first convolutions, doubled with every halving of the map"""


ICU_HOURLY, CXR_FRONTAL, LUNG_PARAMETERS, SCENES = "icu-hourly", "cxr-frontal-u8", "lung-parameters", "scenes"
SECTIONS = "sections"
FAMILIES: dict[str, list[type[Model]]] = {
    ICU_HOURLY: [RecurrentModel, BoostingModel, LinearModel],
    CXR_FRONTAL: [CovidNetModel, VisionModel],
    LUNG_PARAMETERS: [ResidualModel],
    SCENES: [SceneCnnModel, BoostingModel, VisionModel],
    SECTIONS: [SceneCnnModel, VisionModel],
}
"""By kind of inputs. Own families join them (raylab/tasks/plugins.py)."""


def model_names(family: type[Model]) -> tuple[str, ...]:
    """Names of the models of a family; empty if it accepts any name."""
    return get_args(family.model_fields["name"].annotation)


def model_family(name: str) -> type[Model]:
    """The family of the model `name`; VisionModel, which accepts every name, if no family lists it."""
    families = [one for of_inputs in FAMILIES.values() for one in of_inputs]
    return next((one for one in families if name in model_names(one)), VisionModel)


class Optim(Part):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = Field(1e-3, gt=0)
    """learning rate"""
    weight_decay: float = Field(1e-2, ge=0)
    """decoupled weight decay"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """decay rate of the first moment"""
    beta2: float = Field(0.999, ge=0, lt=1)
    """decay rate of the second moment"""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """gradient clipping: maximum norm of the summed gradient; none for no limit"""
    class_weight: tuple[float, ...] | None = None
    """weight of each class in the loss, also set one by one as optim.class_weight.2; none means 1 for all"""
    logit_adjustment: float = Field(0.0, ge=0)
    """tau: log priors times tau are added to the logits in the loss (arXiv 2007.07314); 0 turns it off"""


class Schedule(Part):
    kind: Literal["constant", "cosine", "plateau"] = "cosine"
    """learning-rate schedule"""
    warmup_steps: int = Field(0, ge=0)
    """steps of linear warm-up of the learning rate"""
    factor: float = Field(0.7, gt=0, lt=1)
    """plateau: factor of a learning-rate reduction"""
    patience: int = Field(5, ge=0)
    """plateau: epochs without a better score before a reduction"""


class Transfer(Part):
    """How a network with a parent, or with given weights, learns; ignored without them."""

    mode: Literal["scratch", "probe", "full", "lp-ft"] = "lp-ft"
    """scratch ignores the weights; probe trains the head; full all layers; lp-ft the head first, then all layers"""
    probe_fraction: float = Field(0.3, gt=0, lt=1)
    """lp-ft: fraction of the epochs in which only the head learns, rounded to whole epochs, at least one"""
    probe_lr_scale: float = Field(10.0, gt=0)
    """multiplies optim.lr while only the head learns"""
    first_lr_scale: float = Field(0.3, gt=0, le=1)
    """multiplies the learning rate of the first block; rises geometrically to 1 in the head"""
    reestimate: bool = True
    """re-estimates batch-norm statistics on the target's training inputs before the first step"""


class Loop(Part):
    """Duration, batches and checkpoints of training."""

    epochs: int = Field(10, ge=1)
    """passes over the training data"""
    global_batch_size: int = Field(64, ge=1)
    """samples of one optimiser step, whatever the number of workers"""
    shards: int = Field(4, ge=1)
    """logical shards into which a batch is cut; part of the result"""
    gradient_reduction: Literal["auto", "exact", "float"] = "auto"
    """sum of the shards' gradients: exact (independent of the workers), float, or auto (exact on CPUs only)"""
    threads: int = Field(1, ge=1)
    """CPU threads of each rank; part of the result on a CPU"""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """decay of the moving average of the weights, which is then scored and saved"""
    early_stopping_patience: int | None = Field(None, ge=1)
    """epochs without a better validation score before training ends"""
    bf16: bool = False
    """computes in bfloat16 where torch's autocast allows it"""
    channels_last: bool = False
    """channels-last memory format for images and their networks"""
    checkpoint_steps: int | None = Field(50, ge=1)
    """steps between checkpoints"""
    checkpoint_seconds: float | None = Field(None, gt=0)
    """seconds between checkpoints"""
    max_checkpoints: int = Field(2, ge=2)
    """number of checkpoints to keep: at least two, so that a corrupt one has a predecessor"""

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.shards > self.global_batch_size:
            raise ValueError(f"shards ({self.shards}) must not exceed global_batch_size ({self.global_batch_size})")
        return self


class Scaling(Part):
    """Number and resources of the workers; does not change the result."""

    workers: tuple[int, int] = (0, 0)
    """N or MIN:MAX; 0 trains in this process without Ray"""
    gpu: bool = False
    """trains on GPUs, one per worker"""
    cpus_per_worker: float = Field(1, gt=0)
    """logical CPUs per worker"""
    priority: float = Field(1, gt=0, allow_inf_nan=False)
    """weight of this run where several share a cluster: workers beyond the minimums go to runs in proportion to
    (MAX - MIN) x priority"""
    max_failures: int = Field(3, ge=0)
    """deaths of workers in a row without a step between; workers that were told to leave are not counted"""
    silence_seconds: float = Field(60, gt=0)
    """seconds without a sign of life after which a worker is expelled; longer than any step"""

    @field_validator("workers", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """`2` and `1:3` as on the command line."""
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if isinstance(value, str):
            if not re.fullmatch(r"\d+(:\d+)?", value):
                raise ValueError("write N or MIN:MAX, as in 2 or 1:3")
            low, _, high = value.partition(":")
            return (int(low), int(high or low))
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.workers
        if low > high:
            raise ValueError(f"workers {low}:{high}: the minimum exceeds the maximum")
        if low < 0 or (low == 0) != (high == 0):
            raise ValueError(f"workers {low}:{high}: write 0 (this process, no Ray), N, or MIN:MAX from 1 up")
        return self

    def resources(self) -> dict[str, float]:
        """What Ray must have for one worker, or for a trial that trains in one process."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1.0} if self.gpu else {})


class Search(Part):
    trials: int = Field(20, ge=1)
    """number of trials"""
    scheduler: str = "asha"
    """fifo, asha, hyperband or pbt"""
    search: str = "tpe"
    """random or tpe"""
    concurrent: int = Field(2, ge=1)
    """number of concurrent trials"""
    workers_per_trial: int = Field(0, ge=0)
    """workers of each trial; 0 trains it in a single process"""
    space: dict[str, str] = {}
    """distribution of each searched path"""
    points: tuple[dict[str, Any], ...] = ()
    """settings to try first"""


class Recipe(Part):
    """The complete description of a run. Tasks whose data and models have their own fields subclass it."""

    inputs: ClassVar[str] = ""
    """kind of inputs that its models take, a key of FAMILIES; empty for a recipe of no task, which takes any model"""

    task: str
    """name of the task"""
    seed: int = Field(0, ge=0, lt=2**31)
    """seed of weights, batches, dropout and augmentation"""
    data: SerializeAsAny[Data] = Data()
    model: SerializeAsAny[Model]
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    transfer: Transfer = Transfer()
    loop: Loop = Loop()
    scaling: Scaling = Scaling()
    search: Search = Search()

    @classmethod
    def families(cls) -> list[type[Model]]:
        """The families of models that it takes; none for a recipe of no task."""
        return FAMILIES.get(cls.inputs, [])

    @field_validator("model", mode="before")
    @classmethod
    def _choose_family(cls, value: Any) -> Any:
        """Validate a model's document as the family that its name belongs to."""
        if not cls.inputs or not isinstance(value, Mapping | Model):
            return value
        name = value.get("name") if isinstance(value, Mapping) else value.name
        family = model_family(str(name)) if isinstance(value, Mapping) else type(value)
        if family not in cls.families():
            raise PydanticCustomError("unknown_model", "no model of this task", {"name": str(name)})
        return family.model_validate(value) if isinstance(value, Mapping) else value


def recipe_types() -> dict[str, type[Recipe]]:
    """{task: type of its recipes} of the loaded tasks."""
    kinds: list[type[Recipe]] = [Recipe]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {name: kind for kind in kinds for name in get_args(kind.model_fields["task"].annotation)}


def validate(kind: type[Recipe], document: Mapping[str, Any]) -> Recipe:
    """The recipe of type `kind` in a parsed JSON document; Raises UsageError that names every invalid field."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise _explain(error, document, kind) from error


def list_fields(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """{dotted path: (value, description)} of every field of this recipe."""
    found: dict[str, tuple[Any, str]] = {}

    def walk(part: Part, prefix: str) -> None:
        for name in type(part).model_fields:
            value = getattr(part, name)
            if isinstance(value, Part):
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value, " ".join(_describe(type(part), name).split())

    walk(recipe, "")
    return found


def _describe(part: type[Part], name: str) -> str:
    """The description of a field, in a subclass that does not describe it anew that of the class above; else empty."""
    fields = (kind.model_fields.get(name) for kind in part.__mro__ if issubclass(kind, Part))
    return next((field.description for field in fields if field is not None and field.description), "")


def flatten(recipe: Recipe) -> dict[str, Any]:
    """The recipe as {dotted path: value}, for the parameters of a tracked run."""
    return {path: value for path, (value, _) in list_fields(recipe).items()}


def _explain(error: ValidationError, document: Mapping[str, Any], kind: type[Recipe]) -> UsageError:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(p) for p in problem["loc"] if not isinstance(p, int))
        if problem["type"] == "unknown_model":
            allowed = [name for one in kind.families() for name in model_names(one)]
            return unknown(f"{document['task']} model", problem["ctx"]["name"], allowed)
        if problem["type"] == "extra_forbidden":
            return unknown("recipe field", where, list_fields(Recipe(task="", model=Model(name=""))))
        got = "" if isinstance(problem.get("input"), dict) else f", got {problem.get('input')!r}"
        lines.append(f"{where or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}{got}")
    return UsageError("invalid recipe: " + "; ".join(lines), do="correct the value given with --set")
