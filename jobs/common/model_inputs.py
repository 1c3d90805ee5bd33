"""What a model reads, by the kind of its data, as sites need it that hand models to one another: the names of its
inputs, their statistics in training, and what the prepared data of a site has of them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import polars as pl

from jobs.concepts import coverage
from raylab.data.icu.concepts import CONCEPTS
from raylab.data.icu.contributors import count_contributors
from raylab.data.icu.meta import IcuMeta
from raylab.data.images.meta import MASKS, ImageMeta
from raylab.data.images.scenes.meta import SceneMeta
from raylab.errors import DataError, UsageError
from raylab.tasks.base import Task

Means = dict[str, float | None]


class ModelInputs(ABC):
    """The inputs of a model with this spec. Means and deviations are over the train split."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The inputs by name."""

    @property
    def units(self) -> dict[str, str]:
        """Unit by name; without it, the input is derived from others or has none."""
        return {}

    @property
    @abstractmethod
    def trained(self) -> dict[str, tuple[float | None, float]]:
        """(mean, standard deviation) of the data that it was trained on, by name."""

    @abstractmethod
    def describe(self) -> list[str]:
        """Lines of a model card."""

    @abstractmethod
    def count_patients(self, data: Path) -> dict[str, int]:
        """How many patients of a prepared directory are behind the mean of each input that it has."""

    @abstractmethod
    def read_means(self, meta: Any) -> Means:
        """The mean of each input in a prepared directory; None if it has none."""

    def measure_coverage(self, data: Path) -> dict[str, float]:
        """For each input, the fraction of rows of a prepared directory with a value; empty if no row lacks any."""
        return {}


class IcuInputs(ModelInputs):
    """Hourly series and static values of stays."""

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.spec["features"], *self.spec["static"])

    @property
    def units(self) -> dict[str, str]:
        return {name: CONCEPTS[name].unit for name in self.names if name in CONCEPTS}

    @property
    def trained(self) -> dict[str, tuple[float | None, float]]:
        means = [*self.spec["mean"], *self.spec["static_mean"]]
        stds = [*self.spec["std"], *self.spec["static_std"]]
        return dict(zip(self.names, zip(means, stds, strict=True), strict=True))

    def describe(self) -> list[str]:
        spec = self.spec
        label = {name: value for name, value in spec["label"].items() if value is not None}
        return [
            f"input: {spec['hours']} h of {len(spec['features'])} hourly series and {len(spec['static'])} static "
            f"values, prediction at {spec['landmark_h']:g} h",
            f"label: {'; '.join(f'{name}: {value}' for name, value in label.items())}",
        ]

    def count_patients(self, data: Path) -> dict[str, int]:
        return count_contributors(data)

    def read_means(self, meta: IcuMeta) -> Means:
        return {name: meta.statistics.get(name, {}).get("mean") for name in self.names}

    def measure_coverage(self, data: Path) -> dict[str, float]:
        return {name: of["rows"] for name, of in coverage(data).items() if name in self.names}


class ImageInputs(ModelInputs):
    """Chest X-rays, whose pixels have one mean."""

    @property
    def names(self) -> tuple[str, ...]:
        return ("pixels",)

    @property
    def units(self) -> dict[str, str]:
        return {"pixels": "0 (black) to 1"}

    @property
    def trained(self) -> dict[str, tuple[float | None, float]]:
        return {"pixels": (self.spec["mean"], self.spec["std"])}

    def describe(self) -> list[str]:
        masked = f"; {MASKS[mask]}" if (mask := self.spec.get("mask")) else ""
        size = self.spec["size"]
        return [
            f"input: chest X-rays, {size} x {size} px{masked}",
            f"classes: {', '.join(self.spec['classes'])}",
        ]

    def count_patients(self, data: Path) -> dict[str, int]:
        return dict.fromkeys(self.names, _count_train(data, "group"))

    def read_means(self, meta: ImageMeta) -> Means:
        return {"pixels": None if meta.statistics is None else meta.statistics["mean"]}


class SceneInputs(ModelInputs):
    """Remote-sensing scenes, each of whose bands has a mean."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.spec["bands"])

    @property
    def trained(self) -> dict[str, tuple[float | None, float]]:
        return dict(zip(self.names, zip(self.spec["mean"], self.spec["std"], strict=True), strict=True))

    def describe(self) -> list[str]:
        size, ground = self.spec["size"], self.spec["resolution_m"]
        on_ground = "" if ground is None else f" of {ground:g} m"
        return [
            f"input: scenes of {len(self.names)} bands, {size} x {size} px{on_ground}",
            f"classes: {', '.join(self.spec['classes'])}",
        ]

    def count_patients(self, data: Path) -> dict[str, int]:
        """Of scenes, which show nobody: how many scenes."""
        return dict.fromkeys(self.names, _count_train(data, "id"))

    def read_means(self, meta: SceneMeta) -> Means:
        return dict(zip(meta.bands, meta.statistics.mean, strict=True))


KINDS: dict[str, type[ModelInputs]] = {"icu": IcuInputs, "images": ImageInputs, "scenes": SceneInputs}


def inputs_of(task: Task, spec: dict[str, Any]) -> ModelInputs:
    """The inputs of a model of `task`. UsageError if it is of no data of patients or places, and DataError if the spec
    does not describe them."""
    if task.kind not in KINDS:
        raise UsageError(f"task '{task.name}' has no data of a site: a model of it is not handed over as a bundle")
    inputs = KINDS[task.kind](spec)
    try:
        _ = inputs.names, inputs.units, inputs.trained, inputs.describe()
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        why = f"its description of the inputs is incomplete ({type(error).__name__}: {error})"
        raise DataError(f"the model of task '{task.name}' is damaged", why, "restore its model.json") from error
    return inputs


def _count_train(data: Path, column: str) -> int:
    """How many different values the train split of a directory has in a column of its index."""
    index = pl.read_parquet(data / "index.parquet", columns=["split", column])
    return index.filter(pl.col("split") == "train")[column].n_unique()
