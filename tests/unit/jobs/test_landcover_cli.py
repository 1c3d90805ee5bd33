"""Land cover through the command line: several labels from preparation to scores, and what is refused on the way."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from test_cli import own_home, raylab, refused, same_signals  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def trained(landcover_multilabel_data: Path, own_home: Path) -> str:  # noqa: F811
    """The name of one small finished run."""
    data = landcover_multilabel_data
    words = ("train", "landcover-multilabel", "--data", data, "--smoke", "--name", "scenes", "--set", "loop.epochs=1")
    code, _, err = raylab(*words)
    assert code == 0, err
    return "scenes"


def test_a_run_of_several_labels_is_scored_and_checked_for_leakage(
    trained,
    landcover_multilabel_data,
    tmp_path,
    own_home,  # noqa: F811
):
    out = tmp_path / "result.json"
    words = ("evaluate", "landcover-multilabel", "--run", trained, "--data", landcover_multilabel_data, "--json", out)
    code, said, err = raylab(*words)
    assert code == 0, err
    scored = json.loads(out.read_text())
    assert 0 < scored["map"]["value"] <= 1 and scored["leakage"]["shared"] == 0 and scored["leakage"]["unit"] == "tile"
    assert set(scored["labels"]) == set(scored["classes"]) == {"water", "forest", "fields", "town"}
    assert "tiles (" in said and "SYNTHETIC" in said
    assert scored["unit"] == "tile" and re.match(r"too few: \d tiles? with ", scored["map"]["why"])
    kept = {path: path.read_text() for path in (own_home / "runs" / trained / "scores").glob("test-*")}
    assert kept and not any("patient " in text for text in kept.values())


def test_warnings_about_the_data_stand_beside_the_scores(trained, landcover_multilabel_data, tmp_path):
    data, out = tmp_path / "data", tmp_path / "result.json"
    shutil.copytree(landcover_multilabel_data, data)
    meta = json.loads((data / "meta.json").read_text())
    told = "neighbours may be in train and test"
    (data / "meta.json").write_text(json.dumps(meta | {"warnings": [f"{told}:\n  secret.tif"]}))
    code, said, err = raylab("evaluate", "landcover-multilabel", "--run", trained, "--data", data, "--json", out)
    assert code == 0, err
    assert f"warning about the data: {told}\n" in said and "secret" not in said
    assert json.loads(out.read_text())["warnings"] == [told]


def test_predictions_have_a_column_of_each_label(trained, landcover_multilabel_data, tmp_path):
    out = tmp_path / "p.parquet"
    words = ("predict", "landcover-multilabel", "--run", trained, "--data", landcover_multilabel_data, "--out", out)
    code, _, err = raylab(*words, "--split", "val")
    assert code == 0, err
    assert {"id", "label_water", "p_water", "p_town"} <= set(pl.read_parquet(out).columns)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "landcover", "--smoke"), "prepared for 'landcover-multilabel', not for 'landcover'"),
        (("explain", "landcover-multilabel", "--run", "scenes"), "explain shows hours and series"),
        (
            ("predict", "landcover-multilabel", "--run", "scenes", "--out", "x.parquet", "--explain"),
            "--explain requires a task on chest X-rays",
        ),
        (
            ("train", "landcover-multilabel", "--smoke", "--set", "data.class_fraction=0.5"),
            "no row is of one class",
        ),
    ],
)
def test_what_scenes_do_not_have_is_refused(words, told, trained, landcover_multilabel_data):
    assert told in refused(*words, "--data", landcover_multilabel_data)
