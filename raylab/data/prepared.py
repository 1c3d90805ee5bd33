"""The prepared directory: hashed files plus `meta.json`, published in one rename.

meta.json contains what the preparer reports (task, source, label, attrition, ...) and, added here, the format version,
which column identifies patients (`patient_ids`, for the leakage check), the SHA-256 of every file and the `data_hash`
over these. A directory whose files no longer match is rejected. Each kind of data extends `Meta` with its own fields.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, overload

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from raylab.data import datalad
from raylab.documents import Document, parse_document
from raylab.errors import DataError
from raylab.files import IGNORE_FILES, UPLOADS, keep_out_of_git_and_uploads, parse_json
from raylab.storage import check_writable

FORMAT = 2
META = "meta.json"
PATIENT_COLUMNS = ("subject_id", "patient", "patient_id")


class PatientIds(BaseModel):
    """Where a prepared directory identifies the patient of each row: column `column` of the parquet file `table`."""

    model_config = ConfigDict(frozen=True)

    table: str
    column: str
    unit: str = "patient"
    """what the column identifies, if not patients"""


class NoPatientIds(BaseModel):
    """A prepared directory that does not identify its patients."""

    model_config = ConfigDict(frozen=True)

    none: str
    """why"""


class Contents(Document):
    """The fields that every format version has: enough to tell which task and which files a directory contains."""

    format: int
    task: str
    files: dict[str, str]
    """SHA-256 by path in the directory"""
    data_hash: str


class Meta(Document):
    """The metadata of prepared data of any kind."""

    made_by: ClassVar[str] = "raylab prepare {task} ... --out"
    """the command that makes it"""

    format: int = FORMAT
    patient_ids: PatientIds | NoPatientIds | None = None
    """none: written before this field existed"""
    task: str
    source: str
    numbering: list[str] = Field([])
    """scopes within which an identifier means one person; empty: written before this field existed"""
    synthetic: bool
    domain: str | None = None
    """of generated images: which of two hospitals"""
    raylab: str = ""
    """raylab version that prepared the data"""
    plugins: dict[str, str] = Field({})
    """own code that prepared it: SHA-256 by file, version by package"""
    seed: int
    split_hash: str
    counts: dict[str, dict[str, int]]
    """counts by split"""
    attrition: list[dict[str, int | str]]
    """what remains after each exclusion: `step`, and counts"""
    warnings: list[str] = Field([])
    inputs: list[datalad.DatasetState] = Field([])
    """DataLad datasets with the raw data"""
    files: dict[str, str] = Field({})
    """SHA-256 by path; `publish` adds this field and the next"""
    data_hash: str = ""
    """SHA-256 over all files"""

    @property
    def origin(self) -> str:
        """Where the data is from, as tables and tags say it."""
        return self.source

    @property
    def unit(self) -> str:
        """What rows belong to that never crosses splits: a patient, if the data says nothing else."""
        return self.patient_ids.unit if isinstance(self.patient_ids, PatientIds) else "patient"

    @property
    def printable_warnings(self) -> list[str]:
        """The warnings without the file names on their further lines, which can name patients."""
        return [text.splitlines()[0].rstrip(":") for text in self.warnings]


M = TypeVar("M", bound=Meta)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_verified: set[tuple[Path, int, int, int, str]] = set()


def _has_hash(file: Path, recorded: str) -> bool:
    """Whether the file has this SHA-256; read once per process, and again if its size, mtime or inode changes."""
    state = file.stat()
    key = (file.resolve(), state.st_ino, state.st_size, state.st_mtime_ns, recorded)
    if key not in _verified:
        if sha256(file) != recorded:
            return False
        _verified.add(key)
    return True


def split_hash(pairs: list[tuple[str, str]]) -> str:
    """Return the SHA-256 of the sorted (group, split) pairs: equal if and only if the patients' splits are equal."""
    text = "\n".join(sorted(f"{group}\t{split}" for group, split in set(pairs)))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(out: Path, write: Callable[[Path], M], task: str, replace: bool = False, inputs: Sequence[Path] = ()) -> M:
    """Let `write` fill a temporary directory next to `out`, add the hashes, rename it to `out`, and return the meta.

    Of `inputs`, the raw data, those in DataLad datasets are recorded as they are before `write` reads them.

    If `write` raises, nothing is left behind. If `out` holds prepared data of `task`, it is replaced only with
    `replace`, and only once the new data is complete; any other non-empty directory is rejected (`check_vacant`).
    """
    check_path(out)
    out = out.resolve()  # the directory itself, in case `out` is a symbolic link
    check_vacant(out, task, replace)
    datasets = [state for path in inputs if (state := datalad.read_state(path)) is not None]
    try:
        check_writable(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise DataError(
            f"cannot write next to {out}: {error.strerror}",
            do="give --out a path you can write to, on a disk with room",
        ) from error
    try:
        meta = write(work)
        files = {str(p.relative_to(work)): sha256(p) for p in sorted(work.rglob("*")) if p.is_file()}
        data_hash = hashlib.sha256("\n".join(f"{name}\t{files[name]}" for name in sorted(files)).encode()).hexdigest()
        patient_ids = meta.patient_ids or find_patient_ids(work)
        fields: dict[str, Any] = {"format": FORMAT, "patient_ids": patient_ids, "files": files, "data_hash": data_hash}
        fields |= {"inputs": datasets} if datasets else {}
        meta = meta.model_copy(update=fields)
        content = meta.to_json()
        meta = type(meta).model_validate(content)  # never publish what `read_meta` would reject
        content |= {name: content.pop(name) for name in ("files", "data_hash")}  # long, so they go last
        (work / META).write_text(json.dumps(content, indent=1) + "\n")
        keep_out_of_git_and_uploads(work, UPLOADS if datalad.find_root(out) else IGNORE_FILES)
        for path in [*work.rglob("*"), work]:  # patient data: readable by its owner alone
            path.chmod(0o700 if path.is_dir() else 0o600)
        check_vacant(out, task, replace)  # again, because it may have changed during preparation
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


def check_path(directory: Path) -> None:
    """Raise DataError for a path that polars cannot open, and records cannot name."""
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:
        why = "its bytes are not UTF-8, so it can be neither opened as a table nor recorded"
        raise DataError(
            f"{directory} has a name that is not text", why, "rename it, or link to it by another"
        ) from error


def check_vacant(out: Path, task: str, replace: bool) -> None:
    """Raise DataError unless `out` is absent, empty or, with `replace`, data of `task` that `publish` wrote.

    A directory with a file that its meta.json does not list is never replaced: the file may be the user's own.
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
        raise DataError(f"{out} is not empty and is not prepared data", do="give --out a new or empty directory")
    if meta.task != task:
        raise DataError(
            f"{out} holds data prepared for '{meta.task}', not for '{task}'",
            "--replace only replaces data of the same task",
            "give --out another directory, or remove this one yourself",
        )
    if not replace:
        raise DataError(
            f"{out} already holds prepared data",
            "runs trained on it need it unchanged",
            "give --out another directory, or add --replace",
        )
    if foreign := sorted(present - meta.files.keys() - {META, *IGNORE_FILES}):
        raise DataError(
            f"{out} has files that do not belong to its prepared data: {', '.join(foreign[:5])}",
            "--replace would delete them",
            "move them elsewhere, or give --out another directory",
        )


def find_patient_ids(directory: Path) -> PatientIds | NoPatientIds:
    """Find the column of PATIENT_COLUMNS that identifies the patient of each row, or return why there is none.

    It is in a parquet file that also has the column `split`.
    """
    for path in sorted(directory.glob("*.parquet")):
        columns = pl.read_parquet_schema(path)
        for name in PATIENT_COLUMNS:
            if name in columns and "split" in columns:
                return PatientIds(table=path.name, column=name)
    return NoPatientIds(none=f"no table there has the columns split and {' or '.join(PATIENT_COLUMNS)}")


def _contents(directory: Path) -> Contents | None:
    """Read meta.json of the directory, of any format version; None if it is not prepared data."""
    try:
        return Contents.model_validate_json((directory / META).read_text())
    except (OSError, ValueError):
        return None


@overload
def read_meta(directory: Path, task: str | None) -> Meta: ...
@overload
def read_meta(directory: Path, task: str | None, kind: type[M]) -> M: ...
def read_meta(directory: Path, task: str | None, kind: type[Meta] = Meta) -> Meta:
    """Read and verify the meta.json of a prepared directory, as type `kind`; of any task if `task` is None.

    Raises DataError if the directory, a file or a field is missing, if the directory was prepared for another task or
    in another format version, or if a file no longer has its recorded hash.
    """
    directory = Path(directory)
    check_path(directory)
    make = kind.made_by.format(task=task or "TASK")
    again, elsewhere = f"{make} {directory}", f"{make} OTHER_DIR"
    if not directory.is_dir():
        raise DataError(f"no data directory at {directory}", do=again)
    path = directory / META
    datalad.check_content(directory, [path])
    if not path.is_file():
        do = elsewhere if any(directory.iterdir()) else again
        raise DataError(f"{directory} is not prepared data (no meta.json)", do=do)
    try:
        content: Any = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read as JSON", str(error), elsewhere) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        version = content.get("format") if isinstance(content, dict) else None
        raise DataError(
            f"{directory} was prepared by another version", f"format {version}, this raylab reads {FORMAT}", elsewhere
        )
    if task is not None and content.get("task") != task:
        raise DataError(
            f"{directory} was prepared for '{content.get('task')}', not for '{task}'",
            "a model runs only on data of its own task",
            elsewhere,
        )
    parse_document(content, Contents, path, elsewhere)
    meta = parse_document(content, kind, path, elsewhere)
    datalad.check_content(directory, [directory / name for name in meta.files])
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
    """Return the scopes within which an identifier of a prepared directory means one person.

    Pooled directories have several. Each synthetic data set is a scope of its own. Data prepared before this was
    recorded has the scope of its source.
    """
    if meta.numbering:
        return meta.numbering
    if meta.synthetic:
        return [" ".join(word for word in ("synthetic", meta.domain, f"seed {meta.seed}") if word)]
    return meta.source.split("+")
