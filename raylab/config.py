"""Recipes: what a run is made of, as checked data.

A recipe is a tree of frozen pydantic models. One path syntax serves all: `optim.lr=3e-4` overrides a field on the
command line (`override`), and `optim.lr=loguniform(1e-5,1e-3)` makes the same field a dimension of a search
(`dimension`). Unknown paths and ill-typed values raise UsageError with the nearest right names.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from raylab.errors import UsageError, unknown


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true as 1: `loop.epochs=true` would train one epoch."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false do not fit here")
        return value


class Data(Part):
    """What of a prepared directory is used, and how. Fields that a task has no use for are left alone."""

    cohort: str = "all"  # ards: all, ventilated_pf, ventilated, gas, matched
    virtual_patient: bool = False  # ards: features of the lung model, of `prepare ards --virtual-patient`
    fill: str = "mask"  # ards: what stands for a value not measured: mask, forward, mean
    size: int | None = Field(None, ge=16)  # covidnet: pixels a side; the cache's own when None
    augment: bool = True  # covidnet: train images only
    mask: Literal["centre"] | None = None  # covidnet: centre blacks the lung field out, a control (image_samples.py)
    strength: float = Field(1.0, ge=0)  # covidnet: multiplies the ranges of the augmentation
    share: float | None = Field(None, gt=0, lt=1)  # of one class in every batch; None: as the classes are
    share_of: str | None = None  # that class; None: the last one (covidnet: COVID-19)


class Model(Part):
    name: str
    hidden: int = Field(64, ge=1)  # recurrent: units a layer
    layers: int = Field(1, ge=1)
    members: int = Field(1, ge=1)  # networks that differ in their seed alone; the mean of their probabilities counts
    dropout: float = Field(0.0, ge=0, lt=1)
    width: float = Field(1.0, gt=0)  # covidnet: multiplies the published stage channels
    depth: float = Field(1.0, gt=0)  # covidnet: multiplies the published blocks a stage
    trees: int = Field(200, ge=1)  # boosting
    leaves: int = Field(8, ge=2)  # boosting: of each tree
    rate: float = Field(0.05, gt=0)  # boosting: learning rate
    share: float = Field(0.3, gt=0, le=1)  # boosting: of the features, drawn for each split
    l2: float = Field(10.0, gt=0)  # boosting, logistic, last_pf, last_sf: penalty
    weights: str | None = None  # vision: path of weights to start from (.safetensors, or .pt without pickle)


class Optim(Part):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""

    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip: float | None = Field(1.0, gt=0)  # largest norm of the summed gradient
    class_weight: tuple[float, ...] | None = None  # weight of each class in the loss; None: all one
    logit_adjustment: float = Field(0.0, ge=0)  # tau: log priors are added to the logits in the loss; 0 is off


class Schedule(Part):
    kind: Literal["constant", "cosine", "plateau"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    factor: float = Field(0.7, gt=0, lt=1)  # plateau: the rate is multiplied by this
    patience: int = Field(5, ge=0)  # plateau: after so many epochs without a better score


class Transfer(Part):
    """How a network with a parent, or with given weights, learns (finetune.py); without them nothing of it holds."""

    mode: Literal["scratch", "probe", "full", "lp-ft"] = "lp-ft"
    probe_share: float = Field(0.3, gt=0, lt=1)  # lp-ft: share of the epochs, rounded to whole ones, at least one
    probe_rate: float = Field(10.0, gt=0)  # multiplies optim.lr while only the head learns
    first_rate: float = Field(0.3, gt=0, le=1)  # share of the rate in the first block; rises to 1 in the head
    reestimate: bool = True  # batch-norm statistics of the target's training inputs before the first step


class Loop(Part):
    """How long and in which portions is trained, and what is kept on the way."""

    epochs: int = Field(10, ge=1)
    batch: int = Field(64, ge=1)  # global: samples of one optimiser step, whatever the number of workers
    shards: int = Field(8, ge=1)  # the batch is computed in so many logical shards
    sum: Literal["auto", "exact", "float"] = "auto"  # auto: exact on the CPU, float on a GPU
    threads: int = Field(1, ge=1)  # of each rank; part of the result on a CPU, so part of the recipe
    ema: float | None = Field(None, gt=0, lt=1)  # decay of the averaged weights, which are then scored and kept
    early_stop: int | None = Field(None, ge=1)  # epochs without a better validation score
    bf16: bool = False
    channels_last: bool = False
    checkpoint_steps: int | None = Field(50, ge=1)
    checkpoint_seconds: float | None = Field(None, gt=0)
    keep: int = Field(2, ge=2)  # newest checkpoints kept: two, so that a damaged one has a predecessor

    @model_validator(mode="after")
    def _shards_fit(self) -> Self:
        if self.shards > self.batch:
            raise ValueError(f"shards ({self.shards}) must not exceed batch ({self.batch})")
        return self


class Scaling(Part):
    """How many workers a run has and what each gets; none of it changes the result."""

    workers: tuple[int, int] = (0, 0)  # least and most; (0, 0) runs in this process without Ray
    gpu: bool = False
    cpus_per_worker: float = Field(1, gt=0)
    max_failures: int = Field(3, ge=0)  # restarts after a crash; preemptions are not counted
    resize_seconds: float = Field(60, gt=0)  # an elastic run looks this often for a better size

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
            raise ValueError(f"workers {low}:{high}: the least exceeds the most")
        if low < 0 or (low == 0) != (high == 0):
            raise ValueError(f"workers {low}:{high}: write 0 (this process, no Ray), N, or MIN:MAX from 1 up")
        return self


class Search(Part):
    trials: int = Field(20, ge=1)
    scheduler: str = "asha"
    search: str = "tpe"
    concurrent: int = Field(2, ge=1)
    workers_per_trial: int = Field(0, ge=0)  # 0: a trial trains in its own process
    space: dict[str, str] = {}  # path -> distribution
    points: tuple[dict[str, Any], ...] = ()  # tried first


class Recipe(Part):
    task: str
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = Data()
    model: Model
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    transfer: Transfer = Transfer()
    loop: Loop = Loop()
    scaling: Scaling = Scaling()
    search: Search = Search()


def load(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed JSON document; UsageError names every field that does not fit."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _explain(error) from error


def read(path: Path) -> Recipe:
    """The recipe in a JSON file; UsageError when there is none that holds."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no recipe", str(error), "it is written by the run itself: restore it") from error
    return load(document)


