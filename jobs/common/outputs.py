"""Files that a verb writes where the user says: an earlier one of the same kind is replaced, nothing else is."""

import json
from pathlib import Path

import polars as pl

from raylab.errors import DataError

OWNED = ("meta.json", "run.json", "sweep.json")  # what a prepared directory, a run and a sweep have


def check(path: Path, option: str, kind: str) -> None:
    """DataError unless `path` may be written: absent, or an earlier "result", "report" or "predictions"."""
    if path.is_dir():
        raise DataError(f"{option} {path} is a directory", do="give a file name")
    if owned := next((name for name in OWNED if (path.parent / name).is_file()), None):
        raise DataError(
            f"{option} {path} would lie in a directory that raylab keeps",
            f"it has a {owned}, and is data or a run",
            "give a place outside it",
        )
    if path.exists() and not KINDS[kind](path):
        raise DataError(
            f"{option} {path} exists and holds no {kind} of raylab",
            "only an earlier file of its kind is replaced",
            "give another name, or remove that file yourself",
        )


def _is_result(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<title>raylab report" in file.read(1000)


def _are_predictions(path: Path) -> bool:
    try:
        columns = pl.read_parquet_schema(path)
    except (OSError, pl.exceptions.PolarsError):
        return False
    return {"id", "source"} <= columns.keys() and any(name.startswith("p_") for name in columns)


KINDS = {"result": _is_result, "report": _is_report, "predictions": _are_predictions}
