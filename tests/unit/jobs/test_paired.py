"""`raylab compare RUN RUN`: differences on the same rows."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import raylab
from jobs import cli
from jobs.common import predictions
from jobs.common.results import Run
from raylab.data.icu.prepare import prepare_icu
from raylab.errors import DataError, UsageError
from raylab.evaluation.metrics import paired_difference
from raylab.tasks import find_task
from raylab.tasks.recipes import read_recipe


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("home")
        patch.setenv("RAYLAB_HOME", str(made))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        yield made


def train(name: str, model: str, data: Path) -> Run:
    settings = {"model.name": model}
    return raylab.train("ards", data, settings=settings, smoke=True, workers=0, name=name, quiet=True)


@pytest.fixture(scope="module")
def pair(home: Path, ards_data: Path) -> tuple[Run, Run]:
    """Two baselines, which are fitted in one step."""
    return train("first", "logistic", ards_data), train("second", "last_sf", ards_data)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "other"
    prepare_icu("ards", "synthetic", None, out, patients=120, seed=5)
    return out


def test_val_can_be_compared_at_once_and_test_when_it_was_evaluated(pair: tuple[Run, Run], ards_data: Path) -> None:
    (found,) = raylab.compare(*pair, split="val", quiet=True).differences
    assert (found.run, found.minus, found.split) == ("second", "first", "val")
    again = f"raylab evaluate ards --run first --data {ards_data} --split test"
    with pytest.raises(DataError, match="first has no predictions of the test split") as refusal:
        raylab.compare(*pair, quiet=True)
    assert refusal.value.do == again


@pytest.fixture(scope="module")
def scores(pair: tuple[Run, Run], ards_data: Path) -> list[dict[str, Any]]:
    """Of both runs on the test split."""
    return [raylab.evaluate(run, ards_data, quiet=True).details for run in pair]


def test_differences_are_printed_written_and_reported(
    pair: tuple[Run, Run], scores: list[dict[str, Any]], ards_data: Path, tmp_path: Path, capsys: Any
) -> None:
    train("third", "last_pf", ards_data)
    words = ["compare", "first", "second", "--out", str(tmp_path / "report.html"), "--json", str(tmp_path / "r.json")]
    assert cli.main(words) == 0
    said, result = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert {row["name"] for row in result["runs"]} == {"first", "second"}
    (found,) = result["differences"]
    assert (found["run"], found["minus"], found["split"], found["n"]) == ("second", "first", "test", scores[0]["n"])
    for name in ("auroc", "auprc", "brier"):
        expected = scores[1][name]["value"] - scores[0][name]["value"]
        assert found["scores"][name]["value"] == pytest.approx(expected, abs=1e-12)
    shown = f"{found['scores']['auroc']['value']:+.3f}"
    page = (tmp_path / "report.html").read_text()
    block = said[said.index("paired differences") : said.index("report: ")].splitlines()
    assert "second minus first:" in block and shown in said and max(map(len, block)) <= 80
    assert "Paired differences" in page and shown in page and "third" not in page


def test_runs_on_other_splits_are_refused(
    pair: tuple[Run, Run], scores: list[dict[str, Any]], other_data: Path, tmp_path: Path
) -> None:
    other = train("elsewhere", "logistic", other_data)
    raylab.evaluate(other, other_data, quiet=True)
    with pytest.raises(DataError, match="the splits of first and elsewhere differ") as refusal:
        raylab.compare("first", other, out=tmp_path / "report.html", quiet=True)
    assert f"first: {scores[0]['n']} rows" in refusal.value.why and str(other_data) in refusal.value.why
    assert not (tmp_path / "report.html").exists()


def test_evaluations_on_other_data_are_compared_with_each_other(pair: tuple[Run, Run], other_data: Path) -> None:
    names = [raylab.evaluate(run, other_data, split="all", quiet=True).run_id for run in pair]
    (found,) = raylab.compare(*map(str, names), quiet=True).differences
    assert found.split == "all" and found.run.startswith("second-on-")
    # as from the models themselves
    frames = [raylab.predict(run, other_data, other_data.parent / f"{run.name}.parquet", quiet=True) for run in pair]
    first, second = (pl.read_parquet(frame.path) for frame in frames)
    patients = pl.read_parquet(other_data / "samples.parquet")["subject_id"].rank("dense").to_numpy()
    expected = paired_difference(first["label"], second["p_onset"], first["p_onset"], patients)
    assert found.scores["auroc"] == expected and expected.low is not None
    with pytest.raises(DataError, match="differ"):
        raylab.compare("first", str(names[0]), quiet=True)


@pytest.mark.parametrize("names", [("first",), ("first", "first")])
def test_one_run_is_not_compared(pair: tuple[Run, Run], names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="not two runs or more"):
        raylab.compare(*names, quiet=True)


def test_kept_predictions_are_private_and_name_no_stay(
    pair: tuple[Run, Run], scores: list[dict[str, Any]], ards_data: Path
) -> None:
    record = json.loads((pair[0].directory / "run.json").read_text())
    path = predictions.path(pair[0].directory, "test", record["data_hash"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    samples = find_task("ards").load(ards_data, "test", read_recipe(pair[0].directory / "recipe.json").data, None)
    with np.load(path) as found:
        assert np.array_equal(np.unique(found["group"]), np.arange(len(np.unique(samples.group))))
        assert set(found) == {"y", "p", "group", "rows", "classes", "unit"} and len(str(found["rows"])) == 64
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged") as refusal:
        raylab.compare(*pair, quiet=True)
    assert "raylab evaluate ards --run first" in refusal.value.do
