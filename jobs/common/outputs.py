"""Checks of output paths that the user gives, before any work: they can be written, and only an earlier file of the
same kind is replaced."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl

from raylab.errors import DataError
from raylab.files import parse_json
from raylab.storage import check_writable, explain_storage_error

OWNED = ("meta.json", "run.json", "sweep.json")  # mark a prepared directory, a run and a sweep


def check(path: Path, option: str, kind: str) -> None:
    """Raise DataError unless `path` is absent or an earlier file of `kind`, one of KINDS. Raise DataError or RunError
    unless it can be written."""
    check_directory(path.parent, option)
    if path.is_dir():
        raise DataError(f"{option} {path} is a directory", do="give a file name")
    if path.exists() and not path.is_file():
        raise DataError(f"{option} {path} is not a plain file", "it is a pipe, socket or device", "give a file name")
    if owned := next((name for name in OWNED if (path.parent / name).is_file()), None):
        raise DataError(
            f"{option} {path} is inside a directory that raylab manages",
            f"it contains {owned}, so it is prepared data, a run or a sweep",
            "choose a path outside it",
        )
    if path.exists() and not KINDS[kind](path):
        raise DataError(
            f"{option} {path} exists and is not a {kind} file of raylab",
            "only an earlier file of the same kind is replaced",
            "give another name, or remove that file yourself",
        )


def check_directory(path: Path, option: str) -> None:
    """Raise DataError or RunError unless files can be written into the directory `path`, which need not exist."""
    try:
        check_writable(path / "file")
    except OSError as error:
        raise explain_storage_error(error, f"{option} {path}") or DataError(
            f"{option} {path} cannot be written", error.strerror or "", "give another path"
        ) from error


def _is_result(path: Path) -> bool:
    try:
        return isinstance(parse_json(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def is_report(path: Path) -> bool:
    """Whether the file is a report of `raylab compare`."""
    with path.open("rb") as file:
        return b"<title>raylab report" in file.read(1000)


def _are_predictions(path: Path) -> bool:
    try:
        columns = pl.read_parquet_schema(path)
    except (OSError, pl.exceptions.PolarsError):
        return False
    return {"id", "source"} <= columns.keys() and any(name.startswith("p_") for name in columns)


def _starts_with(member: str) -> Callable[[Path], bool]:
    """Return the check whether a file is a zip archive whose first member has this name."""

    def is_archive(path: Path) -> bool:
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.namelist()[:1] == [member]
        except (OSError, zipfile.BadZipFile):
            return False

    return is_archive


KINDS = {
    "result": _is_result,
    "report": is_report,
    "predictions": _are_predictions,
    "bundle": _starts_with("bundle.json"),
    "crate": _starts_with("ro-crate-metadata.json"),
}
