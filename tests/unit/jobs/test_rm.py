"""What `raylab rm` measures and removes, and what it refuses to."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs import cli
from jobs.common import home
from jobs.common.disk_use import Use, measure_parts, show_bytes
from raylab.files import write_json


@pytest.fixture(scope="module")
def own_home(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home with the finished run `parent`, and `child`, which starts from its weights."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("RAYLAB_HOME", str(path))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        train = ["train", "ards", "--data", str(ards_data), "--smoke", "--workers", "0", "--quiet"]
        train += ["--set", "loop.epochs=2", "loop.checkpoint_steps=1"]
        assert cli.main([*train, "--name", "parent"]) == 0
        assert cli.main([*train, "--name", "child", "--from", "parent"]) == 0
        yield path


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the result, and what was said on standard error."""
    capsys.readouterr()
    code = cli.main(["rm", *words, "--quiet"])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def lifecycle(path: Path, name: str) -> str:
    record = home.note(path / "runs" / name)
    return str(MlflowClient(f"sqlite:///{path}/mlflow/mlflow.db").get_run(record.run_id).info.lifecycle_stage)


def mark(path: Path, name: str, **facts: object) -> None:
    record = path / "runs" / name / "run.json"
    write_json(record, {**json.loads(record.read_text()), **facts})


def test_parts_add_up_to_the_whole(own_home: Path) -> None:
    directory = own_home / "runs" / "parent"
    files = [path for path in directory.rglob("*") if path.is_file()]
    use = measure_parts(directory)
    assert sum(part.files for part in use.values()) == len(files)
    assert sum(part.bytes for part in use.values()) == sum(path.stat().st_size for path in files)
    inside = [path for path in files if (directory / "checkpoints") in path.parents]
    assert use["checkpoints"] == Use(len(inside), sum(path.stat().st_size for path in inside)) and inside


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000_000, "2.5 GB")])
def test_bytes_are_shown_in_powers_of_a_thousand(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


def test_without_a_run_all_are_listed(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rm"]) == 0
    said = capsys.readouterr().out
    assert "parent" in said and "child" in said and "checkpoints" in said and "total" in said


def test_a_dry_run_removes_nothing(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(own_home.rglob("*"))
    code, result, _ = asked(capsys, "child", "--dry-run")
    assert code == 0 and result["bytes"] > 0 and not result["removed"]
    assert sorted(own_home.rglob("*")) == before


def test_checkpoints_of_a_finished_run(own_home: Path, capsys: pytest.CaptureFixture[str], ards_data: Path) -> None:
    mark(own_home, "parent", status="KILLED")
    code, _, said = asked(capsys, "parent", "--only", "checkpoints")
    assert code == 2 and "has not finished" in said and (own_home / "runs" / "parent" / "checkpoints").exists()
    mark(own_home, "parent", status="FINISHED")
    expected = measure_parts(own_home / "runs" / "parent")["checkpoints"]
    code, result, _ = asked(capsys, "parent", "--only", "checkpoints", "logs")
    assert code == 0 and (result["files"], result["bytes"]) == expected
    assert not (own_home / "runs" / "parent" / "checkpoints").exists()
    assert cli.main(["evaluate", "ards", "--run", "parent", "--data", str(ards_data), "--split", "val"]) == 0


def test_models_of_trials_but_that_of_the_winner(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = own_home / "runs" / "parent"
    for number, more in ((0, b""), (1, b"another"), (2, b"and another")):
        trial = directory / "trials" / f"{number:03d}"
        shutil.copytree(directory / "model", trial / "model")
        with (trial / "model/model.safetensors").open("ab") as file:
            file.write(more)
        shutil.copy(directory / "run.json", trial)
    mark(own_home, "parent/trials/002", model_logged=False)
    code, _, said = asked(capsys, "parent", "--only", "trials")
    assert code == 2 and "not in MLflow yet" in said
    mark(own_home, "parent/trials/002", model_logged=True)
    assert asked(capsys, "parent", "--only", "trials")[0] == 0
    assert [path.parent.name for path in sorted(directory.glob("trials/*/model"))] == ["000"]
    assert len(list(directory.glob("trials/*/run.json"))) == 3 and (directory / "model").exists()
    shutil.rmtree(directory / "trials")


def test_records_that_are_not_needed_are_not_read(
    own_home: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trial, other = own_home / "runs" / "parent" / "trials" / "000", own_home / "runs" / "damaged"
    for directory in (trial, other):
        directory.mkdir(parents=True)
        (directory / "run.json").write_text("{}")
    try:
        assert asked(capsys, "parent", "--only", "checkpoints", "--dry-run")[0] == 0
        assert not caplog.records
        assert asked(capsys, "--older-than", "0", "--dry-run")[0] == 0
        assert caplog.text.count("skipped") == 1, "once for all candidates"
    finally:
        shutil.rmtree(trial.parent), shutil.rmtree(other)


def test_runs_are_chosen_by_their_age(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def age(name: str, days: float) -> None:
        os.utime(own_home / "runs" / name / "run.json", (time.time() - days * 86400,) * 2)

    def chosen(*words: str) -> list[str]:
        code, result, _ = asked(capsys, "--older-than", "30", "--dry-run", *words)
        assert code == 0
        return [run["run"] for run in result["runs"]]

    mark(own_home, "child", status="KILLED")
    age("parent", 31), age("child", 29)
    assert chosen() == []  # the child still needs it
    assert chosen("--only", "checkpoints") == ["parent"]
    age("child", 31)
    assert chosen() == ["child", "parent"]
    assert chosen("--only", "checkpoints") == ["parent"]
    mark(own_home, "child", status="RUNNING")
    age("child", 31)
    assert chosen() == []
    mark(own_home, "child", status="FINISHED")
    for wrong in (["--older-than", "-1"], ["--older-than", "nan"], ["--older-than", "soon"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["rm", *wrong])
    assert asked(capsys, "parent", "--older-than", "1")[0] == 2


def test_what_others_need_stays(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark(own_home, "child", status="KILLED")
    code, _, said = asked(capsys, "parent")
    assert code == 2 and "'child' starts from the weights of 'parent'" in said
    mark(own_home, "child", status="FINISHED", registered="raylab-ards/1")
    code, _, said = asked(capsys, "child")
    assert code == 2 and "registered as raylab-ards/1" in said
    mark(own_home, "child", registered=None)
    with home.lock_run(own_home / "runs" / "child"):
        code, _, said = asked(capsys, "child")
    assert code == 1 and "another process is using run 'child'" in said
    assert {"parent", "child"} <= {path.name for path in (own_home / "runs").iterdir()}


def test_a_removed_run_is_gone_here_and_deleted_in_mlflow(
    own_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lifecycle(own_home, "child") == "active"
    run_id = home.note(own_home / "runs" / "child").run_id
    with monkeypatch.context() as patch:
        patch.setattr(home, "remove", lambda directory: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["rm", "child"]) == 130
    assert lifecycle(own_home, "child") == "deleted"
    for name in ("child.json", "child.log", "other.json"):
        (own_home / "submitted").mkdir(exist_ok=True)
        (own_home / "submitted" / name).write_text("{}")
    code, result, _ = asked(capsys, "child", "parent")
    assert code == 0 and result["removed"]
    assert not list(home.records()) and not (own_home / "runs" / "child").exists()
    assert [path.name for path in (own_home / "submitted").iterdir()] == ["other.json"]
    client = MlflowClient(f"sqlite:///{own_home}/mlflow/mlflow.db")
    assert client.get_run(run_id).info.lifecycle_stage == "deleted"
    assert asked(capsys, "child")[0] == 2
