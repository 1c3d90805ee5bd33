"""raylab.load: a trained model on raw events of new patients, and the same model as MLflow keeps it."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

import raylab
from jobs.common import home, predictors
from raylab.data.icu.sources import synthetic
from raylab.errors import DataError, TrackingError, UsageError
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.trained_model import TrainedModel
from tracking import models, runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield home.home()


@pytest.fixture(scope="module")
def run(place, ards_data):
    recipe = shipped_recipe("ards", smoke=True)
    return raylab.train(recipe, ards_data, settings={"loop.epochs": 1}, workers=0, name="first", quiet=True)


@pytest.fixture(scope="module")
def events():
    """Of the patients of `ards_data`."""
    return synthetic.read(200, 0).events.collect().drop("subject_id")


@pytest.fixture(scope="module")
def expected(run, ards_data, tmp_path_factory):
    """stay_id and p_onset of the test split, by `raylab predict`."""
    out = tmp_path_factory.mktemp("predicted") / "p.parquet"
    raylab.predict(run, ards_data, out, split="test", quiet=True)
    return pl.read_parquet(out).select(stay_id="id", p_onset="p_onset")


def assert_same(predicted, expected):
    both = expected.join(predicted, "stay_id", "left", maintain_order="left")
    assert both["p_onset_right"].null_count() == 0 and both["p_onset"].n_unique() > 1
    np.testing.assert_allclose(both["p_onset_right"], both["p_onset"], rtol=1e-6)


def test_raw_events_give_the_probabilities_of_the_prepared_split(run, place, events, expected, capsys):
    mine = events.filter(pl.col("stay_id").is_in(expected["stay_id"].to_list()))
    for reference in (run, "first", "runs/first"):
        model = raylab.load(reference)
        assert (model.name, model.task) == ("first", "ards") and "pf" in model.reads
        assert_same(model.predict(mine, quiet=True), expected)
    assert capsys.readouterr().out == ""
    assert_same(model.predict(mine.filter(pl.col("time") < 12)), expected)
    assert f"first: {expected.height} of {expected.height} rows predicted" in capsys.readouterr().out


def test_a_frame_of_pandas_returns_one_and_ids_keep_their_type(run, events, expected):
    numbers = events.with_columns(pl.col("stay_id").str.extract(r"(\d+)$").cast(pl.Int64))
    predicted = raylab.load(run).predict(numbers.to_pandas(), quiet=True)
    assert type(predicted).__module__.startswith("pandas") and predicted["stay_id"].dtype == "int64"
    number = expected.with_columns(pl.col("stay_id").str.extract(r"(\d+)$").cast(pl.Int64))
    assert_same(pl.from_pandas(predicted[["stay_id", "p_onset"]]), number)


def test_a_stay_with_too_little_input_has_a_reason_and_all_of_them_are_an_error(run, capsys):
    frame = pl.DataFrame(
        {
            "stay_id": ["a", "b"],
            "time": [1.0, 1.0],
            "concept": ["hr", "lactate"],
            "value": [80.0, 2.0],
            "unit": ["", ""],
        }
    )
    predicted = raylab.load(run).predict(frame)
    assert predicted.columns == ["stay_id", "at_h", "last_h", "p_onset", "reason", "absent"]
    assert predicted["p_onset"].is_null().to_list() == [False, True] and "pao2" in predicted["absent"][0]
    said = capsys.readouterr().out
    assert "without a prediction: 1: too little input: no usable value of pao2, sao2, spo2, hr" in said
    assert "without a usable value in any stay: map" in said and "the usual one taken: hr 1, lactate 1" in said
    with pytest.raises(DataError, match=r"none of 1 rows can be predicted[\s\S]*no usable value of pao2"):
        raylab.load(run).predict(frame.filter(stay_id="b"))


def test_a_registered_model_is_the_run(run, place, events, expected):
    uri = runs.address(place)
    version = models.register(uri, run.run_id, "early-warning", 0.8, 0.5).version
    for name in (f"models:/early-warning/{version}", "models:/early-warning@best"):
        assert_same(raylab.load(name).predict(events, quiet=True), expected)
    with pytest.raises(TrackingError, match="no registered model models:/early-warning@champion"):
        raylab.load("models:/early-warning@champion")
    assert not list((place / "mlflow").rglob("*.pkl")) and not list((place / "mlflow").rglob("*.pt2"))


def test_wrong_names_are_refused(run):
    with pytest.raises(UsageError, match="first"):
        raylab.load("frist")


def test_a_model_server_says_or_refuses_who_can_reach_it(tmp_path):
    served = {predictors.SERVED: "model"}
    assert predictors.check_door({}) is None
    assert "every user of this machine" in predictors.check_door(served)
    behind = {**served, predictors.SOCKET: str(tmp_path / "door" / "socket")}
    (tmp_path / "door").mkdir(mode=0o700)
    assert predictors.check_door(behind) is None
    (tmp_path / "door").chmod(0o711)
    with pytest.raises(UsageError, match="others can open"):
        predictors.check_door(behind)


def test_a_model_is_logged_whomever_it_was_trained_on(run):
    """Its example need not be of its cohort."""
    trained = TrainedModel.read(run.directory)
    data = trained.recipe.data.model_copy(update={"cohort": "ventilated_pf"})
    other = replace(trained, recipe=trained.recipe.model_copy(update={"data": data}))
    made = predictors.make_predictor(other, run.directory / "model")
    with pytest.raises(DataError, match="outside of the cohort 'ventilated_pf'"):
        other.predict(made.example)
    assert [name for name, _ in made.results] == list(trained.predict(made.example).table.columns)


def test_a_task_without_raw_data_predicts_none(run):
    trained = TrainedModel.read(run.directory)
    with pytest.raises(UsageError, match="does not predict new data"):
        replace(trained, task=find_task("surrogate")).predict(pl.DataFrame())
    assert predictors.make_predictor(replace(trained, task=find_task("surrogate")), run.directory) is None
