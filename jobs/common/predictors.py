"""Trained models as functions of a frame, for MLflow."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import polars as pl

from tracking.models import Predictor

if TYPE_CHECKING:
    from raylab.training.trained_model import TrainedModel

CODE = Path(__file__).with_name("served_model.py")


def make_predictor(trained: "TrainedModel", files: Path) -> Predictor | None:
    """The model as MLflow runs it, with `files`, the run's directory `model`; None if its task predicts no frames."""
    frame = trained.task.frame
    if frame is None:
        return None
    names = [name for name, _, _ in frame.columns]
    example = pl.DataFrame(frame.example, schema=names, orient="row")
    output = to_pandas(trained.predict(example).table)
    return Predictor(CODE, files, frame.columns, example.to_pandas(), output)


def to_pandas(table: pl.DataFrame) -> pd.DataFrame:
    """A table of predictions as MLflow can write it as JSON: None for null, which pandas makes NaN, and plain lists."""
    return pd.DataFrame(
        {
            column.name: pd.Series(column.to_list(), dtype=object)
            if column.null_count() or column.dtype == pl.List
            else column.to_pandas()
            for column in table
        }
    )
