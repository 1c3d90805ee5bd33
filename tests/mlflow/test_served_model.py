"""A run's model on the real MLflow server: a function of raw events, without pickle."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import polars as pl
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server

import raylab
from jobs.common.results import Run
from raylab.data.icu.sources import synthetic
from raylab.tasks.recipes import shipped_recipe
from tracking import models, server

NAME = "models:/served@best"


@pytest.fixture(scope="module")
def run(home: Path, served: server.Server, ards_data: Path) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(home))
        recipe, model = shipped_recipe("ards", smoke=True), {"model.name": "logistic"}
        done = raylab.train(recipe, ards_data, settings=model, workers=0, name="served", quiet=True)
        assert done.run_id is not None
        models.register(served.uri, done.run_id, "served", 0.8, 0.5)
        yield done


@pytest.fixture(scope="module")
def loaded(run: Run, served: server.Server) -> mlflow.pyfunc.PyFuncModel:
    with models._here(served.uri):
        return mlflow.pyfunc.load_model(NAME)


@pytest.fixture(scope="module")
def events(run: Run) -> pd.DataFrame:
    frame = synthetic.read(200, 0).events.filter(pl.col("stay_id") < "synthetic-00040").collect()
    return frame.drop("subject_id").to_pandas()


def test_the_model_is_a_function_of_named_columns(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    inputs, outputs = loaded.metadata.get_input_schema(), loaded.metadata.get_output_schema()
    assert inputs.input_names() == ["stay_id", "time", "concept", "value", "unit"]
    assert inputs.required_input_names() == ["stay_id", "time", "concept", "value"]
    assert outputs.input_names() == ["stay_id", "at_h", "last_h", "p_onset", "reason", "absent"]
    assert "python_function" in loaded.metadata.flavors and "pytorch" not in loaded.metadata.flavors


def test_it_predicts_as_the_run_itself(run: Run, loaded: mlflow.pyfunc.PyFuncModel, events: pd.DataFrame) -> None:
    expected = raylab.load(run).predict(events, quiet=True)
    for other in (loaded.predict(events), raylab.load(NAME).predict(events, quiet=True)):
        assert other["stay_id"].tolist() == expected["stay_id"].tolist()
        np.testing.assert_allclose(other["p_onset"].astype(float), expected["p_onset"], rtol=1e-6)
        assert [list(names) for names in other["absent"]] == [list(names) for names in expected["absent"]]
    assert expected["p_onset"].isna().any() and expected["p_onset"].nunique() > 1


def test_a_request_of_events_is_answered_in_plain_json(loaded: mlflow.pyfunc.PyFuncModel) -> None:
    """By MLflow's own code for requests, without its web server."""

    def ask(*records: dict[str, object]) -> list[dict[str, object]]:
        body = json.dumps({"dataframe_records": records})
        answer = scoring_server.invocations(body, "application/json", loaded, loaded.metadata.get_input_schema())
        assert answer.status == 200 and "NaN" not in answer.response
        found: list[dict[str, object]] = json.loads(answer.response)["predictions"]
        return found

    hr = {"stay_id": "a", "time": 3, "concept": "hr", "value": 88}
    lactate = {"stay_id": "b", "time": 3.5, "concept": "lactate", "value": 2.5, "unit": "mmol/L"}
    first, second = ask(hr, lactate)
    assert isinstance(first["p_onset"], float) and first["reason"] is None and first["at_h"] == 12
    assert isinstance(first["absent"], list) and "pao2" in first["absent"] and "hr" not in first["absent"]
    assert second["p_onset"] is None and "too little input" in str(second["reason"])
    with pytest.raises(
        MlflowException, match=r"none of 1 rows can be predicted[\s\S]*no usable value of pao2"
    ) as refused:
        ask(lactate)
    assert refused.value.get_http_status_code() == 400 and "Traceback" not in str(refused.value)
    with pytest.raises(MlflowException, match="enforce schema"):
        ask({"stay_id": "a", "time": 3, "concept": "hr"})


def test_what_is_stored_is_code_and_data_without_pickle(run: Run, served: server.Server) -> None:
    with models.fetch(served.uri, NAME) as fetched:
        files = {str(path.relative_to(fetched)) for path in fetched.rglob("*") if path.is_file()}
        assert {"served_model.py", "artifacts/model/model.safetensors", "artifacts/model/model.json"} <= files
        assert not [name for name in files if name.endswith((".pkl", ".pt", ".pt2", ".pth"))], files
        examples = [path.read_text() for path in fetched.glob("*example*.json")]
        assert examples and all("synthetic-1" in text for text in examples)
