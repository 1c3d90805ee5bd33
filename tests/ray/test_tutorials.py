"""The tutorials, executed as they are written: their shell and Python blocks in order, in one shell."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.wait import wait_for

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OWN = {".git", ".raylab", ".venv", "prepared", "wheelhouse"}  # of a clone that somebody works in


def read_script(page: str) -> str:
    """The blocks of a page as one script that ends at the first command that fails."""
    blocks = [
        body if language == "sh" else f"python - <<'END_OF_PYTHON'\n{body}END_OF_PYTHON\n"
        for language, body in BLOCK.findall((ROOT / "docs" / page).read_text())
    ]
    return "\n".join(["set -eo pipefail", *blocks])


@pytest.fixture
def clone() -> Iterator[Path]:
    """What a user has after cloning and `make setup`, next to an empty place for a study. The path is short, because
    the tutorial opens a socket below it."""
    place = Path(tempfile.mkdtemp(prefix="tut-"))
    here = place / "raylab"
    here.mkdir()
    for path in ROOT.iterdir():
        if path.name not in OWN:
            (here / path.name).symlink_to(path)
    (here / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        (here / ".venv" / path.name).symlink_to(path)
    (here / ".venv" / ".ready").unlink(missing_ok=True)
    (here / ".venv" / ".ready").touch()  # newer than the lock: `make setup` has nothing to do in somebody's environment
    yield here
    shutil.rmtree(place)


def run(script: str, where: Path) -> str:
    """What the script prints; it and all that it started are over afterwards."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("RAYLAB_", "MLFLOW_"))}
    output = where.parent / "output.txt"
    with output.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=where, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = shell.wait(700)
            said = output.read_text(errors="replace")
            assert code == 0, said[-6000:]
            wait_for(lambda: not left_of(shell.pid), 30, "the end of the model server", lambda: left_of(shell.pid))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    return said


def left_of(session: int) -> str:
    """The processes of a session."""
    words = ["pgrep", "-a", "-s", str(session)]
    return subprocess.run(words, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_tutorial_of_intensive_care(clone: Path) -> None:
    said = run(read_script("tutorial.md"), clone)
    study = clone.parent / "ards-study"
    scores = json.loads((study / "scores.json").read_text())
    assert scores["split"] == "test" and scores["synthetic"] and scores["test_reads"] == 1
    predictions = json.loads(said[said.index('{"predictions"') :].splitlines()[0])["predictions"]
    assert len(predictions) == 6 and any(0 < row["p_onset"] < 1 for row in predictions if row["reason"] is None)
    assert (study / "report.html").stat().st_size > 10_000
    assert (study / "prepared" / "ards" / "meta.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_the_tutorial_of_images(clone: Path) -> None:
    run(read_script("tutorial-images.md"), clone)
    study = clone.parent / "xray-study"
    scores = json.loads((study / "scores.json").read_text())
    assert scores["split"] == "test" and scores["synthetic"]
    assert (study / "val.parquet").is_file() and (study / "report.html").is_file()
