"""The command line in this process: exit codes, what is said, and one small run from training to prediction."""

import argparse
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import stat
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pytest
from mlflow import MlflowClient
from pydantic import create_model

from jobs import cli, tune
from jobs.common import home, run_tracking
from raylab import __version__
from raylab.data.prepared import read_meta
from raylab.tasks import TASKS, find_task
from raylab.tasks.ards import ArdsRecipe
from raylab.tasks.recipes import read_recipe, shipped_recipe
from raylab.training.run import write_model
from raylab.training.run_record import RunRecord
from tracking import runs
from tracking.outbox import Outbox

Said = tuple[int, str, str]


def raylab(*words: Any) -> Said:
    """(exit code, standard output, standard error) of `raylab WORDS`, as if in a process of its own."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", os.environ.get("MLFLOW_TRACKING_URI", ""))  # put back at the end
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def rows(data: Path, split: str) -> int:
    """Rows of a split of a prepared directory, by its own meta file."""
    count: int = json.loads((data / "meta.json").read_text())["counts"][split]["n"]
    return count


def refused(*words: Any) -> str:
    """What is said when `raylab WORDS` is refused as wrong usage or data: no traceback, and the next command."""
    code, _, err = raylab(*words)
    assert code == 2, err
    assert "Traceback" not in err
    return err


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("home")
        patch.setenv("RAYLAB_HOME", str(path))
        yield path


@pytest.fixture(scope="module")
def trained(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(the result, what was said) of one small run, named `first`."""
    result = tmp_path_factory.mktemp("json") / "deep" / "train.json"
    code, out, err = raylab(
        "train", "ards", "--data", ards_data, "--smoke", "--workers", 0, "--name", "first", "--json", result
    )
    assert code == 0, err
    return json.loads(result.read_text()), out


def outline(path: Path) -> list[str]:
    """The runs that are there."""
    return sorted(p.name for p in (path / "runs").glob("*") if (p / "run.json").exists())


# help and usage


def test_an_option_of_several_kinds_of_data_has_the_default_of_each():
    code, out, _ = raylab("prepare", "--help")
    said = " ".join(out.split())
    assert code == 0
    assert "hours after the landmark that no onset may fall into (default: 0); brain sections: sections left" in said
    assert "--seed SEED of the splits and of synthetic data (default: 0)" in said
    assert "intensive care, chest X-rays: synthetic: how many (default: 400); remote-sensing scenes:" in said


def test_a_gap_may_be_part_of_an_hour_and_is_a_whole_number_of_sections(tmp_path):
    words = ("--source", "synthetic", "--patients", 30, "--out", tmp_path / "out", "--gap", 0.5)
    code, _, err = raylab("prepare", "ards", *words)
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["gap_h"] == 0.5
    assert "gap" in refused("prepare", "sections", *words[:-4], "--out", tmp_path / "more", *words[-2:])


def test_without_a_verb_the_verbs_are_shown():
    for words, code in (([], 2), (["--help"], 0), (["-h"], 0)):
        got, out, _ = raylab(*words)
        assert got == code and all(f"  {verb}" in out for verb in cli.VERBS)
    assert raylab("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_an_example_that_parses(verb):
    code, out, _ = raylab(verb, "--help")
    module = importlib.import_module(f"jobs.{verb}")
    assert code == 0 and module.EXAMPLE in out and "--json" in out and "--quiet" in out
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    module.arguments(parser)
    parser.add_argument("--json")
    commands = [text for text in re.split(r"\s{2,}", module.EXAMPLE) if text.startswith("raylab ")]
    for command in commands:
        parser.parse_args(shlex.split(command.partition(" > ")[0])[2:])


def test_an_unknown_verb_prints_the_nearest():
    assert "unknown verb 'trian'" in refused("trian") and "train" in refused("trian")


def test_options_are_not_abbreviated():
    assert "--dat" in refused("train", "ards", "--dat", "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ads"], "use one of: ards"),
        (["ards-smoke"], "unknown task"),
        (["ards", "--workers", "3:1"], "the minimum exceeds the maximum"),
        (["ards", "--workers", "two"], "write N or MIN:MAX"),
        (["ards", "--set", "optim.lrr=1"], "optim.lr"),
        (["ards", "--set", "optim.lr"], "is not PATH=VALUE"),
        (["ards", "--set", "optim.lr=fast"], "optim.lr"),
        (["ards", "--set", "loop.shards=9", "loop.global_batch_size=4"], "must not exceed"),
        (["ards", "--set", "model.name=gruu"], "gru"),
        (["ards", "--set", "data.cohort=alll"], "all"),
        (["ards", "--set", "optim.class_weight=(1,2,3)"], "3 values for 2 classes"),
        (["covidnet"], "was prepared for 'ards', not for 'covidnet'"),
        (["ards", "--name", "a/b"], "not a valid run name"),
        (["ards", "--name", ".hidden"], "not a valid run name"),
        (["ards", "--from", "nobody"], "nobody"),
        (["ards", "--seed", "1", "--set", "seed=2"], "--seed 1 contradicts --set seed=2"),
        (["ards", "--seed", "-1"], "seed: Input should be greater than or equal to 0"),
    ],
)
def test_what_train_refuses_leaves_no_run(words, said, ards_data, own_home):
    before = outline(own_home)
    assert said in refused("train", *words, "--data", ards_data)
    assert outline(own_home) == before


