"""Sections through the command line: pretraining, a frozen probe, scores, saliency, and what is refused on the way."""

import json
from pathlib import Path

import polars as pl
import pytest
from test_cli import own_home, raylab, refused, same_signals  # noqa: F401  (fixtures)

SMALL = ("--smoke", "--set", "loop.epochs=1", "model.width=4")


@pytest.fixture(scope="module")
def probe(sections_data: Path, own_home: Path) -> str:  # noqa: F811
    """The name of a frozen probe on a pretrained network."""
    data = ("--data", sections_data)
    code, _, err = raylab("train", "sections-pretraining", *data, *SMALL, "--name", "pretrained")
    assert code == 0, err
    more = ("transfer.mode=probe", "--from", "pretrained", "--name", "probe")
    code, _, err = raylab("train", "sections", *data, *SMALL, *more)
    assert code == 0, err
    return "probe"


@pytest.mark.slow
def test_a_frozen_probe_is_scored_in_sections_and_checked_for_leakage(probe, sections_data, tmp_path):
    out = tmp_path / "result.json"
    code, said, err = raylab("evaluate", "sections", "--run", probe, "--data", sections_data, "--json", out)
    assert code == 0, err
    scored = json.loads(out.read_text())
    assert scored["section_error"]["value"] > 0 and scored["r2"]["value"] <= 1
    assert scored["leakage"]["shared"] == 0 and scored["leakage"]["unit"] == "section"
    assert scored["leakage"]["parents"]["pretrained"]["shared"] == 0
    assert "sections, SYNTHETIC data" in said and "none, no section here was in train or val" in said


@pytest.mark.slow
def test_predictions_are_in_the_unit_of_the_table(probe, sections_data, tmp_path):
    out = tmp_path / "p.parquet"
    words = ("predict", "sections", "--run", probe, "--data", sections_data, "--out", out, "--split", "val")
    code, _, err = raylab(*words)
    assert code == 0, err
    table = pl.read_parquet(out)
    assert {"id", "section", "depth_um", "p_depth_um"} <= set(table.columns)
    assert (table["depth_um"] - 20 * table["section"]).abs().max() < 1e-3


@pytest.mark.slow
def test_the_saliency_of_sections_is_drawn(probe, sections_data, tmp_path):
    code, said, err = raylab("explain", "sections", "--run", probe, "--data", sections_data)
    assert code == 0, err
    assert Path(said.split("plots: ")[1].splitlines()[0]).stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("train", "landcover", "--smoke"), "prepared for 'sections', not for 'landcover'"),
        (("train", "sections", "--smoke", "--set", "data.class_fraction=0.5"), "no row is of one class"),
        (("explain", "sections-pretraining", "--run", "pretrained"), "predicts nothing"),
        (("explain", "sections", "--run", "probe", "--pages"), "require a task on intensive-care data"),
        (("transfer", "sections", "--from", "pretrained"), "is of task 'sections-pretraining', not 'sections'"),
    ],
)
def test_what_sections_do_not_have_is_refused(words, told, probe, sections_data):
    assert told in refused(*words, "--data", sections_data)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "needs --source"),
        (("--source", "none"), "unknown source of sections 'none'"),
        (("--source", "synthetic", "--patients", 30, "--fold", 7), "folds are numbered 0 to 4"),
        (("--source", "files", "--path", "nowhere"), "needs --path DIR"),
    ],
)
def test_preparations_that_cannot_be_are_refused(words, told, own_home, tmp_path):  # noqa: F811
    assert told in refused("prepare", "sections", "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
