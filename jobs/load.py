"""raylab.load: a trained model in Python, for data of new patients."""

from typing import TYPE_CHECKING, Any

from jobs.common import run_tracking
from jobs.common.console import say
from jobs.common.environment import verb_environment
from jobs.common.results import RunReference, find_run
from tracking import models

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl

    from raylab.training.trained_model import TrainedModel

REGISTERED = "models:/"


class Model:
    """A trained model. `name`: of its run or registered model; `task`; `reads`: the inputs, by concept."""

    def __init__(self, name: str, trained: "TrainedModel") -> None:
        self.name, self.task, self._trained = name, trained.task.name, trained
        self.reads: tuple[str, ...] = (*trained.spec.get("features", ()), *trained.spec.get("static", ()))

    def __repr__(self) -> str:
        return f"<raylab model {self.name} of task {self.task}>"

    def predict(self, data: Any, *, quiet: bool = False) -> "pl.DataFrame | pd.DataFrame":
        """Return a frame of probabilities for new data, without labels; of pandas if `data` is, else of polars.

        Of intensive-care tasks, `data` is a polars or pandas frame of raw events: stay_id, time (hours since the start
        of the stay), concept (a name of `raylab concepts`), value and, if there is one, unit. It goes through the
        screening, the derived series, the hourly grid and the statistics that the model was trained with. The result
        has stay_id, at_h (when is predicted), last_h (the latest record before it), p_CLASS, reason (null, or why there
        is no probability) and absent (inputs of the model without a usable value). Of tasks on images, `data` is a
        folder, or paths of image files, and the result has file, p_CLASS and reason, of X-rays also view.

        What was left out, converted or guessed is printed unless `quiet`. DataError if the data cannot be used, or no
        row can be predicted.
        """
        with verb_environment():
            predicted = self._trained.predict(data)
        if not quiet:
            table = predicted.table
            say(f"{self.name}: {table['reason'].null_count():,} of {table.height:,} rows predicted")
            for note in predicted.notes:
                say(f"  {note}")
        return predicted.table.to_pandas() if type(data).__module__.split(".")[0] == "pandas" else predicted.table


@verb_environment()
def load(model: RunReference) -> Model:
    """Return the trained model of a run (a result of a verb, name, MLflow run id or directory), or a registered one,
    `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Weights, recipe and statistics are read as data: no stored code is run. Raises UsageError, DataError or
    TrackingError if there is no such model.
    """
    from raylab.training.trained_model import TrainedModel

    if isinstance(model, str) and model.startswith(REGISTERED):
        with models.fetch(run_tracking.checked_address(), model) as fetched:
            return Model(model, TrainedModel.read(models.find_files(fetched, model).parent))
    directory = find_run(model)
    return Model(directory.name, TrainedModel.read(directory))