def test_what_cannot_be_resumed_is_said():
    assert "nobody" in refused("resume", "nobody")


@pytest.mark.fault(27)
def test_data_that_is_missing_or_changed(ards_data, tmp_path):
    assert f"no data directory at {tmp_path / 'none'}" in refused("train", "ards", "--data", tmp_path / "none")
    assert "no meta.json" in refused("train", "ards", "--data", tmp_path)
    copy = shutil.copytree(ards_data, tmp_path / "copy")
    with (copy / "samples.parquet").open("ab") as file:
        file.write(b"\0")
    said = refused("train", "ards", "--data", copy)
    assert "has changed since it was prepared" in said and "raylab prepare ards" in said


def test_a_tracking_server_that_does_not_answer_is_said_before_anything_is_trained(ards_data, monkeypatch, own_home):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    before = outline(own_home)
    assert "127.0.0.1:1" in refused("train", "ards", "--data", ards_data, "--smoke", "--workers", 0)
    assert outline(own_home) == before


def test_prepare(tmp_path):
    words = ["prepare", "ards", "--source", "synthetic", "--patients", 120, "--out", tmp_path / "ards"]
    code, out, _ = raylab(*words, "--json", tmp_path / "note.json")
    assert code == 0 and "SYNTHETIC" in out and "next: raylab train ards" in out
    note = json.loads((tmp_path / "note.json").read_text())
    assert note["synthetic"] is True and note["data_hash"] and Path(note["out"]).is_dir()
    assert "add --replace" in refused(*words)
    code, out, _ = raylab(*words, "--replace", "--quiet")
    assert code == 0 and json.loads(out)["data_hash"] == note["data_hash"]
    other = ["prepare", "covidnet", "--source", "synthetic", "--size", 32, "--out", tmp_path / "ards", "--replace"]
    assert "prepared for 'ards', not for 'covidnet'" in refused(*other)
    assert "--source" in refused("prepare", "ards", "--out", tmp_path / "x")
    assert "synthetic" in refused(
        "prepare", "ards", "--source", "synthetik", "--path", tmp_path, "--out", tmp_path / "x"
    )
    assert "not empty" in refused("prepare", "ards", "--source", "synthetic", "--out", tmp_path)


# errors and signals


def test_exit_codes_of_the_ways_to_end(monkeypatch):
    sync = importlib.import_module("jobs.sync")
    for end, code, said in (
        (lambda args: {"exit_code": 1}, 1, ""),
        (lambda args: (_ for _ in ()).throw(KeyboardInterrupt), 130, "interrupted"),
        (lambda args: os.kill(os.getpid(), signal.SIGTERM) or {}, 130, "interrupted"),
    ):
        monkeypatch.setattr(sync, "main", end)
        got, _, err = raylab("sync")
        assert got == code and said in err


@pytest.mark.parametrize(
    ("verb", "said"),
    [("tune", "; to continue it: raylab resume NAME"), ("benchmark", "; the same command continues it"), ("ui", "")],
)
def test_an_interruption_says_what_continues_the_work(verb, said, monkeypatch, capsys):
    monkeypatch.setattr(cli, "ignore_interrupts", lambda: None)
    assert cli.explain_end(KeyboardInterrupt(), verb) == 130
    assert capsys.readouterr().err == f"raylab: interrupted{said}\n"


