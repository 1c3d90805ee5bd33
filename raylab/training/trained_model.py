"""A trained model and its only way to new data: raw data in, probabilities out, by the steps of its own preparation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from torch import nn

from raylab.config.recipe import Recipe
from raylab.errors import DataError, UsageError
from raylab.tasks.base import Task
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import read_model


@dataclass(frozen=True)
class NewPredictions:
    """`table`: the rows of `NewRows` with the columns of the prediction, null where there is a reason. `notes`: what
    was left out, converted or guessed, and what is absent."""

    table: pl.DataFrame
    notes: list[str]


@dataclass(frozen=True)
class TrainedModel:
    """A network with the recipe and the input spec that it was trained with."""

    task: Task
    recipe: Recipe
    spec: dict[str, Any]
    network: nn.Module

    @classmethod
    def read(cls, directory: Path) -> "TrainedModel":
        """The model of a run directory; DataError if it has no finished model."""
        return cls(*read_model(directory))

    def predict(self, data: Any) -> NewPredictions:
        """Predict new data without labels. What `data` may be is the task's: of intensive-care tasks a frame of raw
        events (new_patients.py), of those on images files (new_images.py, scenes/new_scenes.py).

        Raises UsageError if the task reads no new data, and DataError if no row can be predicted.
        """
        if self.task.read_new is None:
            raise UsageError(
                f"a model of task '{self.task.name}' does not predict new data here",
                "its inputs have no raw form that raylab prepares",
                f"raylab predict {self.task.name} --run NAME --data DIR",
            )
        new = self.task.read_new(data, self.recipe.data, self.spec)
        if new.inputs is None:
            reasons = new.rows["reason"].value_counts().sort("reason").iter_rows()
            why = "; ".join(f"{n:,}: {reason}" for reason, n in reasons)
            raise DataError(f"none of {new.rows.height:,} rows can be predicted", why, "give the model what it needs")
        p = predict(self.task, self.network, new.inputs, ProcessGroup(), self.recipe, "cpu")
        columns = pl.DataFrame(self.task.outcome.prediction_columns(self.spec, p)).with_row_index("number")
        number = (pl.col("reason").is_null().cum_sum() - 1).cast(pl.UInt32)
        rows = new.rows.with_columns(number=pl.when(pl.col("reason").is_null()).then(number))
        table = rows.join(columns, "number", "left", maintain_order="left").drop("number")
        names = [name for name in columns.columns if name != "number"]
        ids = [name for name in new.rows.columns if name not in ("reason", "absent")]
        rest = [name for name in new.rows.columns if name not in ids]
        return NewPredictions(table.select(*ids, *names, *rest), new.notes)
