"""A trained model in MLflow: a frame of raw data in, a frame of probabilities out, by the same steps as `raylab.load`.

MLflow copies this file into every logged model and runs the copy to load it ("models from code"). Weights, recipe and
statistics are data beside it (safetensors and JSON). It needs raylab's own environment: `--env-manager local`.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from jobs.common.predictors import check_door, to_pandas
from raylab.errors import RaylabError
from raylab.training.trained_model import TrainedModel

log = logging.getLogger("raylab.served_model")


class ServedModel(PythonModel):
    """`predict` answers with the columns of `raylab.load(...).predict`; null is None."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the model from the artifact `model`, as data. In a model server, say or refuse who can reach it."""
        try:
            said = check_door(os.environ)
        except RaylabError as error:
            sys.exit(f"raylab: {error}")  # of a model server: it would print the error with a traceback
        if said:
            log.warning("%s", said)
        self.trained = TrainedModel.read(Path(context.artifacts["model"]).parent)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Predict; an error of raylab is an invalid request (400) with its text."""
        try:
            predicted = self.trained.predict(model_input)
        except RaylabError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from None
        for note in predicted.notes:
            log.warning("%s", note)
        return to_pandas(predicted.table)


set_model(ServedModel())