# one run


def test_train_leaves_a_run_its_json_and_its_mlflow_run(trained, own_home, ards_data):
    result, out = trained
    assert result["name"] == "first" and result["task"] == "ards" and result["synthetic"] is True
    assert (result["steps"], result["planned_steps"], result["stopped"]) == (6, 6, "planned")
    assert (result["attempts"], result["steps_repeated"], result["gaps"]) == (1, 0, 0)
    assert result["split"] == "val" and result["n"] == rows(ards_data, "val")
    assert {"value", "low", "high"} <= result["auroc"].keys()
    for said in ("SYNTHETIC", "finished first", "raylab evaluate ards --run first", "auroc"):
        assert said in out
    directory = own_home / "runs" / "first"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    described = home.note(directory)
    run = runs.client(described.uri).get_run(described.run_id)
    assert run.info.status == "FINISHED" == described.status
    assert run.data.params["loop.global_batch_size"] == "64" and run.data.params["optim.lr"] == str(
        shipped_recipe("ards", smoke=True).optim.lr
    )
    assert run.data.metrics["best/val/auroc"] == pytest.approx(result["auroc"]["value"])
    history = runs.client(described.uri).get_metric_history(described.run_id, "train/loss")
    assert sorted(point.step for point in history) == [1, 2, 3, 4, 5, 6]
    assert described.data == str(ards_data)


def test_a_name_is_given_once(trained, ards_data):
    said = refused("train", "ards", "--data", ards_data, "--name", "first")
    assert "already a run named 'first'" in said and "raylab resume first" in said


def test_evaluate_and_the_count_of_test_reads(trained, ards_data, tmp_path):
    words, n = ["evaluate", "ards", "--run", "first", "--data", ards_data], rows(ards_data, "test")
    code, out, err = raylab(*words, "--json", tmp_path / "scores.json")
    assert code == 0, err
    scored = json.loads((tmp_path / "scores.json").read_text())
    assert (scored["split"], scored["n"], scored["leakage"]["shared"], scored["test_reads"]) == ("test", n, 0, 1)
    assert scored["evaluation_run_id"] == scored["run_id"] == trained[0]["run_id"]
    assert scored["prevalence"]["low"] <= scored["prevalence"]["value"] <= scored["prevalence"]["high"]
    assert scored["auroc"]["low"] is None and scored["auroc"]["value"] is not None
    assert scored["auroc"]["why"] == "too few: 9 patients with the outcome; an interval needs 10 of each"
    assert "(too few)" in out and "\n  too few: 9 patients with the outcome; an interval needs 10 of each\n" in out
    kept = runs.client(home.note(home.find("first")).uri).get_run(scored["run_id"]).data
    assert "test/auroc" in kept.metrics and not {"test/auroc_low", "test/auroc_high"} & kept.metrics.keys()
    assert "test/prevalence_low" in kept.metrics
    assert "auroc" in json.loads(kept.tags["raylab.no_interval.test"])[scored["auroc"]["why"]]
    assert set(scored["cohorts"]) == {"all", "ventilated_pf", "ventilated", "gas", "matched"}
    assert f"test split: {n} rows" in out and "has now been scored on these test rows" not in out
    code, out, _ = raylab("evaluate", "ards", "--run", trained[0]["run_id"], "--data", ards_data)  # by its MLflow id
    assert code == 0 and "has now been scored on these test rows 2 times" in out


def test_evaluate_refuses_what_the_model_has_learnt_from(trained, ards_data):
    said = refused("evaluate", "ards", "--run", "first", "--data", ards_data, "--split", "all")
    assert "include training rows" in said and "--split test" in said


