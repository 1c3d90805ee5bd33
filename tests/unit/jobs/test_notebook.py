"""`raylab notebook`: the kernel's files, and what a notebook is told when the environment behind them has gone."""

import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import sites
from jobs import cli, notebook
from jobs.common import home
from raylab.errors import RunError

SITE = """
[centre]
setup = ["export LOADED=stage", "export PATH=/nowhere:$PATH"]
environment = { ON_SITE = "a 'quoted' value" }
python = "PYTHON"
[centre.nodes.cpu]
cpus = 1
memory_mb = 2000
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A user's Jupyter and home, and a site whose Python a test can remove."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (tmp_path / "python").chmod(0o700)
    (tmp_path / "sites.toml").write_text(SITE.replace("PYTHON", str(tmp_path / "python")))
    monkeypatch.setenv("RAYLAB_SITES", str(tmp_path / "sites.toml"))
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "a home"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path


def write(place, *words):
    assert cli.main(["notebook", "--site", "centre", "--quiet", *words]) == 0
    return place / "jupyter" / "kernels" / "raylab"


def test_a_kernel_is_private_and_has_the_sites_modules_and_environment(place, capsys):
    directory = write(place)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"kernel.json": 0o600, "kernel.sh": 0o700, "gone_kernel.py": 0o600}
    kernel = json.loads((directory / "kernel.json").read_text())
    assert kernel["argv"][0] == str(directory / "kernel.sh") and kernel["argv"][-1] == "{connection_file}"
    shown = "import os; print([os.environ[name] for name in ('LOADED', 'ON_SITE', 'RAYLAB_HOME')])"
    done = subprocess.run([kernel["argv"][0], "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout == f"{['stage', sites.site('centre').environment['ON_SITE'], str(home.home())]}\n"
    write(place)  # again, over its own
    (directory / "kernel.sh").unlink()
    assert cli.main(["notebook", "--site", "centre"]) == 2
    assert "raylab did not write" in capsys.readouterr().err


def test_no_secret_of_the_shell_gets_into_a_kernel(place, monkeypatch, capsys):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "CANARY")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:CANARY@mlflow.example.org")
    assert cli.main(["notebook", "--site", "centre"]) == 0
    texts = [path.read_text() for path in (place / "jupyter" / "kernels" / "raylab").iterdir()]
    assert any("MLFLOW_TRACKING_URI=https://mlflow.example.org\n" in text for text in texts)
    said = capsys.readouterr()
    assert "is not in the kernel: write it into the login file" in said.out
    assert not any("CANARY" in text for text in (*texts, said.out, said.err))


@pytest.mark.parametrize("name", ["../x", "", "a b"])
def test_a_name_is_checked(place, name, capsys):
    assert cli.main(["notebook", "--site", "centre", "--name", name]) == 2
    assert "not a valid kernel name" in capsys.readouterr().err


def execute(source: str):
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    cell = nbformat.v4.new_code_cell(source)
    book = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError) as raised:
        NotebookClient(book, kernel_name="raylab", timeout=60).execute()
    return str(raised.value), cell["outputs"]


def test_a_kernel_whose_environment_has_gone_says_so_in_the_notebook(place):
    write(place)
    (place / "python").unlink()
    message, _ = execute("1 + 1")
    assert "raylab's environment is gone" in message and str(place / "python") in message and "make setup" in message


def test_an_error_of_raylab_is_shown_without_a_traceback(place):
    write(place)
    _, outputs = execute("from raylab.errors import RunError\nraise RunError('it broke', 'of old age', 'wait')")
    assert outputs[0]["traceback"] == [f"raylab: {RunError('it broke', 'of old age', 'wait')}"]


def test_without_jupyter_the_way_to_it_is_named(place, monkeypatch, capsys):
    found = notebook.importlib.util.find_spec
    monkeypatch.setattr(notebook.importlib.util, "find_spec", lambda name: None if name == "ipykernel" else found(name))
    assert cli.main(["notebook", "--site", "centre"]) == 2
    assert "lacks ipykernel" in capsys.readouterr().err
    assert not (Path(place) / "jupyter").exists()
