"""A model of images leaves as a bundle, and is scored at a site that has other images. All of them are SYNTHETIC."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs import cli, export
from jobs.common.model_inputs import ImageInputs
from raylab.data.images.meta import ImageMeta
from raylab.data.images.prepare import prepare_images
from raylab.data.images.scenes.prepare import prepare_scenes
from raylab.data.images.scenes.scene import SceneRequest
from raylab.data.images.scenes.sources import synthetic
from raylab.data.prepared import read_meta
from raylab.evaluation.site_report import check_report
from raylab.training import bundle as bundles

CLASSES = {"covidnet": ("normal", "pneumonia", "COVID-19"), "landcover": ("water", "forest", "fields", "town")}


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module", params=["covidnet", pytest.param("landcover", marks=pytest.mark.slow)])
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(task, its data, bundle, result of the export) of a run in a home of its own."""
    task = request.param
    data, place = request.getfixturevalue(f"{task}_data"), tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(place / "home"))
        words = ("--smoke", "--quiet", "--set", "loop.epochs=1")
        assert raylab("train", task, "--data", data, "--name", "first", *words) == 0
        yield task, data, place / "first.raylab", export.export("first", out=place / "first.raylab", quiet=True)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The images of another site, by task; its X-rays are of another hospital and larger."""
    found = {task: tmp_path_factory.mktemp("site") / task for task in CLASSES}
    prepare_images("covidnet", found["covidnet"], *[None] * 4, source="synthetic", size=80, patients=60, seed=5,
                   domain="B")  # fmt: skip
    prepare_scenes("landcover", found["landcover"], synthetic.read(SceneRequest(None, 5, 160, 19)), seed=0)
    return found


def test_a_bundle_of_images_has_a_card_with_classes_and_size_but_no_small_count(exported):
    task, data, path, told = exported
    bundle, _, _, contents = bundles.read_bundle(path, told["signer"])
    card = contents[bundles.CARD].decode()
    size = {"covidnet": "64 x 64 px", "landcover": "16 x 16 px of 10 m"}[task]
    assert size in card and ", ".join(CLASSES[task]) in card and "SYNTHETIC" in card
    assert bundle.scores == {} and "Left out: they rest on fewer than 10 patients" in card, "val is small"
    counts = [n for of in bundle.counts.values() for n in of.values()]
    assert None in counts and all(n is None or n == 0 or n >= 10 for n in counts) and told["suppressed"] > 0
    index = pl.read_parquet(data / "index.parquet")
    assert not [id for id in index["id"].to_list() if id.encode() in path.read_bytes()]


def test_another_site_scores_it_and_tells_aggregates_alone(exported, elsewhere, tmp_path):
    task, _, path, told = exported
    words = ("--signer", told["signer"], "--data", elsewhere[task], "--split", "all", "--json", tmp_path / "r.json")
    assert raylab("evaluate", path, *words) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    report = check_report(content, told["concepts"], CLASSES[task], task, told["sha256"])
    assert tuple(report.classes) == CLASSES[task] and sum(report.classes.values()) == report.rows
    assert 0 <= report.scores["accuracy"].low <= report.scores["accuracy"].value <= 1
    assert report.scores[f"sensitivity/{CLASSES[task][0]}"].value is not None
    assert report.coverage == {} and report.recalibration is None
    assert set(report.shift) == set(told["concepts"]) and all(abs(shift) < 2 for shift in report.shift.values())
    index = pl.read_parquet(elsewhere[task] / "index.parquet")
    assert not [id for id in index["id"].to_list() if id in (tmp_path / "r.json").read_text()]


def test_what_does_not_fit_or_is_too_little_is_refused(exported, elsewhere, tmp_path, capsys):
    task, _, path, _ = exported
    other = next(name for name in CLASSES if name != task)
    assert raylab("evaluate", path, "--data", elsewhere[other]) == 2
    assert f"was prepared for '{other}', not for '{task}'" in capsys.readouterr().err
    assert raylab("evaluate", path, "--data", elsewhere[task], "--split", "val") == 2
    assert "too few rows for scores that may leave" in capsys.readouterr().err
    assert raylab("evaluate", path, "--data", elsewhere[task], "--split", "all", "--recalibrate", 20) == 2
    assert "--recalibrate is for tasks on intensive-care data" in capsys.readouterr().err


def test_smaller_images_than_the_model_reads_are_refused(exported, tmp_path, capsys):
    task, _, path, _ = exported
    if task != "covidnet":
        pytest.skip("scenes of this source have one size")
    small = tmp_path / "small"
    prepare_images("covidnet", small, *[None] * 4, source="synthetic", size=32, patients=30)
    assert read_meta(small, "covidnet", ImageMeta).size == 32
    assert raylab("evaluate", path, "--data", small, "--split", "all") == 2
    assert "has images of 32 px, but 64 px are requested" in capsys.readouterr().err


@pytest.mark.parametrize(("mask", "said"), [(None, ""), ("centre", "a control"), ("border", "all but the lung field")])
def test_a_card_says_what_the_network_does_not_see(mask: str | None, said: str) -> None:
    spec = {"size": 64, "classes": ["a", "b"], **({} if mask is None else {"mask": mask})}
    line, _ = ImageInputs(spec).describe()
    assert line.startswith("input: chest X-rays, 64 x 64 px") and said in line
    assert ("black" in line) == (mask is not None) and ("a control" in line) == (mask == "centre")