def test_scores_on_other_data_are_one_run_however_often_they_are_computed(trained, tmp_path, own_home):
    words = ("prepare", "ards", "--source", "synthetic", "--patients", 120, "--seed", 5, "--out", tmp_path / "other")
    assert raylab(*words, "--quiet")[0] == 0
    ids = set()
    for times in (1, 2):
        words = ["evaluate", "ards", "--run", "first", "--data", tmp_path / "other", "--split", "all"]
        code, out, err = raylab(*words, "--json", tmp_path / "scores.json")
        assert code == 0, err
        scored = json.loads((tmp_path / "scores.json").read_text())
        assert scored["evaluation_run_id"] != scored["run_id"] and scored["test_reads"] == times
        ids.add(scored["evaluation_run_id"])
        assert ("has now been scored on these test rows 2 times" in out) == (times == 2)
        code, out, err = raylab("compare", "--out", tmp_path / "report.html", "--json", tmp_path / "runs.json")
        assert code == 0, err
        rows = [r for r in json.loads((tmp_path / "runs.json").read_text())["runs"] if r["kind"] == "evaluate"]
        (row,) = [r for r in rows if r["data_hash"] == scored["data_hash"]]
        assert (row["run_id"], row["split"], row["cohort"]) == (scored["evaluation_run_id"], "all", scored["cohort"])
        assert (row["n"], row["test_reads"]) == (scored["n"], times)
        assert row["scores"]["auroc"] == pytest.approx({k: scored["auroc"][k] for k in ("value", "low", "high")})
        (line,) = [line for line in out.splitlines() if line.startswith("first-on-other")]
        shown = f"{scored['auroc']['value']:.3f}"
        assert shown in line and ("all (2 reads)" in line) == (times == 2)
        page = (tmp_path / "report.html").read_text().split('<h2 id="runs">')[0]
        assert len(re.findall(r'<a href="#\w+">first-on-other', page)) == 1
    assert len(ids) == 1 and len([*own_home.glob("runs/first-on-other*")]) == 1
    (found,) = [record for path, record in home.records() if record.run_id in ids]
    assert found.status == "FINISHED"
    mlflow = MlflowClient(found.uri)
    experiment = mlflow.get_experiment_by_name(found.experiment).experiment_id
    tracked = [run.info for run in mlflow.search_runs([experiment]) if run.info.run_name.startswith("first-on-other")]
    assert [(info.run_id, info.status) for info in tracked] == [(found.run_id, "FINISHED")]
    assert home.note(own_home / "runs" / "first").test_reads <= 2


