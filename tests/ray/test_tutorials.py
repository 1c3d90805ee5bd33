"""The tutorials, executed as they are written: their shell and Python blocks in order, in one shell."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.verbs import MODULES, Verbs
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


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    """Without Ray, which reads a token when it is imported."""
    made = Verbs(own_environment(), (*MODULES, "jobs.prepare", "jobs.compare", "jobs.evaluate", "jobs.explain"))
    yield made
    made.stop()


@pytest.fixture
def clone(verbs: Verbs) -> Iterator[Path]:
    """What a user has after cloning and `make setup`, next to an empty place for a study; but `raylab` need not import
    anything. The path is short, because the tutorial opens a socket below it."""
    place = Path(tempfile.mkdtemp(prefix="tut-"))
    here = place / "raylab"
    here.mkdir()
    for path in ROOT.iterdir():
        if path.name not in OWN:
            (here / path.name).symlink_to(path)
    commands = here / ".venv" / "bin"
    commands.mkdir(parents=True)
    for path in (*Path(sys.prefix).iterdir(), *(Path(sys.prefix) / "bin").iterdir()):
        if path.name not in ("bin", "raylab", ".ready"):
            (commands if path.parent.name == "bin" else commands.parent).joinpath(path.name).symlink_to(path)
    (here / ".venv" / ".ready").touch()  # newer than the lock: `make setup` has nothing to do in somebody's environment
    with verbs.as_command(commands / "raylab"):
        yield here
    shutil.rmtree(place)


def own_environment() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith(("RAYLAB_", "MLFLOW_"))}


def run(script: str, where: Path) -> str:
    """What the script prints; it and all that it started are over afterwards."""
    output = where.parent / "output.txt"
    with output.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=where, env=own_environment(), stdout=file, stderr=file, start_new_session=True
        )

        def left() -> list[psutil.Process]:
            return find_processes(shell.pid, where.parent)

        try:
            code = shell.wait(700)
            said = output.read_text(errors="replace")
            assert code == 0, said[-6000:]
            wait_for(lambda: not left(), 30, "the end of the model server", lambda: str(left()))
        finally:
            for process in left():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    return said


def find_processes(session: int, place: Path) -> list[psutil.Process]:
    """Those of the shell's session, and those that work in a directory below `place`, as verbs and their Ray do."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session or Path(process.cwd()).is_relative_to(place):
                found.append(process)
    return found


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
