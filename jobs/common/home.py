"""Where runs live: RAYLAB_HOME, else .raylab in the working directory.

HOME/runs/NAME/     one run or search: run.json, recipe.json, checkpoints/, model/, outbox/, result.json
HOME/submitted/     NAME.json, NAME.log: of a run that Python code has submitted (submitted.py)
HOME/keys/          bundles: the key that signs model bundles
HOME/mlflow/        the embedded MLflow: mlflow.db, artifacts/, token (who may use its server)

Only its owner can read it. With RAYLAB_HOME_GROUP set, a Unix group may read the files of each run that OPEN lists.
"""

import grp
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raylab import storage
from raylab.errors import DataError, RunError, UsageError, unknown
from raylab.files import keep_out_of_git_and_uploads, locked, write_json
from raylab.training.run_record import FILE, Kind, RunRecord, read_run_record
from tracking import runs as tracking_runs
from tracking.outbox import target

log = logging.getLogger(__name__)

GROUP = "RAYLAB_HOME_GROUP"
OPENING = ".opening"  # the directory of the run that is being opened
LOCK_SECONDS = 2.0  # that whoever marks a run which has just died may take
NAME_BYTES = 200  # Linux permits 255, and temporary names are longer
# The files of a run that the home's group may read. It can never read checkpoints, outbox, trials, logs or pictures of
# single patients, or other directories: clusters and the embedded MLflow hold tokens, prepared data holds patients.
# Why a run failed is in run.json; failure.json may have the message of a plugin's error, and that values of data.
OPEN = ("run.json", "recipe.json", "result.json", "attrition.json", "model_card.md",
        "model", "plugins", "scores", "plots")  # fmt: skip


def home() -> Path:
    if chosen := os.environ.get("RAYLAB_HOME"):
        return Path(chosen).absolute()
    here = Path.cwd()
    if "working_dir_files" in here.parts:  # a submitted job's copy of the code, deleted with the cluster
        return Path.home() / ".raylab"
    return here / ".raylab"


def new_run(name: str | None, task: str) -> Path:
    """The directory of a new run, HOME/runs/NAME; without a name, one is made from the task and the time.

    Raises UsageError or OSError if it cannot be created. `new_directory` creates it.
    """
    if name is None:
        name = f"{task}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    check_name(name)
    directory = home() / "runs" / name
    check_free(directory)
    group()  # raises for a wrong group before the run exists
    check_writable(directory)
    return directory


def check_name(name: str) -> None:
    """Raise UsageError unless a run can have this name."""
    is_plain = name.isprintable() and len(name.encode(errors="replace")) <= NAME_BYTES
    if not is_plain or not name or Path(name).name != name or name.startswith("."):
        why = f"it names a directory; at most {NAME_BYTES} bytes"
        raise UsageError(f"'{name[:80]}' is not a valid run name", why, "use letters, digits, '-' and '_'")