def test_a_search_without_bash_is_refused_before_there_is_a_run(own_home, ards_data, monkeypatch, tmp_path):
    """Ray would start its workers by bash again and again, and the search would wait for ever."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    before = outline(own_home)
    words = ("tune", "ards", "--data", ards_data, "--trials", 1, "--space", "optim.lr=loguniform(1e-4,1e-2)")
    assert "there is no bash on PATH" in refused(*words)
    assert outline(own_home) == before


def test_scores_of_a_copied_directory_do_not_go_into_the_run_of_the_original(trained, own_home, ards_data, tmp_path):
    first, copy = own_home / "runs" / "first", own_home / "runs" / "copy"
    shutil.copytree(first, copy)
    noted = home.note(first)

    def metrics() -> dict[str, float]:
        return dict(runs.client(noted.uri).get_run(noted.run_id).data.metrics)

    before = metrics()
    for words in (("evaluate", "ards", "--run", "copy", "--data", ards_data, "--split", "val"), ("resume", "copy")):
        assert "'copy' is a copy of the run 'first'" in refused(*words)
    assert metrics() == before
    assert home.find(noted.run_id) == first
    moved = tmp_path / "runs" / "moved"  # where there is no original it is the run itself
    shutil.move(copy, moved)
    assert home.find(str(moved)) == moved


@pytest.fixture
def copied(own_home: Path, trained: Any) -> Iterator[Any]:
    """Makes runs that are the run `first` with an MLflow run of their own, other notes, and another task in their
    recipe."""
    made = []

    def copy(name: str, task_name: str, **notes: Any) -> str:
        first, directory = own_home / "runs" / "first", own_home / "runs" / name
        made.append(shutil.copytree(first, directory, ignore=shutil.ignore_patterns("outbox")))
        noted = home.note(first)
        tags = {**noted.tags, "raylab.name": name, runs.KEY: name}
        run_id = runs.start_run(noted.uri, noted.experiment, name, None, tags)
        Outbox(directory / "outbox").bind(noted.uri, run_id)
        home.annotate(directory, name=name, run_id=run_id, tags=tags, task=task_name, **notes)
        for file in (directory / "recipe.json", directory / "model" / "model.json"):
            found = json.loads(file.read_text())
            found.get("recipe", found)["task"] = task_name
            file.write_text(json.dumps(found))
        return name

    yield copy
    for directory in made:
        shutil.rmtree(directory)


def test_a_new_task_has_the_leakage_check_without_a_line(copied, ards_data, tmp_path, monkeypatch):
    data = shutil.copytree(ards_data, tmp_path / "new")
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"task": "new"}))
    load = TASKS["ards"].load
    kind = create_model("NewRecipe", __base__=ArdsRecipe, task=(Literal["new"], ...))
    full = kind.model_validate({**TASKS["ards"].full.model_dump(), "task": "new"})
    new = replace(TASKS["ards"], name="new", full=full, load=lambda data, *rest: load(ards_data, *rest))
    monkeypatch.setitem(TASKS, "new", new)
    name = copied("new-run", "new", data=str(data))
    code, out, err = raylab("evaluate", "new", "--run", name, "--data", data, "--split", "val")
    assert code == 0, err
    assert "leakage: none, no patient here was in train or val" in out
    home.annotate(home.find(name), data_hash="0" * 64)  # as if its training data had been prepared anew since
    code, out, err = raylab("evaluate", "new", "--run", name, "--data", data, "--split", "all")
    assert code == 0 and "leakage: not checked, the data at" in out and "no longer what the model was trained on" in out


def test_patients_that_the_starting_weights_know_are_counted_too(copied, ards_data, tmp_path):
    words = ("prepare", "ards", "--source", "synthetic", "--patients", 100, "--seed", 5, "--out", tmp_path / "other")
    assert raylab(*words)[0] == 0
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    name = copied("child", "ards", data=str(tmp_path / "other"), data_hash=meta["data_hash"], parent="first")
    words = ("evaluate", "ards", "--run", name, "--data", ards_data, "--split", "all")
    code, out, err = raylab(*words, "--json", tmp_path / "scores.json")
    assert code == 0, err
    leaked = json.loads((tmp_path / "scores.json").read_text())["leakage"]
    assert leaked["shared"] == 0 and leaked["why"] == (
        "another source (synthetic seed 5; synthetic seed 0): other patients, as far as identifiers can tell"
    )
    assert leaked["parents"]["first"]["shared"] == rows(ards_data, "train") + rows(ards_data, "val")
    assert "leakage from first, which provided the initial weights: WARNING" in out
    home.annotate(home.find(name), parent="gone")
    code, out, _ = raylab(*words)
    assert (
        code == 0 and "leakage from gone, which provided the initial weights: not checked, the run is no longer" in out
    )


def test_a_run_of_another_task_is_refused(trained, ards_data, covidnet_data):
    said = refused("evaluate", "covidnet", "--run", "first", "--data", covidnet_data)
    assert "is of task 'ards', not 'covidnet'" in said and "next: give the task ards" in said
    assert "is of task 'ards', not 'covidnet'" in refused(
        "transfer", "covidnet", "--from", "first", "--data", covidnet_data
    )
    recipe = shipped_recipe("covidnet", smoke=True)
    job = find_task("covidnet")
    spec = job.load(covidnet_data, "train", recipe.data, None).spec
    directory = home.new_run("lungs", "covidnet")
    write_model(directory / "model", job.model(recipe, spec).state_dict(), recipe, spec)
    facts = {"kind": "train", "task": "covidnet", "data": str(covidnet_data), "synthetic": True}
    home.describe(directory, RunRecord(name="lungs", run_id="0", uri="none", experiment="none", **facts))
    assert "was prepared for 'ards'" in refused("evaluate", "covidnet", "--run", "lungs", "--data", ards_data)
    assert "cxr-frontal-u8" in refused("predict", "covidnet", "--run", "lungs", "--data", ards_data, "--out", "p") or (
        "was prepared for 'ards'" in refused("predict", "covidnet", "--run", "lungs", "--data", ards_data, "--out", "p")
    )
    shutil.rmtree(directory)


def test_an_unknown_run_prints_the_nearest(trained, ards_data):
    said = refused("evaluate", "ards", "--run", "frist", "--data", ards_data)
    assert "unknown run 'frist'" in said and "first" in said


def test_predict(trained, ards_data, tmp_path):
    out = tmp_path / "deep" / "p.parquet"
    code, _, err = raylab("predict", "ards", "--run", "first", "--data", ards_data, "--split", "val", "--out", out)
    assert code == 0, err
    frame = pl.read_parquet(out)
    assert frame.columns == ["id", "source", "label", "p_onset"] and frame.height == rows(ards_data, "val")
    assert frame["p_onset"].is_between(0, 1).all()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    words = ("predict", "ards", "--run", "first", "--data", ards_data, "--split", "val", "--out")
    assert "is a directory" in refused(*words, tmp_path)
    assert "does not end in .parquet" in refused(*words, tmp_path / "p.csv")
    assert "a directory that raylab manages" in refused(*words, ards_data / "samples.parquet")
    pl.DataFrame({"id": [1], "mine": [2]}).write_parquet(tmp_path / "own.parquet")
    assert "is not a predictions file" in refused(*words, tmp_path / "own.parquet")
    assert raylab(*words, out)[0] == 0  # an earlier file of the kind is replaced


def test_a_result_or_report_replaces_no_other_file(tmp_path, ards_data, trained):
    (tmp_path / "notes.txt").write_text("mine")
    for words in (("models", "--json"), ("compare", "--out")):
        for path, said in ((tmp_path / "notes.txt", "exists and is not a"), (tmp_path, "is a directory"),
                           (ards_data / "meta.json", "a directory that raylab manages")):  # fmt: skip
            assert said in refused(*words, path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_a_finished_run_changes_nothing(trained, tmp_path):
    code, out, err = raylab("resume", "first", "--json", tmp_path / "again.json")
    assert code == 0, err
    assert "has already finished training" in out
    again = json.loads((tmp_path / "again.json").read_text())
    for fact in ("weights_sha256", "run_id", "steps", "auroc", "val_loss", "gaps", "steps_repeated"):
        assert again[fact] == trained[0][fact], fact


def test_a_run_s_scores_have_one_point_a_step_and_its_model_is_logged_once(trained, own_home, ards_data, tmp_path):
    """Also after a resume of the finished run, an evaluation of val and a sync that believes the model is missing."""
    described = home.note(own_home / "runs" / "first")
    client, run_id = runs.client(described.uri), described.run_id
    assert raylab("resume", "first", "--quiet")[0] == 0
    assert raylab("evaluate", "ards", "--run", "first", "--data", ards_data, "--split", "val", "--quiet")[0] == 0
    home.annotate(own_home / "runs" / "first", model_logged=False)
    assert raylab("sync", "--json", tmp_path / "sync.json")[0] == 0
    assert json.loads((tmp_path / "sync.json").read_text())["models"] == 1
    best = trained[0]["best"]
    for name in client.get_run(run_id).data.metrics:
        if not name.startswith(("system/", "test/")):
            steps = [point.step for point in client.get_metric_history(run_id, name)]
            assert len(set(steps)) == len(steps), name
            if name.startswith("best/val/") and name.endswith(("_low", "_high", "/n")):
                assert steps == [best["step"]], name
    last = max(client.get_metric_history(run_id, "val/auroc"), key=lambda point: point.step)
    assert (last.step, last.value) == (trained[0]["steps"], last_epoch(own_home / "runs" / "first")["auroc"])
    assert client.get_run(run_id).data.metrics["best/val/auroc"] == best["auroc"]
    experiment = client.get_run(run_id).info.experiment_id
    logged = [m for m in client.search_logged_models([experiment]) if m.source_run_id == run_id]
    assert len(logged) == 1 and experiment != "0" and list(client.search_logged_models(["0"])) == []


def test_a_search_registers_its_winner_once_and_best_stays_with_the_better_one(trained, own_home, ards_data):
    """Two searches as they stand when their trials have ended, the worse one later; then both again, as a resume does,
    and a sync of models that have waited for the server."""
    first, registered = own_home / "runs" / "first", []
    recipe, meta = read_recipe(first / "recipe.json"), read_meta(ards_data, "ards")
    uri, shape = home.note(first).uri, home.note(first).input_shape
    winners = []
    for name, auroc in (("better", 0.9), ("worse", 0.2)):
        search = home.new_run(name, "ards")
        with run_tracking.open_run(search, run_tracking.describe_run(search, recipe, meta, ards_data, "tune", uri)):
            winner = search / "trials" / "000"
            winner.mkdir(parents=True)
            run_tracking.write_run(winner, run_tracking.describe_trial(recipe, search, 0))
        shutil.copytree(first / "model", winner / "model")
        result = json.loads((first / "result.json").read_text())
        result["best"]["auroc"] = auroc
        (winner / "result.json").write_text(json.dumps(result))
        winners.append((winner, search))
        registered.append(tune.register(winner, search, recipe, shape))
    assert registered == ["raylab-ards-synthetic/1", "raylab-ards-synthetic/2"]
    assert [tune.register(*winner, recipe, shape) for winner in winners] == registered
    for winner, _ in winners:
        home.annotate(winner, model_logged=False)
    code, out, err = raylab("sync")
    assert code == 0 and "2 models sent" in out, err
    client = runs.client(uri)
    assert int(client.get_model_version_by_alias("raylab-ards-synthetic", "best").version) == 1
    assert len(client.search_model_versions("name = 'raylab-ards-synthetic'")) == 2
    for winner, search in winners:
        run = client.get_run(home.note(winner).run_id)
        logged = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        assert len(logged) == 1 and len(run.outputs.model_outputs) == 1
        of_search = client.get_run(home.note(search).run_id).data.tags
        assert of_search["raylab.best_run"] == run.info.run_id and of_search["raylab.registered"] in registered
        shutil.rmtree(search)


def last_epoch(directory: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((directory / "result.json").read_text())["val"]
    return scores


@pytest.mark.fault(27)
def test_resuming_with_other_data_is_refused(copied):
    said = refused("resume", copied("altered", "ards", data_hash="0" * 64))
    assert "no longer the data with which altered started" in said


def test_logging_a_model_leaves_the_tracking_address_as_it_was(trained, own_home, monkeypatch):
    """Else the next verb in this process would write to ./mlflow.db instead of its home."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    before = runs.address(own_home)
    run_tracking.log_model(own_home / "runs" / "first", home.note(own_home / "runs" / "first").input_shape)
    assert runs.address(own_home) == before


