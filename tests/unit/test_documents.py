"""Every small file that a process leaves for the next one: when it is damaged, its reader names it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import relay
from cluster.directory import Directory
from jobs.common import model_card
from raylab.errors import DataError, RaylabError
from raylab.physiology import sweep
from raylab.tasks.recipes import read_recipe, shipped_recipe
from raylab.training.model_note import read_model_note
from raylab.training.run_record import read_run_record
from raylab.training.run_result import read_end, read_result
from tracking import compare, outbox, server

READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": read_run_record,
    "recipe.json": lambda place: read_recipe(place / "recipe.json"),
    "result.json": read_result,
    "end.json": read_end,
    "model/model.json": read_model_note,
    "target.json": outbox.target,
    "mlflow/server.json": server.running,
    "head.json": lambda place: Directory(place).read("head"),
    "status.json": lambda place: Directory(place).read("status"),
    "problems/7.json": lambda place: Directory(place).problems(),
    "relay.json": lambda place: relay.running(Directory(place)),
    "sweep.json": lambda place: sweep.begin(sweep.recipe("living", {}), place),
}
FIELDS = [
    *("uri", "run_id", "task", "steps", "best", "how", "objective", "recipe"),
    *("spec", "host", "pid", "job", "time", "search", "model", "data"),
]
DAMAGES = {
    "empty": b"",
    "torn": b'{"name": "x", "run_',
    "list": b"[1, 2]",
    "foreign": b'{"x": 1}',
    "bytes": b"\xff\xfe\x00\x01",
    "types": json.dumps({name: [[]] for name in FIELDS}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_with_the_next_step(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(DAMAGES[damage])
    with pytest.raises(RaylabError) as caught:
        READERS[name](tmp_path)
    said = str(caught.value)
    assert str(path) in said and "next: " in said


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(shipped_recipe("ards").model_dump_json())
    assert read_recipe(path) == shipped_recipe("ards")


def test_the_card_is_written_without_a_damaged_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for text in DAMAGES.values():
        (tmp_path / "val.json").write_bytes(text)
        assert model_card._read_scores(tmp_path / "val.json") is None
        assert str(tmp_path / "val.json") in caplog.text
        caplog.clear()


@pytest.mark.parametrize("text", ["", "{", "[1]", "3"])
def test_a_damaged_tag_costs_only_the_reasons_that_it_holds(text: str) -> None:
    row = {"name": "run", f"tag/{compare.NO_INTERVAL}val": text or "{", "val/auroc": 0.5}
    assert compare.without_interval(row, "val") == {}


def test_a_damaged_artifact_costs_only_its_own_part_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracking import report

    found = {"attrition.json": b"{", "recipe.json": b"\xff"}
    monkeypatch.setattr(report, "compare", SimpleNamespace(**vars(compare) | {"artifacts": lambda *of, **how: found}))
    assert report._extras("uri", "run") == report.Extras(found, {}, "")


def test_data_errors_of_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be read as JSON"):
        read_result(tmp_path)
