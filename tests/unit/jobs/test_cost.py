"""raylab cost: from a job's bill to runs, trials, MLflow and the comparison."""

import json
import shutil
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cluster import bills
from jobs import cli
from jobs.common import budget, costs, home
from jobs.common.costs import show_energy
from jobs.common.split_bill import PARTS
from raylab.files import write_json
from raylab.training.run_record import RunRecord
from raylab.work import append_work, read_work


@pytest.fixture(scope="module")
def own_home(ards_data, tmp_path_factory):
    """A home with the run `first`, which was trained in Slurm job 7 of 4 CPUs: bin/sacct says so."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        (path / "bin").mkdir()
        began = int(time.time()) - 10
        write_sacct(path, f"7|batch|{began}|3600|COMPLETED|1|billing=4,cpu=4,node=1")
        patch.setenv("PATH", f"{path / 'bin'}:/usr/bin:/bin")
        patch.setenv("RAYLAB_HOME", str(path))
        patch.setenv("RAYLAB_SITES", str(path / "sites.toml"))
        patch.setenv("MLFLOW_TRACKING_URI", "")
        patch.setenv("SLURM_JOB_ID", "7")
        words = ["train", "ards", "--data", str(ards_data), "--smoke", "--workers", "0", "--name", "first", "--quiet"]
        assert cli.main([*words, "--set", "loop.epochs=2"]) == 0
        yield path


def write_sacct(path: Path, *rows: str) -> None:
    table = path / "bin" / "sacct"
    table.write_text("#!/bin/sh\ncat <<END\n" + "".join(f"{row}\n" for row in rows) + "END\n")
    table.chmod(0o755)


def ask(capsys, *words):
    """The result of `raylab cost`, and what it prints."""
    capsys.readouterr()
    assert cli.main(["cost", *words]) == 0
    text = capsys.readouterr().out
    assert cli.main(["cost", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out), text


def mlflow_run(path, name):
    return MlflowClient(f"sqlite:///{path}/mlflow/mlflow.db").get_run(home.note(path / "runs" / name).run_id)


def test_a_run_knows_its_cost_when_it_ends(own_home, capsys):
    found, _ = ask(capsys)
    (record,) = read_work(own_home / "runs" / "first")
    mine = [line for line in found["lines"] if line["run"] == "first"]
    assert sum(line["parts"] for line in mine) / PARTS == pytest.approx(
        4 * (record.end - record.begin) / 3600, abs=1e-6
    )
    tags = mlflow_run(own_home, "first").data.tags
    amount = sum(line["amount"] for line in mine)
    assert tags["raylab.cost"] == f"{amount:.6g} core-hours"
    assert tags["raylab.cost_source"] == "sacct"
    assert tags["raylab.energy"] == "GPU not measured, CPU not measured"
    table = json.loads((own_home / "runs" / "first" / "cost.json").read_text())
    assert {(row[0], row[1], row[3]) for row in table["data"]} == {
        ("7", kind, "core-hours") for kind in ("start-up", "work")
    }
    client = MlflowClient(f"sqlite:///{own_home}/mlflow/mlflow.db")
    run_id = mlflow_run(own_home, "first").info.run_id
    assert "cost.json" in [item.path for item in client.list_artifacts(run_id)]
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "cost.json", "type": "table"}]


def test_the_cost_of_one_run_is_told_without_reading_the_others(own_home, caplog):
    other = own_home / "runs" / "damaged"
    other.mkdir()
    (other / "run.json").write_text("{}")
    (own_home / "runs" / "first" / "cost.json").unlink()
    try:
        costs.tell_end(own_home / "runs" / "first")
        assert (own_home / "runs" / "first" / "cost.json").is_file() and not caplog.records
        assert [run.name for run in costs.list_runs()] == ["first"] and "damaged" in caplog.text
    finally:
        shutil.rmtree(other)


def test_the_lines_sum_to_the_bill(own_home, capsys):
    found, text = ask(capsys)
    (job,) = found["jobs"]
    assert sum(line["parts"] for line in found["lines"]) == job["parts"] == 4 * PARTS
    assert {line["kind"] for line in found["lines"]} == {"start-up", "work", "idle"}
    assert text.splitlines()[-1].split() == ["bill", "of", "1", "jobs", "4.0000"]


def test_compare_has_a_column_for_it(own_home, capsys):
    assert cli.main(["compare", "--out", str(own_home / "report.html")]) == 0
    head, _, _, row = capsys.readouterr().out.splitlines()[1:5]
    assert " cost " in head and "core-hours" in row


def add_run(path, name, kind, experiment="raylab", **more):
    path.mkdir(parents=True)
    note = RunRecord(name=name, uri=f"sqlite:///{path}/none.db", experiment=experiment, kind=kind, task="ards",
                     data="", synthetic=True, status="FINISHED", **more)  # fmt: skip
    write_json(path / "run.json", note.to_json())


def test_trials_are_summed_in_their_search_and_other_experiments_on_one_line(own_home, capsys, monkeypatch):
    monkeypatch.setattr("jobs.common.run_tracking.forward_now", lambda directory: None)  # these are no runs of MLflow
    (first,) = read_work(own_home / "runs" / "first")
    began = first.end + 100
    record = {"worker": "trial", "job": "7", "node": first.node, "cpus": 1.0, "share": 0.5, "training": began}
    add_run(own_home / "runs" / "search", "search", "tune", "other")
    for number, seconds in enumerate((90, 180)):
        trial = own_home / "runs" / "search" / "trials" / f"{number:03d}"
        add_run(trial, f"search-{number:03d}", "trial", "other", number=number)
        append_work(trial, {**record, "id": str(number), "begin": began, "end": began + seconds})
    found, text = ask(capsys)
    assert sum(line["parts"] for line in found["lines"]) == 4 * PARTS
    assert "search (2 trials)" in text and "0.1500" in text, "4 per hour, half a node, 270 s together"
    tags = json.loads((own_home / "runs" / "search" / "outbox" / "outbox.jsonl").read_text().splitlines()[0])
    assert tags["values"]["raylab.cost"] == "0.15 core-hours"
    found, text = ask(capsys, "--experiment", "raylab")
    assert "search" not in text and "runs of other experiments" in text
    assert sum(line["parts"] for line in found["lines"]) == 4 * PARTS


def test_without_accounting_the_heads_records_count_and_are_marked(own_home, capsys):
    write_sacct(own_home)
    (own_home / "bin" / "sacct").write_text('#!/bin/sh\necho "Slurm accounting storage is disabled" >&2\nexit 1\n')
    began = read_work(own_home / "runs" / "first")[0].begin - 10
    cluster = own_home / "clusters" / "ray"
    cluster.mkdir(parents=True)
    line = {
        "job": "7",
        "restarts": 0,
        "site": "gone",
        "kind": "worker",
        "partition": "batch",
        "nodes": 1,
        "tres": "billing=2,cpu=2,node=1",
        "seconds": 1800,
        "start": began,
        "state": "COMPLETED",
        "time": began + 1800,
    }
    (cluster / bills.FILE).write_text(json.dumps(line) + "\n")  # fmt: skip
    found, text = ask(capsys)
    assert {job["source"] for job in found["jobs"]} == {"the head's own records"}
    assert sum(line["parts"] for line in found["lines"]) == PARTS
    assert "first *" in text and "* from the head's own records" in text


def test_energy_of_a_search_is_known_only_if_that_of_all_its_trials_is():
    assert show_energy([{"gpu": 1.0, "cpu": 0.5}, {"gpu": 0.25}]) == "GPU 1.25 kWh, CPU not measured"
    assert show_energy([]) == "GPU not measured, CPU not measured"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m jobs.train ards --data d", ["train", "ards", "--data", "d"]),
        (".venv/bin/raylab tune ards", ["tune", "ards"]),
        ("python -m jobs.cli train ards", ["train", "ards"]),
        ("python -m jobs.resume first", None),
        ("raylab evaluate ards", None),
        ("hostname", None),
    ],
)
def test_the_verb_of_a_submitted_command(command, words):
    assert budget.find_verb(command.split()) == words