@pytest.mark.fault(28)
def test_a_run_is_worked_on_by_one_process_at_a_time(trained, own_home):
    with home.lock_run(own_home / "runs" / "first"):
        code, _, err = raylab("resume", "first")
    assert code == 1 and "another process" in err


def test_compare(trained, tmp_path):
    code, out, err = raylab("compare", "--out", tmp_path / "report.html", "--json", tmp_path / "runs.json")
    assert code == 0, err
    assert "first" in out and "first" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert "nothing" in refused("compare", "--experiment", "nothing")


def test_a_sweep_goes_on_and_is_one_run(tmp_path):
    words = ("simulate", "living", "--size", 300, "--chunk", 100, "--out", tmp_path / "sweep")
    code, out, err = raylab(*words, "--json", tmp_path / "first.json")
    assert code == 0, err
    assert "rows/s" in out
    first = json.loads((tmp_path / "first.json").read_text())
    (tmp_path / "sweep" / "rows" / "00001.parquet").unlink()
    (tmp_path / "sweep" / "meta.json").unlink()
    code, out, err = raylab(*words, "--json", tmp_path / "again.json")
    assert code == 0, err
    assert "2 of 3 chunks exist already" in out
    assert json.loads((tmp_path / "again.json").read_text()) == first
    assert "contains another sweep" in refused(*words, "--seed", 5)
    assert "peep_cmH2O" in refused("simulate", "patient", "--set", "peep=3", "--out", tmp_path / "x")


