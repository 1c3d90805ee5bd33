"""docs/extend.md: every file and every command of the page, as it stands there."""

import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from jobs import cli
from jobs.common import home
from raylab.tasks import plugins
from raylab.tasks.plugin_code import Code
from raylab.tasks.recipes import read_recipe

PAGE = (Path(__file__).parents[3] / "docs" / "extend.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {text.split("\n")[0].removeprefix("# "): text.partition("\n")[2] for kind, text in BLOCKS if kind == "python"}
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]


def forget() -> None:
    """As in a new process."""
    for found in list(plugins._loaded.values()):
        plugins._remove(found)
    plugins._named.clear()


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A directory with the files of the page, and a user who has named no code yet."""
    at = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (at / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        patch.setenv("RAYLAB_HOME", str(at / "home"))
        patch.setenv("XDG_CONFIG_HOME", str(at / "config"))
        yield at
    forget()


def run(line: str) -> None:
    """One command of the page, in what looks like a process of its own."""
    word, *words = shlex.split(line)
    forget()
    if word == "python":
        subprocess.run([sys.executable, *words], check=True)
    else:
        assert cli.main([*words, "--quiet"]) == 0, line


def run_on_ray(line: str) -> None:
    """One command of the page in a process of its own, as Ray keeps for good what it finds when it is imported."""
    subprocess.run([sys.executable, "-m", "jobs.cli", *shlex.split(line)[1:], "--quiet"], check=True)


def test_the_page_has_files_and_commands():
    assert set(FILES) == {"tcn.py", "make_ward.py", "ward.py", "long_stay.py", "predict_new.py"}
    assert len(COMMANDS) == 13


@pytest.fixture(scope="module")
def tcn(at):
    """The first part: a model of one's own on the task ards."""
    for line in COMMANDS[:5]:
        run(line)
    return home.find("tcn")


def test_an_own_model_is_trained_evaluated_and_explained(tcn):
    assert read_recipe(tcn / "recipe.json").model.kernel == 4
    record = home.note(tcn)
    code = Code("tcn.py", FILES["tcn.py"])
    assert record.tags["raylab.plugins"] == f"tcn.py {code.sha256}"
    for copy in (tcn / "plugins" / "tcn.py", tcn / "model" / "plugins" / "tcn.py"):
        assert copy.read_text() == FILES["tcn.py"] and copy.stat().st_mode & 0o777 == 0o600
    assert ((tcn / "scores").is_dir() and list(tcn.rglob("*attribution*"))) or list(tcn.rglob("*.png"))


def test_a_run_uses_its_own_copy_after_the_file_has_changed(tcn, at):
    (at / "tcn.py").write_text("1 / 0")
    forget()
    assert cli.main(["resume", "tcn", "--quiet"]) == 0  # finished: it is scored again, by its own code
    assert cli.main(["evaluate", "ards", "--run", "tcn", "--data", "prepared/ards", "--split", "val", "--quiet"]) == 0
    (at / "tcn.py").write_text(FILES["tcn.py"])


def test_a_run_of_another_user_is_refused_until_its_code_is_named(tcn, at, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(at / "config-of-another"))
    forget()
    words = ["evaluate", "ards", "--run", "tcn", "--data", "prepared/ards", "--split", "val", "--quiet"]
    assert cli.main(words) == 2
    assert f"add --plugin {tcn / 'plugins' / 'tcn.py'}" in capsys.readouterr().err
    assert cli.main([*words, "--plugin", str(tcn / "plugins" / "tcn.py")]) == 0
    forget()
    assert cli.main(words) == 0


