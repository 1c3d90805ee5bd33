"""Mortality: whether a patient dies in hospital, from the first hours in intensive care (Johnson et al., "Predicting
in-hospital mortality of ICU patients: the PhysioNet/Computing in Cardiology Challenge 2012")."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import polars as pl

from raylab.data.icu.labels import Framing, Label
from raylab.tasks import ards
from raylab.tasks.icu import IcuRecipe, icu_task


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


TASK = icu_task(MortalityRecipe, LABELS, ards.FULL, ards.SMOKE, ards.SEARCHES)
