"""The prepared directory: checked files plus `meta.json`, published in one rename.

meta.json holds what the preparer says (task, source, label, attrition, ...) and, added here, the format
version, where patients are named (`patient_ids`, for the leakage check), SHA-256 of every file and `data_hash` over
them. A directory whose files no longer match is refused. Each kind of data has a type of its own with more fields.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raylab.documents import Document, parse_document
from raylab.errors import DataError
from raylab.files import IGNORE_FILES, keep_out_of_git_and_uploads

FORMAT = 2
META = "meta.json"
PATIENT_COLUMNS = ("subject_id", "patient", "patient_id")


class PatientIds(BaseModel):
    """Where a prepared directory names the patient of each row: column `column` of the parquet file `table`."""

    model_config = ConfigDict(frozen=True)

    table: str
    column: str
    unit: str = "patient"
    """what the column tells apart, where rows are of no patients"""


class NoPatientIds(BaseModel):
    """A directory that does not name its patients."""

    model_config = ConfigDict(frozen=True)

    none: str
    """why"""


class Contents(Document):
    """What every version wrote: enough to know whose the directory is and which files are its own."""

    format: int
    task: str
    files: dict[str, str]
    """SHA-256 by path in the directory"""
    data_hash: str


class Meta(Document):
    """What is known of prepared data of every kind."""

    made_by: ClassVar[str] = "raylab prepare {task} ... --out"
    """the command that makes it"""

    format: int = FORMAT
    patient_ids: PatientIds | NoPatientIds | None = None
    """none: written before it was there"""
    task: str
    source: str
    numbering: list[str] = Field([])
    """within what the identifiers mean one person each; empty: written before it was there"""
    synthetic: bool
    domain: str | None = None
    """of drawn images: which of two hospitals"""
    raylab: str = ""
    """version that prepared it"""
    seed: int
    split_hash: str
    counts: dict[str, dict[str, int]]
    """by split"""
    attrition: list[dict[str, int | str]]
    """what is left after each exclusion: `step`, and counts"""
    warnings: list[str] = Field([])
    files: dict[str, str] = Field({})
    """SHA-256 by path; it and the next one are added by `publish`"""
    data_hash: str = ""
    """over the files"""


M = TypeVar("M", bound=Meta)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_verified: set[tuple[Path, int, int, int, str]] = set()


def _has_hash(file: Path, recorded: str) -> bool:
    """Whether the file has this SHA-256. It is read once a process, and again when its size, time or inode changes."""
    state = file.stat()
    key = (file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, recorded)
    if key not in _verified:
        if sha256(file) != recorded:
            return False
        _verified.add(key)
    return True


def split_hash(pairs: list[tuple[str, str]]) -> str:
    """SHA-256 over the sorted (group, split) pairs: equal exactly when the same patients are in the same splits."""
    text = "\n".join(sorted(f"{group}\t{split}" for group, split in set(pairs)))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(out: Path, write: Callable[[Path], M], task: str, replace: bool = False) -> M:
    """Let `write` fill a directory beside `out` and return its meta, add the hashes, and rename it to `out`.

    When `write` raises, nothing is left behind. An `out` that holds prepared data of `task` is replaced with `replace`
    only, and not before the new data is complete; anything else that is not empty is refused (`check_vacant`).
    """
    out = out.resolve()  # the directory itself, where `out` is a link to it
    check_vacant(out, task, replace)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise DataError(
            f"cannot write beside {out}: {error.strerror}", do="give --out a path you may write to"
        ) from error
    try:
        meta = write(work)
        files = {str(p.relative_to(work)): sha256(p) for p in sorted(work.rglob("*")) if p.is_file()}
        digest = hashlib.sha256("\n".join(f"{name}\t{files[name]}" for name in sorted(files)).encode()).hexdigest()
        where = meta.patient_ids or find_patient_ids(work)
        added = {"format": FORMAT, "patient_ids": where, "files": files, "data_hash": digest}
        meta = meta.model_copy(update=added)
        content = meta.to_json()
        meta = type(meta).model_validate(content)  # nothing is published that `read_meta` would refuse
        content |= {name: content.pop(name) for name in ("files", "data_hash")}  # long: at the end
        (work / META).write_text(json.dumps(content, indent=1) + "\n")
        keep_out_of_git_and_uploads(work)
        for path in [*work.rglob("*"), work]:  # patient data: readable by its owner alone
            path.chmod(0o700 if path.is_dir() else 0o600)
        check_vacant(out, task, replace)  # again: preparing took its time
        old = work.with_name(work.name + ".old")
        try:
            if out.exists():
                out.rename(old)
            work.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return meta


def check_vacant(out: Path, task: str, replace: bool) -> None:
    """DataError unless `out` is absent, an empty directory or, with `replace`, data of `task` that `publish` wrote.

    A directory with a file that its meta.json does not list is never replaced: the file is somebody's own.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out} is a file, not a directory", do="give --out another path")
    present = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir() or path.is_symlink()}
    if not present and not any(out.iterdir()):
        return
    meta = _contents(out)
    if meta is None:
        raise DataError(f"{out} is not empty and holds no prepared data", do="give --out a new or empty directory")
    if meta.task != task:
        raise DataError(
            f"{out} holds data prepared for '{meta.task}', not for '{task}'",
            "--replace replaces data of the same task only",
            "give --out another directory, or remove this one yourself",
        )
    if not replace:
        raise DataError(
            f"{out} holds prepared data already",
            "runs that were trained on it need it as it is",
            "give --out another directory, or add --replace",
        )
    if foreign := sorted(present - meta.files.keys() - {META, *IGNORE_FILES}):
        raise DataError(
            f"{out} has files that are not of its prepared data: {', '.join(foreign[:5])}",
            "--replace would remove them",
            "move them elsewhere, or give --out another directory",
        )