def test_code_in_a_research_object_is_described_and_not_executed_unasked(tcn, at, monkeypatch, capsys):
    """Another user gets the archive: its code is refused until its content is named, unpacked from there."""
    forget()
    crate = at / "study.zip"
    assert cli.main(["export", "tcn", "--crate", "--out", str(crate), "--quiet"]) == 0
    with zipfile.ZipFile(crate) as archive:
        archive.extractall(at / "unpacked")
    graph = {one["@id"]: one for one in json.loads((at / "unpacked" / "ro-crate-metadata.json").read_text())["@graph"]}
    code, action = graph["runs/tcn/plugins/tcn.py"], graph["#run-tcn"]
    assert code["@type"] == ["File", "SoftwareSourceCode"] and code["programmingLanguage"] == "Python"
    assert code["sha256"] == Code("tcn.py", FILES["tcn.py"]).sha256
    assert {"@id": code["@id"]} in action["instrument"] and {"@id": code["@id"]} not in action["result"]
    assert {"@id": code["@id"]} in graph["runs/tcn/"]["hasPart"]

    monkeypatch.setenv("XDG_CONFIG_HOME", str(at / "config-of-a-reader"))
    executed = at / "executed"
    text = FILES["tcn.py"] + f"\nfrom pathlib import Path\nPath({str(executed)!r}).touch()\n"
    (at / "unpacked" / "runs" / "tcn" / "plugins" / "tcn.py").write_text(text)
    changed = at / "changed.zip"
    with zipfile.ZipFile(changed, "w") as archive:
        for path in sorted((at / "unpacked").rglob("*")):
            archive.write(path, path.relative_to(at / "unpacked"))
    forget()
    words = ["rerun", str(changed), "--data", "prepared/ards"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert "runs/tcn/plugins/tcn.py, which is not executed unasked" in error and "unpack changed.zip" in error
    assert not executed.exists()
    (at / "tcn.py").write_text(FILES["tcn.py"])
    assert cli.main([*words, "--plugin", "tcn.py"]) == 2 and not executed.exists(), "another content was named"
    forget()
    assert cli.main(["rerun", str(crate), "--data", "prepared/ards", "--plugin", "tcn.py"]) == 0
    assert "the same to the bit" in capsys.readouterr().out


@pytest.fixture(scope="module")
def long(at):
    """The third part: a source and a task, with the model of the first."""
    for line in COMMANDS[6:12]:
        run(line)
    return home.find("long")


def test_an_own_task_on_an_own_source_has_what_every_task_has(long, at):
    meta = (at / "prepared" / "long-stay" / "meta.json").read_text()
    for name in ("long_stay.py", "ward.py"):
        assert f'"{name}": "{Code(name, FILES[name]).sha256}"' in meta
    assert '"ventilated_pf"' in meta and '"converted"' in meta  # cohorts; Fahrenheit to Celsius
    table = pl.read_parquet(at / "predicted.parquet")
    assert table.height and table["p_long stay"].is_between(0, 1).all()
    names = sorted(path.name for path in (long / "plugins").iterdir())
    assert names == ["long_stay.py", "tcn.py"]


def test_new_patients_are_predicted_in_python(long, at):
    forget()
    out = subprocess.run([sys.executable, "predict_new.py"], capture_output=True, text=True, check=True).stdout
    assert "p_long stay" in out and "new" in out


def test_the_benchmark_takes_them(long, at):
    run(COMMANDS[12])
    assert "| tcn |" in (at / "benchmark" / "table.md").read_text()


@pytest.mark.slow
def test_a_search_finds_its_hyperparameters_on_ray(tcn):
    run_on_ray(COMMANDS[5])
    search = home.find("tcn-search")
    trials = [read_recipe(path) for path in sorted(search.glob("trials/*/recipe.json"))]
    assert len(trials) == 4 and {recipe.model.channels for recipe in trials} <= {8, 16}
    assert all((path / "plugins" / "tcn.py").is_file() for path in search.glob("trials/*") if path.is_dir())


@pytest.mark.slow
def test_its_weights_do_not_depend_on_the_workers(tcn):
    run_on_ray(COMMANDS[2].replace("--workers 0 --name tcn", "--workers 2 --name tcn-2"))
    assert home.note(home.find("tcn-2")).weights_sha256 == home.note(tcn).weights_sha256


def test_two_files_of_one_name_are_refused(at, capsys):
    (at / "other").mkdir()
    (at / "other" / "tcn.py").write_text(FILES["tcn.py"])
    forget()
    assert cli.main(["recipe", "ards", "--plugin", "tcn.py", "--plugin", "other/tcn.py"]) == 2
    assert "two plugins have the name tcn.py" in capsys.readouterr().err


def test_a_task_without_its_plugin_is_unknown(at, capsys):
    forget()
    assert cli.main(["train", "long-stay", "--data", "prepared/long-stay"]) == 2
    assert "unknown task 'long-stay'" in capsys.readouterr().err
