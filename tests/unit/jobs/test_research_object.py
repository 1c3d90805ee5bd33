"""An experiment becomes a research object: an RO-Crate whose description is complete, which holds no patient, and from
which another home repeats a run to the bit. The patients are SYNTHETIC."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import polars as pl
import pytest

from jobs import cli, export
from jobs.common import provenance, research_object
from raylab.errors import DataError, UsageError
from tracking.provenance import read_provenance


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def home(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home with a run, whose name needs quoting in an address, and one that goes on from its weights. The first one's
    rows of val are many enough to be told; the second one's are not."""
    place = tmp_path_factory.mktemp("crate") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(place))
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "study")
        short = ("--data", ards_data, "--quiet", "--set", "loop.epochs=1")
        assert raylab("train", "ards", *short, "--name", "first run", "--smoke") == 0
        assert raylab("transfer", "ards", "--from", "first run", *short, "--name", "second") == 0
        (scores,) = (place / "runs" / "first run" / "scores").glob("val-*.json")
        content = json.loads(scores.read_text())
        content |= {"n": 90, "patients": 90, "classes": {"no onset": 70, "onset": 20}}
        content["auroc"] |= {"low": content["auroc"]["value"] - 0.1, "high": content["auroc"]["value"] + 0.1}
        scores.write_text(json.dumps(content))
        yield place


@pytest.fixture(scope="module")
def crate(home: Path) -> Path:
    """The research object of all runs of the home."""
    path = home.with_name("study.crate.zip")
    words = ("--author", "Ada Byron", "--author", "Max Born", "--licence", "CC BY 4.0")
    assert raylab("export", "--crate", "--out", path, *words) == 0
    return path


