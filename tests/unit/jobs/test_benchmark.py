"""The benchmark on virtual patients: whole, small, in this process."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jobs import cli
from jobs.common.benchmark_icu import named_scores, values
from jobs.common.scores import without_interval
from raylab.config.overrides import override
from raylab.distributed import benchmark_fits
from raylab.errors import UsageError
from raylab.score import Score
from raylab.tasks.recipes import shipped_recipe

WORDS = [
    "benchmark", "ards", "--patients", "160", "--folds", "2", "--landmarks", "6", "--trials", "2", "--members", "2",
    "--models", "last_pf", "boosting", "gru", "--leakage", "--quiet",
    "--set", "loop.epochs=1", "model.hidden=4", "model.trees=5", "loop.shards=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(out / "home"))
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-test")
        assert cli.main([*WORDS, "--out", str(out / "b"), "--json", str(out / "result.json")]) == 0
    return out


def one(directory: Path, pattern: str) -> Path:
    (found,) = directory.glob(pattern)
    return found


def table(done: Path, what: str) -> list[dict]:
    return json.loads((done / "result.json").read_text())[what]


def test_every_model_is_scored_on_every_patient_once(done):
    rows = {(row["cohort"], row["model"]): row for row in table(done, "table")}
    assert set(rows) == {(c, m) for c in ("all", "ventilated_pf") for m in ("last_pf", "boosting", "gru")}
    samples = pl.read_parquet(done / "b" / "landmark-6" / "data" / "samples.parquet")
    assert rows["all", "gru"]["n"] == len(samples)
    assert rows["all", "gru"]["positive"] == samples["label"].sum()
    score, difference = rows["all", "gru"]["scores"]["auroc"], rows["all", "gru"]["against_baseline"]
    assert score["low"] <= score["value"] <= score["high"]
    assert difference["value"] == pytest.approx(score["value"] - rows["all", "boosting"]["scores"]["auroc"]["value"])
    assert "against_baseline" not in rows["all", "boosting"]
    assert "SYNTHETIC" in (done / "b" / "table.md").read_text()


def test_no_model_saw_the_patients_that_it_scores(done):
    for fold in (0, 1):
        rows = pl.read_parquet(done / "b" / "landmark-6" / f"fold-{fold}" / "samples.parquet")
        scored = pl.read_parquet(one(done / "b" / "landmark-6" / "final", f"fold-{fold}-gru-*.parquet"))["stay_id"]
        assert set(scored) == set(rows.filter(pl.col("split") == "test")["stay_id"])
        assert not set(scored) & set(rows.filter(pl.col("split") != "test")["stay_id"])


def test_the_winner_is_the_best_by_val_alone(done):
    place = done / "b" / "landmark-6" / "trials" / "fold-0-boosting"
    ended = [json.loads(one(place, f"{k:03d}-*.json").read_text()) for k in (0, 1)]
    best = min(ended, key=lambda end: end["refined_loss"])
    final = one(done / "b" / "landmark-6" / "final", "fold-0-boosting-*.parquet").with_suffix("")
    assert (
        json.loads((final / "model" / "model.json").read_text())["recipe"]["model"]["learning_rate"]
        == best["recipe"]["model"]["learning_rate"]
    )


def test_metrics_of_a_cohort_and_scores_without_an_interval():
    known = Score(value=0.8, low=0.7, high=0.9)
    few = Score(value=0.6, low=None, high=None, why="too few")
    rows = [
        {"cohort": "all", "n": 90, "scores": {"auroc": known}, "against_baseline": few},
        {"cohort": "gas", "n": 4, "scores": {"auroc": few}},
    ]
    ends = {"folds/auroc": 0.8, "folds/auroc_low": 0.7, "folds/auroc_high": 0.9}
    of_gas = {"folds/gas/auroc": 0.6, "folds/gas/n": 4.0}
    assert values(rows, "all") == {**ends, **of_gas, "folds/n": 90.0, "folds/auroc_minus_baseline": 0.6}
    assert without_interval(named_scores(rows, "all")) == {"too few": ["auroc_minus_baseline", "gas/auroc"]}


def test_leakage_report(done):
    rows = {(row["cohort"], row["view"]): row for row in table(done, "leakage")}
    assert rows["all", "time of day"]["why"] == "not recorded in this data"
    assert {"lost", "above_chance"} <= rows["all", "masks"].keys() and "lost" not in rows["all", "everything"]


def test_it_goes_on_from_what_is_there(done, monkeypatch):
    monkeypatch.setenv("RAYLAB_HOME", str(done / "home"))
    monkeypatch.setattr(benchmark_fits, "trial", None)  # nothing is fitted again
    monkeypatch.setattr(benchmark_fits, "final", None)
    monkeypatch.setattr(benchmark_fits, "leaks", None)
    assert cli.main([*WORDS, "--out", str(done / "b"), "--json", str(done / "again.json")]) == 0
    assert json.loads((done / "again.json").read_text())["table"] == table(done, "table")


def test_other_data_in_the_same_place_is_refused(done, capsys):
    assert cli.main([*WORDS, "--folds", "3", "--out", str(done / "b")]) == 2
    assert "contains a benchmark of other data or folds" in capsys.readouterr().err
    assert cli.main(["benchmark", "ards", "--models", "xgboost", "--out", str(done / "c")]) == 2
    assert "boosting" in capsys.readouterr().err


def test_the_refined_loss_sets_calibration_aside():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    z = 0.8 * (2 * y - 1) + rng.normal(size=400)
    p, sure = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(-2 * z - 1))
    assert benchmark_fits.refined_loss(y, p) == pytest.approx(benchmark_fits.refined_loss(y, sure), abs=1e-6)
    assert benchmark_fits.refined_loss(y, p) < benchmark_fits.refined_loss(
        y, 1 / (1 + np.exp(-z + rng.normal(size=400)))
    )
    entropy = -np.log([1 - y.mean(), y.mean()])[y].mean()
    assert benchmark_fits.refined_loss(y, 1 - p) == pytest.approx(entropy)  # the wrong way round is worth nothing


def test_candidates_are_the_points_and_then_draws():
    recipe = shipped_recipe("ards")
    found = benchmark_fits.candidates(recipe, 4, seed=0)
    assert found[0] == recipe.search.points[0] and found == benchmark_fits.candidates(recipe, 4, seed=0)
    assert found[1:] != benchmark_fits.candidates(recipe, 4, seed=1)[1:]
    for settings in found:
        override(recipe, settings)
        assert 3e-4 <= settings["optim.lr"] <= 3e-3 and settings["model.hidden"] in (8, 16, 32)
    with pytest.raises(UsageError):
        override(recipe, {"model.hiden": 3})
