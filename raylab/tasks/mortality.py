"""Mortality: whether a patient dies in hospital, from the first hours in intensive care (Johnson et al., "Predicting
in-hospital mortality of ICU patients: the PhysioNet/Computing in Cardiology Challenge 2012")."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import polars as pl

from raylab.config.recipe import IcuData, Recipe
from raylab.data.icu.labels import Framing, Label
from raylab.data.icu.meta import IcuMeta
from raylab.tasks import ards
from raylab.tasks.base import Task
from raylab.tasks.icu import EVENTS, SITE_STATISTICS, IcuRecipe, icu_preparation, read_new
from raylab.tasks.outcomes import Binary

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import Samples


@dataclass(frozen=True)
class Death(Label):
    """Death in hospital, at any time after the prediction. Ratios and windows serve the cohorts alone."""

    classes: ClassVar[tuple[str, str]] = ("discharge alive", "death in hospital")
    has_onset: ClassVar[bool] = False

    def needs(self) -> tuple[str, ...]:
        return ()

    def reads(self) -> tuple[str, ...]:
        return ()

    def exclude(self, stays: pl.DataFrame, framing: Framing) -> Iterator[tuple[str, pl.DataFrame]]:
        stays = stays.filter(pl.col("end_h").is_null() | (pl.col("end_h") > framing.landmark))
        yield f"in hospital at {framing.landmark:g} h", stays
        yield "outcome in hospital known", stays.filter(pl.col("died").is_not_null())

    def rows(self, stays: pl.DataFrame, framing: Framing) -> pl.DataFrame:
        outcome = pl.when("died").then(pl.lit("death in hospital")).otherwise(pl.lit("discharge alive"))
        at = pl.lit(float(framing.landmark))
        return stays.with_columns(at_h=at, label=pl.col("died").cast(pl.Int8), outcome=outcome)

    def describe(self, landmark: float, horizon: float, gap: float = 0) -> dict[str, Any]:
        return {
            "title": "death in hospital",
            "onset": "death in hospital, as the source says at discharge",
            "population": f"{self.min_age:g} years and older, or of unknown age" if self.min_age else "every age",
            "at_risk": f"a record beyond {landmark:g} h, in hospital then, and an outcome that is known",
            "positive": "death in hospital",
            "persistence": False,
            "name": self.name,
            "version": self.version,
            "min_age": self.min_age,
        }


LABELS = {"in-hospital-death": Death("in-hospital-death", version=1)}


class MortalityRecipe(IcuRecipe):
    task: Literal["mortality"]
    """name of the task"""


def load(directory: Path, split: str, data: IcuData, spec: dict[str, Any] | None) -> "Samples":
    from raylab.data.icu.dataset import load_icu

    return load_icu(directory, split, data.cohort, spec, data.fill, data.virtual_patient, "mortality")


def of_ards(recipe: Recipe) -> MortalityRecipe:
    """The same recipe for this task: the inputs are those of ards."""
    return MortalityRecipe.model_validate({**recipe.model_dump(), "task": "mortality"})


TASK = Task(
    name="mortality",
    kind="icu",
    outcome=Binary(),
    objective="auroc",
    load=load,
    meta=IcuMeta,
    preparation=icu_preparation(LABELS),
    read_new=partial(read_new, LABELS),
    frame=EVENTS,
    site_statistics=SITE_STATISTICS,
    full=of_ards(ards.FULL),
    smoke=of_ards(ards.SMOKE),
    searches=ards.SEARCHES,
    primary=("auroc", "auprc"),
    secondary=("brier", "calibration_slope"),
)
