"""Where runs live: RAYLAB_HOME, else .raylab in the working directory.

HOME/runs/NAME/     one run or search: run.json, recipe.json, checkpoints/, model/, outbox/, result.json
HOME/mlflow/        the embedded MLflow: mlflow.db, artifacts/
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylab.errors import RunError, UsageError, unknown
from raylab.files import keep_out_of_git_and_uploads, locked, write_json


def home() -> Path:
    if chosen := os.environ.get("RAYLAB_HOME"):
        return Path(chosen).absolute()
    here = Path.cwd()
    if "working_dir_files" in here.parts:  # a submitted job's copy of the code, which goes when the cluster goes
        return Path.home() / ".raylab"
    return here / ".raylab"


def new_run(name: str | None, task: str) -> Path:
    """A new directory HOME/runs/NAME; the name is made from task and time when none is given."""
    if name is None:
        name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if not name or Path(name).name != name or name.startswith("."):
        raise UsageError(f"'{name}' cannot name a run", "a run is a directory", "use letters, digits, '-' and '_'")
    directory = home() / "runs" / name
    if (directory / "run.json").exists():
        raise UsageError(
            f"there is already a run named '{name}'", do=f"raylab train --resume {name}, or choose another --name"
        )
    first = not directory.parent.exists()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if first:
        keep_out_of_git_and_uploads(home())
    return directory


def find(run: str) -> Path:
    """The directory of a run given by name, MLflow run id or path; UsageError with the nearest names."""
    runs = home() / "runs"
    for path in (runs / run, Path(run)):
        if (path / "run.json").is_file():
            return path.absolute()
    notes = {path.parent.name: path for path in runs.glob("*/run.json")}
    for path in notes.values():
        if json.loads(path.read_text()).get("run_id") == run:
            return path.parent
    if not notes:
        raise UsageError(f"there is no run '{run}'", f"no runs in {runs}", "raylab train TASK --data DIR")
    raise unknown("run", run, notes)


def note(directory: Path) -> dict[str, Any]:
    """The run's run.json."""
    found: dict[str, Any] = json.loads((directory / "run.json").read_text())
    return found


def annotate(directory: Path, **facts: Any) -> dict[str, Any]:
    path = directory / "run.json"
    merged = {**(note(directory) if path.is_file() else {}), **facts}
    write_json(path, merged)
    return merged


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """One process at a time works on a run; the second is refused."""
    with locked(directory / "lock", wait=False) as mine:
        if not mine:
            raise RunError(
                f"run '{directory.name}' is being worked on by another process",
                "two at once would overwrite each other's checkpoints",
                "wait for it, or end it first",
            )
        yield