def check_free(directory: Path) -> None:
    """Raise UsageError if there is anything in the directory of a new run."""
    name = directory.name
    if (directory / FILE).exists():
        raise UsageError(f"there is already a run named '{name}'", do=f"raylab resume {name}, or choose another --name")
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty, and is not a run", do="remove it, or choose another --name")


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Create the directory of a new run: yield a hidden one, which is renamed at the end of the block. So a killed
    process leaves all of it or nothing; whoever opens the next run, or syncs, removes the hidden directory."""
    if not directory.parent.exists():
        directory.parent.mkdir(parents=True)
        keep_out_of_git_and_uploads(home())
    hidden = directory.with_name(OPENING)
    with locked(directory.with_name(OPENING + ".lock")):
        _remove_opening(hidden)
        check_free(directory)
        hidden.mkdir(mode=0o700)
        try:
            yield hidden
            hidden.rename(directory)
        except BaseException:
            _remove_opening(hidden)
            raise


def is_open(directory: Path) -> bool:
    """Whether `directory` is a run or trial that has been opened completely."""
    return directory.name != OPENING and (directory / FILE).is_file()


def remove(directory: Path) -> None:
    """Remove a run, with the note of its submission: at once it is no run any more, and what an interruption leaves is
    removed like a leftover."""
    if directory.parent == home() / "runs":
        for ending in (".json", ".log"):
            (home() / "submitted" / f"{directory.name}{ending}").unlink(missing_ok=True)
    hidden = directory.with_name(OPENING)
    with locked(directory.with_name(OPENING + ".lock")):
        _remove_opening(hidden)
        directory.rename(hidden)
        _remove_opening(hidden)


def remove_leftovers() -> None:
    """Remove what a process has left that was killed while it opened a run."""
    hidden = home() / "runs" / OPENING
    if hidden.exists():
        with locked(hidden.with_name(OPENING + ".lock")):
            _remove_opening(hidden)


def _remove_opening(hidden: Path) -> None:
    """Remove the hidden directory of a new run. The caller holds its lock, so that nobody fills it."""
    if hidden.exists():
        shutil.rmtree(hidden)


def check_writable(directory: Path | None = None) -> None:
    """Raise OSError unless files can be written into a run's directory, or into that of a new run. Call this before
    work whose result goes there."""
    storage.check_writable((directory or home() / "runs" / "new") / FILE)


def group() -> int | None:
    """The id of the group that may read runs of this home, None if none is set. Raises UsageError if it is unusable."""
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
            f"{GROUP} lets the group read runs; whoever can write there can replace models and read tokens",
            f"chmod go-w {home()}",
        )
    return id


def share(directory: Path) -> None:
    """Let the home's group read the files of a run that OPEN lists; does nothing if no group is set."""
    id = group()
    if id is None or directory.parent != home() / "runs" or not directory.exists():
        return
    for folder in (home(), home() / "runs", directory):
        _open(folder, id)
    for name in OPEN:
        path = directory / name
        for one in (path, *(path.rglob("*") if path.is_dir() else ())):
            if one.exists() and not one.is_symlink():
                _open(one, id)


def _open(path: Path, group: int) -> None:
    """Let `group` read `path`; only its owner may write it."""
    seen = path.stat()
    if seen.st_gid != group:
        os.chown(path, -1, group)
    path.chmod((seen.st_mode | (0o050 if path.is_dir() else 0o040)) & 0o755)


def find(run: str) -> Path:
    """The directory of a run given by name, MLflow run id or path, from here or from the raylab home.

    Raises UsageError with the nearest names if there is none, and for a copy of a run next to its original.
    """
    runs = home() / "runs"
    for path in (runs / run, home() / run, Path(run)):
        if _has_record(path):
            directory = path.absolute()
            if original := original_of(directory):
                raise UsageError(
                    f"'{directory.name}' is a copy of the run '{original.name}'",
                    "its scores would go into the MLflow run of the original",
                    f"use {original.name}, or start a run of its own from its weights: --from {original.name}",
                )
            return directory
    names = {path.parent.name for path in runs.glob(f"[!.]*/{FILE}")}
    for directory, record in records():
        if record.run_id == run and original_of(directory) is None:
            return directory
    if not names:
        raise UsageError(f"there is no run '{run}'", f"no runs in {runs}", "raylab train TASK --data DIR")
    raise unknown("run", run, names)


def _has_record(directory: Path) -> bool:
    """Whether `directory` is a run or trial; UsageError if the file system cannot tell, as for a name that is too
    long."""
    try:
        return (directory / FILE).is_file()
    except OSError as error:
        what, why = f"'{str(directory)[:200]}' cannot be a run", error.strerror or str(error)
        raise UsageError(what, why, "raylab runs lists the runs of this home") from error


