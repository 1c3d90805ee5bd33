"""The prepared directory: checked files plus `meta.json`, published in one rename.

meta.json holds what the preparer says (task, source, label, attrition, ...) and, added here, the format
version, SHA-256 of every file and `data_hash` over them. A directory whose files no longer match is refused.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylab.errors import DataError

FORMAT = 2


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def split_hash(pairs: list[tuple[str, str]]) -> str:
    """SHA-256 over the sorted (group, split) pairs: equal exactly when the same patients are in the same splits."""
    text = "\n".join(sorted(f"{group}\t{split}" for group, split in set(pairs)))
    return hashlib.sha256(text.encode()).hexdigest()


def publish(out: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `write` fill a directory beside `out` and return its meta, add the hashes, and rename it to `out`.

    When `write` raises, nothing is left behind. An `out` that is an earlier prepared directory is replaced;
    anything else that is not empty is refused with DataError.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file, not a directory", do="give --out another path")
    if out.is_dir() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise DataError(f"{out} is not empty and holds no prepared data", do="give --out a new or empty directory")
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
        meta = {"format": FORMAT, **meta, "files": files, "data_hash": digest}
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        for path in [*work.rglob("*"), work]:  # patient data: readable by its owner alone
            path.chmod(0o700 if path.is_dir() else 0o600)
        if out.exists():
            old = work.with_name(work.name + ".old")
            out.rename(old)
            work.rename(out)
            shutil.rmtree(old)
        else:
            work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return meta


def read_meta(directory: Path, task: str) -> dict[str, Any]:
    """The checked meta.json of a prepared directory.

    Raises DataError when the directory or a file is missing, was prepared for another task or by another format
    version, or when a file no longer has its recorded hash.
    """
    directory = Path(directory)
    again = f"raylab prepare {task} ... --out {directory}"
    if not directory.is_dir():
        raise DataError(f"no data directory at {directory}", do=again)
    path = directory / "meta.json"
    if not path.is_file():
        raise DataError(f"{directory} holds no prepared data (no meta.json)", do=again)
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not readable as JSON", str(error), again) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise DataError(
            f"{directory} was prepared by another version", f"format {found}, this raylab reads {FORMAT}", again
        )
    if meta.get("task") != task:
        raise DataError(
            f"{directory} was prepared for '{meta.get('task')}', not for '{task}'",
            "a model runs only on data of its own task",
            again,
        )
    for name, recorded in meta["files"].items():
        file = directory / name
        if not file.is_file():
            raise DataError(f"{file} is missing", "meta.json lists it", again)
        if sha256(file) != recorded:
            raise DataError(
                f"{file} has changed since it was prepared", "its SHA-256 no longer matches meta.json", again
            )
    return meta