def read(crate: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The entities of the description by id, and the content of all members."""
    with zipfile.ZipFile(crate) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
        directories = [name for name in archive.namelist() if name.endswith("/")]
    document = json.loads(members["ro-crate-metadata.json"])
    assert document["@context"] == "https://w3id.org/ro/crate/1.2/context"
    graph = document["@graph"]
    assert directories == [unquote(e["@id"]) for e in graph if e["@id"].startswith("runs/") and e["@id"].endswith("/")]
    assert len({entity["@id"] for entity in graph}) == len(graph), "an id names two entities"
    return {entity["@id"]: entity for entity in graph}, members


def refer(value: Any) -> list[str]:
    """All ids that a value refers to."""
    if isinstance(value, list):
        return [id for item in value for id in refer(item)]
    return [value["@id"]] if isinstance(value, dict) else []


def test_the_description_is_complete(crate):
    """What RO-Crate 1.2 demands: the descriptor, the root with its properties, every file and directory as a part of
    it, and no reference to an entity that is not described."""
    entities, members = read(crate)
    descriptor, root = entities["ro-crate-metadata.json"], entities["./"]
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.2"} and descriptor["about"] == {"@id": "./"}
    assert {"name", "description", "datePublished", "license"} <= root.keys() and "SYNTHETIC" in root["description"]
    for entity in entities.values():
        assert entity["@type"]
        for name, value in entity.items():
            for id in [] if name == "conformsTo" else refer(value):
                assert id in entities, f"{entity['@id']} refers to {id}"
    files = {id: entity for id, entity in entities.items() if entity["@type"] == "File"}
    assert {unquote(id) for id in files} == members.keys() - {"ro-crate-metadata.json"}
    for id, entity in files.items():
        content = members[unquote(id)]
        assert (entity["contentSize"], entity["sha256"]) == (str(len(content)), hashlib.sha256(content).hexdigest())
    directories = refer(root["hasPart"])
    parts = {*directories, *(id for place in directories for id in refer(entities[place].get("hasPart", [])))}
    assert parts >= files.keys() and "runs/first%20run/" in parts


def test_runs_are_actions_with_recipe_data_parent_and_results(crate, ards_data):
    entities, members = read(crate)
    data_hash = json.loads((ards_data / "meta.json").read_text())["data_hash"]
    first, second = entities["#run-first%20run"], entities["#run-second"]
    weights = "runs/first%20run/model/model.safetensors"
    assert weights in refer(first["result"]) and weights in refer(second["object"]), "it goes on from these weights"
    assert {"runs/first%20run/ledger.jsonl", "runs/first%20run/metrics.json"} <= set(refer(first["result"]))
    assert "runs/first%20run/plots/val-roc.png" in refer(first["result"])
    (data,) = [entities[id] for id in refer(first["object"]) if id.startswith("#data-")]
    assert data["identifier"] == f"sha256:{data_hash}"
    (software,) = refer(first["instrument"])
    assert entities[software]["version"] in entities[software]["url"] and "SHA-256" in "".join(
        entities[software]["softwareRequirements"]
    )
    assert [entities[id]["name"] for id in refer(entities["./"]["author"])] == ["Ada Byron", "Max Born"]
    (licence,) = refer(entities["./"]["license"])
    assert entities[licence]["name"] == "CC BY 4.0"
    scores = {entities[id]["name"]: entities[id] for id in refer(entities["runs/first%20run/"]["variableMeasured"])}
    auroc = scores["auroc, val split"]
    assert 0 <= auroc["minValue"] <= auroc["value"] <= auroc["maxValue"] <= 1
    metrics = json.loads(members["runs/first run/metrics.json"])
    (told,) = metrics.values()
    assert told["rows"] == 90 and told["scores"]["auroc"]["value"] == auroc["value"]


def test_few_rows_and_patients_are_not_in_it(home, crate, ards_data, tmp_path, capsys):
    entities, members = read(crate)
    assert json.loads(members["runs/second/metrics.json"]) == {}, "val has few patients with ARDS"
    assert not refer(entities["runs/second/"]["variableMeasured"])
    assert not [name for name in members if name.startswith("runs/second/plots/")]
    assert raylab("export", "second", "--crate", "--out", tmp_path / "c.zip") == 0
    assert "left out: second, scores on val: " in capsys.readouterr().out
    rows = pl.read_parquet(ards_data / "samples.parquet")
    for name in ("subject_id", "stay_id"):
        for id in rows[name].unique().to_list():
            assert not any(f'"{id}"'.encode() in content for content in members.values())
    assert not any(str(place).encode() in content for place in (ards_data, home) for content in members.values())


def test_figures_of_real_data_are_added_only_if_asked_for(home, monkeypatch):
    directory, describe = home / "runs" / "first run", provenance.describe
    monkeypatch.setattr(provenance, "describe", lambda path: describe(path).model_copy(update={"synthetic": False}))
    without, left_out = research_object.collect(directory, False)
    assert not [name for name in without.files if name.startswith("plots/")]
    assert left_out == [
        f"first run, {len(list((directory / 'plots').glob('val-*.png')))} figures of val: --figures adds them"
    ]
    assert "plots/val-roc.png" in research_object.collect(directory, True)[0].files


def test_a_confusion_matrix_with_small_counts_is_left_out(home):
    directory = home / "runs" / "first run"
    (file,) = (directory / "scores").glob("val-*.json")
    before, figure = file.read_text(), directory / "plots" / "val-confusion.png"
    figure.write_bytes((directory / "plots" / "val-roc.png").read_bytes())
    try:
        for matrix, is_told in (([[70, 0], [10, 10]], True), ([[64, 6], [10, 10]], False)):
            file.write_text(json.dumps(json.loads(before) | {"confusion": matrix}))
            part, left_out = research_object.collect(directory, True)
            assert ("plots/val-confusion.png" in part.files) == is_told and "plots/val-roc.png" in part.files
            assert left_out == [] if is_told else ["confusion matrix of val" in line for line in left_out] == [True]
    finally:
        file.write_text(before)
        figure.unlink()


@pytest.mark.slow
def test_another_home_repeats_a_run_of_it_to_the_bit(crate, ards_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    assert [one.name for one in read_provenance(crate)] == ["first run", "second"]
    assert raylab("rerun", crate, "--data", ards_data) == 2
    assert "shows 2 runs: first run, second" in capsys.readouterr().err
    assert raylab("rerun", crate, "--run", "first run", "--data", ards_data, "--name", "again") == 0
    assert "the same to the bit" in capsys.readouterr().out


def test_only_an_earlier_research_object_is_replaced(home, tmp_path, capsys):
    out = tmp_path / "c.zip"
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("thesis.txt", "all of it")
    before = out.read_bytes()
    assert raylab("export", "--crate", "second", "--out", out) == 2 and out.read_bytes() == before
    out.unlink()
    assert (
        raylab("export", "--crate", "second", "--out", out) == raylab("export", "--crate", "second", "--out", out) == 0
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["second", "--licence", "MIT"], "add --crate"),
        (["--crate", "second", "--key", "KEY"], "a research object has no signature"),
        (["--crate", "second", "second"], "two of the runs have the same name"),
        (["--crate", "nobody"], "nobody"),
        (["first run", "second"], "a bundle is of one run, got 2"),
        ([], "a bundle is of one run, got 0"),
    ],
)
def test_what_cannot_be_exported_is_refused(words, why, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert raylab("export", *words) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_experiment_without_runs_and_a_page_of_patients_are_refused(home, tmp_path, monkeypatch):
    page = tmp_path / "stays.html"
    page.write_text("<title>stays</title>")
    with pytest.raises(DataError, match="is not a report of raylab compare"):
        export.export_crate(["second"], out=tmp_path / "c.zip", report=page)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    with pytest.raises(UsageError, match="experiment 'other' has no finished run"):
        export.export_crate(out=tmp_path / "c.zip")
    assert not (tmp_path / "c.zip").exists()
