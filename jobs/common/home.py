"""Where runs live: RAYLAB_HOME, else .raylab in the working directory.

HOME/runs/NAME/     one run or search: run.json, recipe.json, checkpoints/, model/, outbox/, result.json
HOME/mlflow/        the embedded MLflow: mlflow.db, artifacts/, token (who may use its server)

All of it is for its owner alone. With RAYLAB_HOME_GROUP set, a Unix group may read what OPEN names of each run.
"""

import grp
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raylab.errors import DataError, RunError, UsageError, unknown
from raylab.files import keep_out_of_git_and_uploads, locked, write_json
from raylab.training.run_record import FILE, RunRecord, read_run_record
from tracking import runs as tracking_runs

log = logging.getLogger(__name__)

GROUP = "RAYLAB_HOME_GROUP"
# What the home's group may read of a run. Never checkpoints, outbox, trials, logs or pictures of single patients, nor
# anything else of the home: clusters and the embedded MLflow hold tokens, prepared directories hold patients.
OPEN = ("run.json", "recipe.json", "result.json", "failure.json", "attrition.json", "model_card.md",
        "model", "scores", "plots")  # fmt: skip


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
        raise UsageError(f"there is already a run named '{name}'", do=f"raylab resume {name}, or choose another --name")
    group()  # a name that is wrong is said before there is a run
    first = not directory.parent.exists()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    if first:
        keep_out_of_git_and_uploads(home())
    return directory


def group() -> int | None:
    """The id of the group that may read runs of this home, None without one. Raises UsageError where it cannot be."""
    name = os.environ.get(GROUP)
    if not name:
        return None
    try:
        id = grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise UsageError(f"{GROUP} is '{name}': there is no such group", do="`id -nG` lists yours") from error
    if os.getuid() and id not in {os.getgid(), *os.getgroups()}:
        raise UsageError(f"{GROUP} is '{name}', which you are not a member of", do="`id -nG` lists your groups")
    if home().exists() and home().stat().st_mode & 0o022:
        raise UsageError(
            f"{home()} can be written by others (mode {home().stat().st_mode & 0o777:04o})",
            f"with {GROUP} they may read runs; who can write there can replace models, and read tokens",
            f"chmod go-w {home()}",
        )
    return id


def share(directory: Path) -> None:
    """Let the home's group read what OPEN names of a run in this home; without a group nothing is done."""
    id = group()
    if id is None or directory.parent != home() / "runs":
        return
    for folder in (home(), home() / "runs", directory):
        _open(folder, id)
    for name in OPEN:
        path = directory / name
        for one in (path, *(path.rglob("*") if path.is_dir() else ())):
            if one.exists() and not one.is_symlink():
                _open(one, id)


def _open(path: Path, group: int) -> None:
    """Group `group` may read `path`, and nobody but its owner may write it."""
    seen = path.stat()
    if seen.st_gid != group:
        os.chown(path, -1, group)
    path.chmod((seen.st_mode | (0o050 if path.is_dir() else 0o040)) & 0o755)


def find(run: str) -> Path:
    """The directory of a run given by name, MLflow run id or path.

    Raises UsageError with the nearest names, and for a copy of a run that lies beside the original.
    """
    runs = home() / "runs"
    for path in (runs / run, Path(run)):
        if (path / "run.json").is_file():
            directory = path.absolute()
            if original := original_of(directory):
                raise UsageError(
                    f"'{directory.name}' is a copy of the run '{original.name}'",
                    "its scores would go into the MLflow run of the original",
                    f"use {original.name}, or start a run of its own from its weights: --from {original.name}",
                )
            return directory
    names = {path.parent.name for path in runs.glob(f"*/{FILE}")}
    for directory, record in records():
        if record.run_id == run and original_of(directory) is None:
            return directory
    if not names:
        raise UsageError(f"there is no run '{run}'", f"no runs in {runs}", "raylab train TASK --data DIR")
    raise unknown("run", run, names)


def records(pattern: str = "*") -> Iterator[tuple[Path, RunRecord]]:
    """(directory, record) of every run of this home, or of what `pattern` finds below HOME/runs. A record that cannot
    be read is reported and left out, so that it does not keep the others."""
    for path in sorted((home() / "runs").glob(f"{pattern}/{FILE}")):
        try:
            yield path.parent, note(path.parent)
        except DataError as error:
            log.warning("left out: %s", error)


def original_of(directory: Path) -> Path | None:
    """The run beside `directory` that it was copied from, with its MLflow run; None for a run that is no copy.

    A run that was moved or renamed, so that there is one directory of it, is no copy.
    """
    record = note(directory)
    original = directory.parent / record.tags.get("raylab.name", directory.name)
    if original == directory or not (original / FILE).is_file():
        return None
    return original if note(original).run_id == record.run_id else None


def note(directory: Path) -> RunRecord:
    """The run's record. An address in it is without credentials, which older versions stored."""
    found = read_run_record(directory)
    return found.model_copy(update={"uri": tracking_runs.resolve(found.uri, found.run_id, directory)})


def describe(directory: Path, record: RunRecord) -> RunRecord:
    """Write the record of a run and let the home's group read it."""
    write_json(directory / FILE, record.to_json())
    share(directory)
    return record


def annotate(directory: Path, **facts: object) -> RunRecord:
    """Change fields of the run's record; TypeError for a field that it does not have."""
    if wrong := facts.keys() - RunRecord.model_fields.keys():
        raise TypeError(f"a run record has no field {', '.join(sorted(wrong))}")
    changed = note(directory).model_copy(update=facts)
    return describe(directory, RunRecord.model_validate(changed.to_json()))


@contextmanager
def lock_run(directory: Path) -> Iterator[None]:
    """One process at a time works on a run; the second is refused. At its end the home's group may read the run."""
    with locked(directory / "lock", wait=False) as mine:
        if not mine:
            raise RunError(
                f"run '{directory.name}' is being worked on by another process",
                "two at once would overwrite each other's checkpoints",
                "wait for it, or end it first",
            )
        try:
            yield
        finally:
            share(directory)