def paths(part: type[Part] = Recipe, prefix: str = "") -> list[str]:
    """Every field that can be set, as dotted paths."""
    found = []
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            found += paths(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def known(path: str) -> bool:
    """Whether a recipe has this path; one value of a class_weight, too, is `optim.class_weight.2`, counted from 0."""
    parent, _, last = path.rpartition(".")
    return path in paths() or (parent == "optim.class_weight" and last.isdigit())


def value(text: str) -> Any:
    """A command-line value as Python data: JSON or Python literals, else the text itself."""
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if text.lower() in {"none", "null"}:
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # all that literal_eval is known to raise
        return text


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with `settings` {dotted path: value} put in; class weights not given beside a given one are 1."""
    document = recipe.model_dump()
    for path, new in settings.items():
        if not known(path):
            raise unknown("recipe field", path, paths())
        *parents, leaf = path.split(".")
        if leaf.isdigit():
            place, leaf = int(leaf), parents.pop()
            given = document["optim"][leaf] or ()
            padded = [*given, *[1.0] * (place + 1 - len(given))]
            new = (*padded[:place], new, *padded[place + 1 :])
        at = document
        for name in parents:
            at = at[name]
        at[leaf] = new
    return load(document)


def assignments(texts: Iterable[str]) -> dict[str, Any]:
    """`["optim.lr=3e-4", ...]` as {"optim.lr": 3e-4, ...}."""
    pairs = {}
    for text in texts:
        path, equals, right = text.partition("=")
        if not equals or not path:
            raise UsageError(f"'{text}' is not PATH=VALUE", do="write for example --set optim.lr=3e-4")
        pairs[path.strip()] = value(right.strip())
    return pairs


DISTRIBUTIONS = {
    "uniform": 2,
    "loguniform": 2,
    "randint": 2,
    "choice": None,
}


def dimension(path: str, text: str) -> tuple[str, list[Any]]:
    """A search dimension `loguniform(1e-5,1e-3)` as ("loguniform", [1e-5, 1e-3]).

    uniform(low,high), loguniform(low,high), randint(low,high) with high included, choice(a,b,...).
    Raises UsageError for another distribution, wrong bounds, or a path that no recipe has.
    """
    if not known(path):
        raise unknown("recipe field", path, paths())
    example = f"for example --space {path}=loguniform(1e-5,1e-3)"
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if not match:
        raise UsageError(f"{path}={text} is not a distribution", f"known: {', '.join(DISTRIBUTIONS)}", example)
    name, inside = match.groups()
    if name not in DISTRIBUTIONS:
        raise unknown("distribution", name, DISTRIBUTIONS)
    arguments = [value(part.strip()) for part in _split(inside)]
    count = DISTRIBUTIONS[name]
    if count is None:
        if not arguments:
            raise UsageError(f"{path}={text}: choice needs at least one value", do=example)
        return name, arguments
    numbers = [a for a in arguments if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(arguments) != count or len(numbers) != count or not numbers[0] < numbers[1]:
        raise UsageError(f"{path}={text}: {name} takes two numbers, the lower first", do=example)
    if name == "loguniform" and numbers[0] <= 0:
        raise UsageError(f"{path}={text}: loguniform needs bounds above zero", do=example)
    if name == "randint" and not all(isinstance(n, int) for n in numbers):
        raise UsageError(f"{path}={text}: randint needs whole numbers", do=example)
    return name, arguments


def flat(recipe: Recipe) -> dict[str, Any]:
    """The recipe as {dotted path: value}, for parameters of a tracked run."""
    out: dict[str, Any] = {}

    def walk(prefix: str, node: Mapping[str, Any], part: type[Part]) -> None:
        for name, field in part.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Part):
                walk(f"{prefix}{name}.", node[name], kind)
            else:
                out[prefix + name] = node[name]

    walk("", recipe.model_dump(), Recipe)
    return out


def _split(text: str) -> list[str]:
    """At commas that stand outside brackets and quotes."""
    parts, depth, start, quote = [], 0, 0, ""
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]] if text.strip() else []


def _explain(error: ValidationError) -> UsageError:
    known = paths()
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(p) for p in problem["loc"] if not isinstance(p, int))
        if problem["type"] == "extra_forbidden":
            return unknown("recipe field", where, known)
        got = "" if isinstance(problem.get("input"), dict) else f", got {problem.get('input')!r}"
        lines.append(f"{where or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}{got}")
    return UsageError("the recipe does not hold: " + "; ".join(lines), do="correct the value given with --set")
