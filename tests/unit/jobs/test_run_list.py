"""What `raylab runs` lists: the runs of a home, and what comes next for each."""

import json
from pathlib import Path

import pytest

from jobs import cli
from jobs.common.run_end import Ending, describe_end, record_end
from jobs.runs import Row, render_table
from raylab.errors import DataError, OwnCodeError
from raylab.files import write_json

DATA_HASH = "0123456789abcdef"
RECORD = {
    "uri": "sqlite:///x", "experiment": "raylab", "kind": "train", "task": "ards", "data": "/data/a b",
    "data_hash": DATA_HASH, "synthetic": True, "status": "FINISHED", "steps": 400,
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    return tmp_path / "runs"


def write_run(directory: Path, **facts: object) -> None:
    directory.mkdir(parents=True)
    write_json(directory / "run.json", {**RECORD, "name": directory.name, **facts})


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    assert cli.main(["runs", "--quiet", *words]) == 0
    return {run["run"]: run for run in json.loads(capsys.readouterr().out)["runs"]}


def test_a_run_has_its_score_and_what_comes_next(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "done", run_id="1" * 32)
    score = {"value": 0.8125, "low": 0.76, "high": 0.861}
    (runs / "done/scores").mkdir()
    write_json(runs / "done/scores" / f"val-{DATA_HASH[:12]}.json", {"auroc": score})
    write_run(runs / "read", test_reads=1)
    write_run(runs / "killed", status="KILLED", steps=None)
    (runs / "killed/ledger.jsonl").write_text('{"attempt": 0, "step": 7, "loss": 0.5}\n')
    write_run(runs / "running", status="RUNNING")
    write_run(runs / "sweep", kind="simulate", task="living", status="KILLED", steps=None)
    found = listed(capsys)
    assert found["done"]["run_id"] == "1" * 32
    assert found["done"]["score"] == "auroc 0.812 [0.760, 0.861]"
    assert found["done"]["next"] == "raylab evaluate ards --run done --data '/data/a b'"
    assert found["killed"]["next"] == "raylab resume killed" and found["killed"]["steps"] == 7
    assert not found["read"]["next"] and not found["running"]["next"] and not found["sweep"]["next"]
    assert found["sweep"]["steps"] is None
    assert set(listed(capsys, "--task", "ards")) == {"done", "read", "killed", "running"}
    assert cli.main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "auroc 0.812 [0.760, 0.861]" in said and "    next: raylab resume killed" in said
    assert cli.main(["runs", "--task", "covidnet"]) == 0
    assert capsys.readouterr().out == "no runs of this task yet: raylab train covidnet --data DIR\n"


def test_an_own_task_has_its_score_without_its_plugin(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = {"value": 0.8125, "low": 0.76, "high": 0.861}
    contents = {"told": {"auprc": score, "primary": ["auprc"]}, "old": {"auprc": score}, "wrong": {"primary": [7]}}
    for name, content in contents.items():
        write_run(runs / name, task="long-stay")
        (runs / name / "scores").mkdir()
        write_json(runs / name / "scores" / f"val-{DATA_HASH[:12]}.json", content)
    found = listed(capsys)
    assert found["told"]["score"] == "auprc 0.812 [0.760, 0.861]" and found["old"]["score"] == ""
    assert "damaged" in str(found["wrong"]["score"])


def test_a_run_that_failed_says_why_and_what_to_do_first(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = OwnCodeError("the code of the own.py failed (line 3: ValueError)", "61 is no age", "correct the file")
    for name, error in {"own": own, "data": DataError("row 7 is damaged"), "stopped": KeyboardInterrupt()}.items():
        write_run(runs / name, status="RUNNING")
        record_end(runs / name, describe_end(error))
    found = listed(capsys)
    assert found["own"]["error"] == own.what and found["own"]["next"] == "correct the file"
    assert found["data"]["error"] == "DataError"
    assert found["data"]["next"] == "correct the cause, then: raylab resume data"
    assert found["stopped"]["error"] == "" and found["stopped"]["next"] == "raylab resume stopped"
    assert cli.main(["runs"]) == 0
    assert f"    failed: {own.what}\n    next: correct the file\n" in capsys.readouterr().out
    record_end(runs / "own", Ending("FINISHED"))
    assert listed(capsys)["own"]["error"] == "" and "evaluate" in str(listed(capsys)["own"]["next"])


def test_json_without_a_file_is_all_that_is_printed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "first", kind="train", status="FINISHED")
    assert cli.main(["runs", "--json"]) == 0
    assert [run["run"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["first"]


def test_in_a_narrow_terminal_a_score_is_below_its_run() -> None:
    facts = {
        "verb": "train",
        "task": "ards",
        "status": "FINISHED",
        "steps": 12,
        "bytes": 10,
        "changed": 0.0,
        "next": "",
        "error": "",
        "run_id": "a" * 32,
    }
    rows = [Row(run=name, score="auroc 0.812 [0.760, 0.861]", **facts) for name in ("first", "second-of-many")]
    assert len(render_table(rows)) == 3 and max(map(len, render_table(rows))) > 80
    narrow = render_table(rows, 80)
    assert max(map(len, narrow)) <= 80 and narrow[2] == "    auroc 0.812 [0.760, 0.861]" and len(narrow) == 5
    assert render_table(rows, 200) == render_table(rows)


def test_a_damaged_run_does_not_hide_the_others(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "whole")
    (runs / "whole/scores").mkdir()
    (runs / "whole/scores" / f"val-{DATA_HASH[:12]}.json").write_text("{")
    write_run(runs / "broken")
    (runs / "broken/run.json").write_text("[]")
    write_run(runs / "torn", steps=None)
    (runs / "torn/ledger.jsonl").write_text('{"foreign": 1}\n')
    found = listed(capsys)
    assert set(found) == {"whole"} and "could not be read as JSON" in str(found["whole"]["score"])


def test_without_runs_it_says_how_to_make_one(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs"]) == 0
    assert "raylab train" in capsys.readouterr().out
