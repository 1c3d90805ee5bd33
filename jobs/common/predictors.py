"""Trained models as functions of a frame, for MLflow and its model server."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import polars as pl

from raylab.errors import UsageError
from tracking.models import Predictor

if TYPE_CHECKING:
    from raylab.training.trained_model import TrainedModel

CODE = Path(__file__).with_name("served_model.py")
SERVED = "__pyfunc_model_path__"  # set by `mlflow models serve` for the process that answers
SOCKET = "UVICORN_UDS"  # uvicorn's option --uds


def make_predictor(trained: "TrainedModel", files: Path) -> Predictor | None:
    """The model as MLflow runs it, with `files`, the run's directory `model`; None if its task predicts no frames."""
    frame = trained.task.frame
    if frame is None:
        return None
    outcome, spec = trained.task.outcome, trained.spec
    names = [name for name, _, _ in frame.columns]
    example = pl.DataFrame(frame.example, schema=names, orient="row").to_pandas()
    predicted = [(name, "double") for name in outcome.prediction_columns(spec, np.zeros((1, outcome.count(spec))))]
    return Predictor(CODE, files, frame.columns, (*frame.results, *predicted, *frame.remarks), example)


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


def check_door(environment: Mapping[str, str]) -> str | None:
    """What is to be said of who can reach the model server of this process; None outside of one, and if it listens on a
    socket that only its owner can open. UsageError if others can open that socket."""
    if SERVED not in environment:
        return None
    if SOCKET not in environment:
        return (
            "every user of this machine can ask this model server: MLflow's has no login. "
            f"Set {SOCKET} to a socket in a directory of mode 0700 (docs/prediction.md)"
        )
    folder = Path(environment[SOCKET]).absolute().parent
    state = folder.stat()
    if state.st_mode & 0o077 or state.st_uid != os.getuid():
        raise UsageError(f"others can open {folder}, and so ask this model server", do=f"chmod 700 {folder}")
    return None