def find_patient_ids(directory: Path) -> PatientIds | NoPatientIds:
    """Where a prepared directory names the patient of each row, or why it does not.

    That is a column of PATIENT_COLUMNS in a parquet file that also has the column `split`.
    """
    for path in sorted(directory.glob("*.parquet")):
        columns = pl.read_parquet_schema(path)
        for name in PATIENT_COLUMNS:
            if name in columns and "split" in columns:
                return PatientIds(table=path.name, column=name)
    return NoPatientIds(none=f"no table there has the columns split and {' or '.join(PATIENT_COLUMNS)}")


def _contents(directory: Path) -> Contents | None:
    """What meta.json says of the directory, in whatever format version; None where it is not prepared data."""
    try:
        return Contents.model_validate_json((directory / META).read_text())
    except (OSError, ValidationError):
        return None


def task_of(directory: Path) -> str | None:
    """The task that a directory was prepared for; None where it is not prepared data. Its files are not checked."""
    contents = _contents(directory)
    return None if contents is None else contents.task


@overload
def read_meta(directory: Path, task: str | None) -> Meta: ...
@overload
def read_meta(directory: Path, task: str | None, kind: type[M]) -> M: ...
def read_meta(directory: Path, task: str | None, kind: type[Meta] = Meta) -> Meta:
    """The checked meta.json of a prepared directory, as of its `kind`; of any task where `task` is None.

    Raises DataError when the directory, a file or a field is missing, when the directory was prepared for another task
    or by another format version, or when a file no longer has its recorded hash.
    """
    directory = Path(directory)
    make = kind.made_by.format(task=task or "TASK")
    again, elsewhere = f"{make} {directory}", f"{make} OTHER_DIR"
    if not directory.is_dir():
        raise DataError(f"no data directory at {directory}", do=again)
    path = directory / META
    if not path.is_file():
        do = elsewhere if any(directory.iterdir()) else again
        raise DataError(f"{directory} holds no prepared data (no meta.json)", do=do)
    try:
        content: Any = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable as JSON", str(error), elsewhere) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise DataError(
            f"{directory} was prepared by another version", f"format {found}, this raylab reads {FORMAT}", elsewhere
        )
    if task is not None and content.get("task") != task:
        raise DataError(
            f"{directory} was prepared for '{content.get('task')}', not for '{task}'",
            "a model runs only on data of its own task",
            elsewhere,
        )
    parse_document(content, Contents, path, elsewhere)
    meta = parse_document(content, kind, path, elsewhere)
    for name, recorded in meta.files.items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is missing", "meta.json lists it", elsewhere)
        if not _has_hash(file, recorded):
            raise DataError(
                f"{file} has changed since it was prepared", "its SHA-256 no longer matches meta.json", elsewhere
            )
    return meta


def numberings(meta: Meta) -> list[str]:
    """Within what the identifiers of a prepared directory mean one person each; of drawn patients, one draw. Several
    where directories were pooled. Data that does not say it has the numbering of its source."""
    if meta.numbering:
        return meta.numbering
    if meta.synthetic:
        return [" ".join(word for word in ("synthetic", meta.domain, f"seed {meta.seed}") if word)]
    return meta.source.split("+")