def test_a_virtual_patient_is_viewed(tmp_path):
    code, _, err = raylab(
        "simulate", "view", "--set", "shunt=0.3", "--change", "1:fio2=0.9", "--minutes", 3, "--name", "mr-x",
        "--json", tmp_path / "view.json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads((tmp_path / "view.json").read_text())
    plots = Path(told["directory"]) / "plots"
    assert {path.name for path in plots.iterdir()} == {"tornado.png", "course.png"}
    moved = {row["input"]: row for row in told["tornado"]}
    assert moved["shunt"]["pf_mmHg/down"] > moved["shunt"]["pf_mmHg/here"] > moved["shunt"]["pf_mmHg/up"]
    assert moved["peep_cmH2O"]["pf_mmHg/down"] < moved["peep_cmH2O"]["pf_mmHg/up"]
    assert "fio2 is not within" in refused("simulate", "view", "--set", "fio2=60")
    assert "no solution for this patient" in refused("simulate", "view", "--set", "cardiac_output_L_per_min=1.5")
    assert "is not MINUTE:SETTING=VALUE" in refused("simulate", "view", "--change", "fio2=0.9")


def test_a_surrogate_is_a_task_like_the_others(tmp_path):
    sweep = tmp_path / "for-a-net"
    ranges = ("shunt=uniform(.05,.3)", "fio2=uniform(.3,.9)", "rate_per_min=uniform(12,30)")
    code, _, err = raylab("simulate", "patient", "--set", *ranges, "--size", 1024, "--out", sweep)
    assert code == 0, err
    code, _, err = raylab(
        "train", "surrogate", "--data", sweep, "--smoke", "--set", "loop.epochs=12", "optim.lr=1e-2", "--name", "net",
        "--json", tmp_path / "net.json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "net.json").read_text())["r2_min"]["value"] > 0.8
    code, out, err = raylab("evaluate", "surrogate", "--run", "net", "--data", sweep, "--split", "test")
    assert code == 0, err
    assert "r2/pao2_mmHg" in out
    assert (home.find("net") / "plots" / "test-error-fio2-shunt.png").is_file()
    code, _, err = raylab("predict", "surrogate", "--run", "net", "--data", sweep, "--out", tmp_path / "p.parquet")
    assert code == 0, err
    rows = pl.read_parquet(tmp_path / "p.parquet")
    assert (rows["p_pao2_mmHg"] - rows["pao2_mmHg"]).abs().median() < 15
    code, _, err = raylab(
        "simulate", "patient", "--set", "shunt=uniform(.05,.6)", "--size", 64, "--out", tmp_path / "far"
    )
    assert code == 0, err
    far = ("--run", "net", "--data", tmp_path / "far")
    assert "exceeds the training range of the surrogate" in refused("evaluate", "surrogate", *far, "--split", "all")


def test_stays_are_fitted(tmp_path):
    words = (
        "fit",
        "--source",
        "synthetic",
        "--patients",
        25,
        "--hours",
        24,
        "--window",
        24,
        "--out",
        tmp_path / "fits",
    )
    code, out, err = raylab(*words, "--json", tmp_path / "fit.json")
    assert code == 0, err
    assert "SYNTHETIC" in out
    told = json.loads((tmp_path / "fit.json").read_text())
    rows = pl.read_parquet(tmp_path / "fits" / "fits.parquet")
    assert told["fits"] == rows.height == rows["stay_id"].n_unique() > 3
    assert told["parameters"]["shunt"]["identified"] > 0
    assert (rows["shunt/low"] <= rows["shunt"]).all()
    assert stat.S_IMODE((tmp_path / "fits" / "fits.parquet").stat().st_mode) == 0o600
    (tmp_path / "fits" / "parts" / "0000.parquet").unlink()
    assert raylab(*words, "--json", tmp_path / "again.json")[0] == 0
    assert json.loads((tmp_path / "again.json").read_text()) == told
    assert "with other options" in refused(*words, "--hours", 12)
    (tmp_path / "fits" / "fit.json").unlink()
    assert "not empty" in refused(*words)
    assert "needs the directory" in refused("fit", "--source", "meds", "--out", tmp_path / "x")


@pytest.mark.parametrize("words", [("train",), ("train", "--workers", "2"), ("tune", "--trials", "2")], ids=" ".join)
def test_a_run_on_a_gpu_that_is_not_there_is_refused_before_it_exists(words, ards_data, own_home, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("jobs.train.start_workers", lambda recipe: nullcontext())
    verb, *more = words
    said = refused(verb, "ards", "--data", ards_data, "--smoke", "--set", "scaling.gpu=true", "--name", "no-gpu", *more)
    assert "torch finds no GPU on this machine" in said and "cluster submit" in said
    assert not (own_home / "runs" / "no-gpu").exists()