def find_parent(record: RunRecord) -> Path | None:
    """The run from whose weights that of `record` started, or whose model it scored; None if it had none, or if this
    home no longer has it. Another run may have its name by now."""
    if record.parent is None:
        return None
    named = Path(record.parent_directory) if record.parent_directory else None
    try:
        directory = named if named is not None and _has_record(named) else find(record.parent)
    except UsageError:
        return None
    run_id = record.tags.get("raylab.parent")  # none: an earlier version wrote it, or MLflow did not have it yet
    return directory if not run_id or note(directory).run_id == run_id else None


def require_parent(record: RunRecord) -> Path | None:
    """The same, for work that needs its weights: UsageError if this home no longer has it."""
    parent = find_parent(record)
    if parent is None and record.parent is not None:
        raise UsageError(
            f"the run {record.parent}, from whose weights {record.name} starts, is missing",
            "this home has no run of this name, or it is another run",
            f"restore its directory, or see raylab rerun {record.name}, which repeats it",
        )
    return parent


def find_work(kind: Kind, out: Path, name: str | None) -> Path | None:
    """The run that tracks the work of this kind whose output is `out`; with `name`, only the run of that name."""
    for directory, record in records():
        if record.kind == kind and record.data == str(out) and name in (None, directory.name):
            return directory
    return None


def records(pattern: str = "[!.]*") -> Iterator[tuple[Path, RunRecord]]:
    """Yield (directory, record) of every run of this home, or of those matching `pattern` below HOME/runs. A record
    that cannot be read is reported and skipped, so that it does not block the others."""
    for path in sorted((home() / "runs").glob(f"{pattern}/{FILE}")):
        try:
            yield path.parent, note(path.parent)
        except DataError as error:
            log.warning("skipped: %s", error)


def changed_at(directory: Path) -> float:
    """When the record of a run was last changed: at its end, or by an evaluation. In Unix time."""
    return (directory / FILE).stat().st_mtime


def original_of(directory: Path) -> Path | None:
    """The run of which `directory` is a copy with the same MLflow run; None if it is not a copy.

    A run that was moved or renamed exists only once and is not a copy.
    """
    record = note(directory)
    original = directory.parent / record.tags.get("raylab.name", directory.name)
    if original == directory or not (original / FILE).is_file():
        return None
    return original if _identify(note(original)) == _identify(record) else None


def _identify(record: RunRecord) -> str | None:
    """The idempotency key of a run, which older ones do not have, or its MLflow id."""
    return record.tags.get(tracking_runs.KEY, record.run_id)


def note(directory: Path) -> RunRecord:
    """The run's record. Credentials, which older versions stored in its address, are removed."""
    found = read_run_record(directory)
    if found.run_id is None and (run_id := _find_run_id(directory)) is not None:
        found = found.model_copy(update={"run_id": run_id})
    return found.model_copy(update={"uri": tracking_runs.resolve(found.uri, found.run_id, directory)})


def _find_run_id(directory: Path) -> str | None:
    """The MLflow id of a run by its outbox, which others than the owner cannot read."""
    try:
        bound = target(directory / "outbox")
    except (PermissionError, DataError):  # `resume` writes a damaged file again
        return None
    return None if bound is None else bound.run_id


def describe(directory: Path, record: RunRecord) -> RunRecord:
    """Write the record of a run, readable by the home's group."""
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
def lock_run(directory: Path, place: Path | None = None) -> Iterator[None]:
    """Lock a run for this process; RunError if another process holds the lock. On exit the run is shared with the
    home's group. `place`: the hidden directory that will be `directory`."""
    deadline = time.monotonic() + LOCK_SECONDS
    with ExitStack() as stack:
        while not stack.enter_context(locked((place or directory) / "lock", wait=False)):
            stack.close()
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise RunError(
                f"another process is using run '{directory.name}'",
                "two processes would overwrite each other's checkpoints",
                "wait for it to finish, or stop it first",
            )
        try:
            yield
        finally:
            share(directory)
