"""run.json and ledger.jsonl as types: what earlier versions wrote is read, what is damaged is named."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.common import home
from raylab.errors import DataError
from raylab.training.ledger import (
    Checkpoint,
    HandOver,
    Regroup,
    Start,
    Step,
    is_handed_over,
    read_ledger,
    starts,
    steps,
)
from raylab.training.run_record import Registration, read_run_record

OLD = {  # as version 0.1 wrote it, of a search's winner
    "name": "old", "run_id": "a" * 32, "kind": "trial", "parent": None, "tags": {"raylab.kind": "trial"}, "number": 3,
    "uri": "sqlite:////none/mlflow.db", "experiment": "raylab", "task": "ards", "data": "/data/ards",
    "data_hash": "b" * 64, "split_hash": "c" * 64, "synthetic": False, "status": "FINISHED",
    "register": {"name": "raylab-ards", "score": 0.8, "loss": 0.3}, "registered": "raylab-ards/1", "forgotten": [1, 2],
}  # fmt: skip


def write(directory: Path, **changes: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({**OLD, **changes}))
    return directory


def test_a_record_of_version_0_1_is_read_and_written_again_with_all_that_it_had(tmp_path):
    record = home.note(write(tmp_path))
    assert (record.number, record.test_reads, record.best_step) == (3, 0, 0)
    assert record.register_as == Registration(name="raylab-ards", score=0.8, loss=0.3)
    home.annotate(tmp_path, test_reads=2)
    assert json.loads((tmp_path / "run.json").read_text()) == {**OLD, "test_reads": 2}
    with pytest.raises(ValidationError, match="frozen"):
        record.name = "other"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_id": 5}, "run_id: Input should be a valid string"),
        ({"status": "DONE"}, "status: Input should be 'RUNNING', 'FINISHED', 'FAILED' or 'KILLED'"),
        ({"test_reads_elsewhere": {"x": "many"}}, "test_reads_elsewhere.x: Input should be a valid integer"),
        ({"register": {"name": "n"}}, "register.score: Field required; register.loss: Field required"),
    ],
)
def test_a_damaged_record_names_the_file_and_the_field(changes, said, tmp_path):
    with pytest.raises(DataError) as caught:
        read_run_record(write(tmp_path, **changes))
    assert str(tmp_path / "run.json") in caught.value.what and said in caught.value.why and caught.value.do


def test_a_record_that_is_cut_off_or_of_something_else_is_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(OLD)[:-20])
    with pytest.raises(DataError, match="could not be read as JSON"):
        read_run_record(tmp_path)
    for foreign in ("[1, 2]", "{}"):
        (tmp_path / "run.json").write_text(foreign)
        with pytest.raises(DataError, match="not a raylab file"):
            read_run_record(tmp_path)


def test_what_a_record_does_not_have_is_not_written_into_it(tmp_path):
    write(tmp_path)
    with pytest.raises(TypeError, match="no field statsu"):
        home.annotate(tmp_path, statsu="FINISHED")
    with pytest.raises(ValidationError, match="status"):
        home.annotate(tmp_path, status="DONE")
    assert json.loads((tmp_path / "run.json").read_text()) == OLD


def test_one_damaged_record_is_reported_and_keeps_no_other_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    write(tmp_path / "runs" / "good")
    write(tmp_path / "runs" / "bad", synthetic="perhaps")
    with caplog.at_level(logging.WARNING):
        assert [record.name for _, record in home.records()] == ["old"]
        assert home.find(OLD["run_id"]) == tmp_path / "runs" / "good"
    assert "bad/run.json" in caplog.text and "synthetic: Input should be a valid boolean" in caplog.text


LINES = (
    {"attempt": 0, "start": 0, "workers": 2, "pids": [7, 8], "time": 1.5, "damaged": []},
    {"attempt": 0, "step": 1, "loss": 0.1 + 0.2, "later": "field"},
    {"attempt": 0, "regroup": 1, "workers": 1, "pids": [8], "time": 2.5},
    {"attempt": 0, "checkpoint": 1},
    {"attempt": 0, "moved": 1, "why": "a node leaves"},
)


def test_a_ledger_is_read_by_kinds_of_entry_and_written_as_it_was(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    entries = read_ledger(path)
    assert [type(entry) for entry in entries] == [Start, Step, Regroup, Checkpoint, HandOver]
    assert [json.dumps(entry.to_json()) for entry in entries] == [json.dumps(line) for line in LINES]
    assert steps(entries) == [1] and starts(entries)[0].pids == (7, 8)
    assert is_handed_over(entries) and not is_handed_over(entries[:3]) and not is_handed_over([])


@pytest.mark.parametrize(
    ("line", "said"),
    [({"attempt": 0, "step": "one", "loss": 0.1}, "step: "), ({"attempt": 0, "start": 0}, "workers: Field required")],
)
def test_a_foreign_line_of_a_ledger_is_named(line, said, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=said) as caught:
        read_ledger(path)
    assert str(path) in caught.value.what
    path.write_text('{"attempt": 0}\n')
    with pytest.raises(DataError, match="unknown kind"):
        read_ledger(path)
