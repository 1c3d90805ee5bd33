"""From a figure, a report or a name to the same weights, or to what is missing or different; and `raylab verify`."""

import ast
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, rerun
from jobs.common import home, provenance
from raylab.errors import DataError, UsageError
from raylab.tasks.recipes import shipped_recipe
from tracking.provenance import Provenance, read_provenance, save_png

SHORT = ("--smoke", "--quiet", "--set", "loop.epochs=1")


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home with the run `first`."""
    own = tmp_path_factory.mktemp("rerun") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(own))
        assert raylab("train", "ards", "--data", ards_data, "--name", "first", *SHORT) == 0
        yield own / "runs" / "first"


def test_every_figure_of_a_run_has_its_provenance(trained):
    origin = provenance.describe(trained)
    record = home.note(trained)
    assert (origin.run_id, origin.weights_sha256) == (record.run_id, record.weights_sha256)
    assert origin.recipe == json.loads((trained / "recipe.json").read_text())
    assert all((origin.recipe_hash, origin.data_hash, origin.split_hash, origin.code_revision, origin.lock_hash))
    assert origin.cpus and origin.ledger_sha256
    figures = sorted((trained / "plots").glob("*.png"))
    assert figures
    for figure in figures:
        assert read_provenance(figure) == (origin,)


def test_a_figure_alone_leads_to_the_same_weights_in_another_home(trained, ards_data, tmp_path, monkeypatch):
    figure = shutil.copy(next((trained / "plots").glob("*.png")), tmp_path / "figure.png")
    weights = home.note(trained).weights_sha256
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "other"))
    assert raylab("rerun", figure, "--name", "again", "--quiet") == 2  # it does not know the data
    assert not (tmp_path / "other" / "runs" / "again").exists()
    assert raylab("rerun", figure, "--data", ards_data, "--name", "again", "--json", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["same"] and out["weights_sha256"] == weights == home.note(tmp_path / "other/runs/again").weights_sha256


def test_a_repetition_that_was_interrupted_is_continued_by_the_same_command(trained, capsys, monkeypatch):
    def interrupt(*work: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("jobs.common.training.finish", interrupt)
        assert raylab("rerun", trained, "--name", "twice") == 130
    capsys.readouterr()
    assert raylab("rerun", trained, "--name", "twice") == 0
    assert "which was begun before" in capsys.readouterr().out
    assert raylab("rerun", trained, "--name", trained.name) == 2, "a run is no repetition of itself"


def test_other_weights_are_exit_code_1_with_what_differs(trained, tmp_path, capsys):
    origin = provenance.describe(trained)
    changed = origin.model_copy(update={"recipe": {**origin.recipe, "seed": 5}, "torch_version": "1.0"})
    figure(tmp_path / "figure.png", changed)
    assert raylab("rerun", tmp_path / "figure.png") == 1
    said = capsys.readouterr().out
    assert "NOT the same" in said and "torch: 1.0, here" in said


def figure(path: Path, *of: Provenance) -> Path:
    from matplotlib.figure import Figure

    save_png(Figure((1, 1)), path, of)
    return path


def test_data_that_is_not_the_runs_is_named(trained, ards_data, tmp_path, mortality_data):
    goal = provenance.describe(trained).model_copy(update={"data_hash": "0" * 64})
    with pytest.raises(DataError, match="data of first is missing"):
        rerun.find_data(goal, None)
    with pytest.raises(DataError) as error:
        rerun.find_data(goal, ards_data)
    assert "has other data" in error.value.why


def test_a_parent_that_is_gone_is_named(trained):
    goal = provenance.describe(trained)
    child = goal.model_copy(update={"name": "child", "parent": Provenance(name="lost", run_id="x")})
    with pytest.raises(DataError, match="the run lost, from whose weights child starts, is missing"):
        rerun.find_parent(child, None, True)
    assert rerun.find_parent(child.model_copy(update={"parent": goal}), None, True) == (trained, [])


def test_code_that_this_repository_does_not_have_is_named(trained):
    goal = provenance.describe(trained).model_copy(update={"code_revision": "0" * 40})
    with pytest.raises(DataError, match="commit 000000000000, is not in the repository"), rerun.checked_out(goal):
        pass


def test_another_revision_is_checked_out_and_removed_again(trained, monkeypatch, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    git = ["git", "-C", str(clone), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("then", "now"):
        (clone / "code.py").write_text(text)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)
    then = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(rerun, "CODE", clone)
    goal = provenance.describe(trained).model_copy(update={"code_revision": then})
    with rerun.checked_out(goal) as (code, differences):
        assert (code / "code.py").read_text() == "then" and differences == []
    assert not code.exists()
    listed = subprocess.run([*git, "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1
    dirty = goal.model_copy(update={"code_revision": then + "-dirty"})
    with rerun.checked_out(dirty) as (_, differences):
        assert "uncommitted changes" in differences[0]


def test_code_of_another_directory_trains_in_a_process_of_its_own(monkeypatch, tmp_path):
    """With a stand-in for the earlier code, which records what it is asked."""
    for package in ("jobs", "raylab", "raylab/tasks"):
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "__init__.py").touch()
    note = tmp_path / "note.json"
    (tmp_path / "code/raylab/errors.py").write_text("class RaylabError(Exception): pass")
    (tmp_path / "code/raylab/tasks/recipes.py").write_text("def read_recipe(path): return path.read_text()")
    for verb in ("train", "resume"):
        stand_in = (
            f"import pathlib\ndef {verb}(*what, **how): pathlib.Path({str(note)!r}).write_text(repr(how or what))"
        )
        (tmp_path / f"code/jobs/{verb}.py").write_text(stand_in)
    recipe = shipped_recipe("ards", smoke=True)
    rerun.train_elsewhere(tmp_path / "code", recipe, tmp_path, "again", None, begun=False)
    assert ast.literal_eval(note.read_text()) == {"workers": 0, "name": "again", "parent": None}
    rerun.train_elsewhere(tmp_path / "code", recipe, tmp_path, "again", None, begun=True)
    assert ast.literal_eval(note.read_text()) == ("again",)


def test_what_does_not_train_is_refused(trained, tmp_path):
    sweep = figure(tmp_path / "sweep.png", Provenance(name="sweep", kind="simulate"))
    with pytest.raises(UsageError, match="trains no network"):
        rerun.find_goal(sweep, None)
    both = figure(tmp_path / "both.png", Provenance(name="a", kind="train"), Provenance(name="b", kind="train"))
    with pytest.raises(UsageError, match="shows 2 runs"):
        rerun.find_goal(both, None)
    assert rerun.find_goal(both, "b").name == "b"
    with pytest.raises(UsageError):
        rerun.find_goal(both, "c")
    scored = Provenance(name="e", kind="evaluate", parent=Provenance(name="m", kind="transfer"))
    assert rerun.find_goal(figure(tmp_path / "e.png", scored), None).name == "m"


def test_verify_passes_an_honest_run_and_finds_an_altered_one(trained, tmp_path, capsys):
    head = provenance.describe(trained).ledger_sha256
    assert raylab("verify", "first", "--seed", 1, "--head", head, "--json", tmp_path / "out.json") == 0
    out = json.loads((tmp_path / "out.json").read_text())
    assert (out["is_valid"], out["problems"], out["chain"]["head"]) == (True, [], head)
    assert out["intervals"] == [{"from": 0, "to": 2, "difference": None}] and out["covered_steps"] == out["steps"] == 2
    assert out["checkpoints"]["kept"] == 1 and out["checkpoints"]["bytes"] > 0
    assert raylab("verify", "first", "--samples", 0, "--head", "0" * 64) == 1
    assert "NOT valid" in capsys.readouterr().out
    altered = Path(shutil.copytree(trained, tmp_path / "altered"))
    ledger = altered / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"loss": 0', '"loss": 1', 1))
    assert raylab("verify", altered, "--samples", 0) == 1
    assert "chain of the ledger is broken" in capsys.readouterr().out


def test_verify_refuses_what_it_cannot_verify(trained, tmp_path, ards_data, mortality_data, capsys):
    unfinished = Path(shutil.copytree(trained, tmp_path / "unfinished"))
    (unfinished / "result.json").unlink()
    assert raylab("verify", unfinished) == 2 and "has not finished" in capsys.readouterr().err
    assert raylab("verify", "first", "--data", mortality_data) == 2
    assert raylab("verify", "first", "--samples", -1) == 2
