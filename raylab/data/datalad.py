"""DataLad datasets, by git alone: which dataset and commit a directory belongs to, its annexed files, what is not here.

A DataLad dataset is a git repository with `.datalad/config`. git-annex keeps large files outside git: what git has is a
link to `.git/annex/objects/.../KEY`, or, for an unlocked file, a pointer `/annex/objects/KEY`. The key has the size and
the SHA-256 or MD5 of the content. In a clone, content is absent until `datalad get` fetches it.
"""

import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from raylab.documents import Document
from raylab.errors import DataError

POINTER = b"/annex/objects/"
POINTER_BYTES = 32768  # git-annex takes no larger file for a pointer


class DatasetState(Document):
    """The state of a DataLad dataset, as far as a directory or file in it goes."""

    id: str
    commit: str
    """the commit that is checked out; empty before the first one"""
    path: str
    """the directory or file, relative to the dataset"""
    is_dirty: bool
    """whether anything at the path differs from the commit"""
    annexed: int
    """number of annexed files at the path"""
    keys_sha256: str
    """over the sorted lines `path TAB key` of all annexed files at the path"""


def find_root(path: Path) -> Path | None:
    """Return the DataLad dataset in which `path` is, or will be; None if there is none."""
    path = path.absolute()
    for directory in (path, *path.parents):
        if (directory / ".git").exists():
            return directory if (directory / ".datalad" / "config").is_file() else None
    return None


def read_state(path: Path) -> DatasetState | None:
    """Return the state of the dataset in which `path` is; None if it is in none. Raises DataError if git fails."""
    root = find_root(path)
    if root is None:
        return None
    place = str(path.absolute().relative_to(root))
    id = _git(root, "config", "--file", ".datalad/config", "datalad.dataset.id").strip()
    has_commit = bool(_git(root, "rev-list", "--max-count=1", "--all").strip())
    keys = read_keys(path)
    lines = "".join(f"{name}\t{key}\n" for name, key in sorted(keys.items()))
    return DatasetState(
        id=id,
        commit=_git(root, "rev-parse", "HEAD").strip() if has_commit else "",
        path=place,
        is_dirty=bool(_git(root, "status", "--porcelain", "--", place)),
        annexed=len(keys),
        keys_sha256=hashlib.sha256(lines.encode()).hexdigest(),
    )


def read_keys(path: Path) -> dict[str, str]:
    """Return {path relative to the dataset: annex key} of the annexed files at `path`, as git has them."""
    root = find_root(path)
    if root is None:
        return {}
    listed = _git(root, "ls-files", "--stage", "-z", "--", str(path.absolute().relative_to(root)))
    blobs: dict[str, str] = {}
    for line in filter(None, listed.split("\0")):
        facts, _, name = line.partition("\t")
        blobs[name] = facts.split()[1]
    sizes = _git(root, "cat-file", "--batch-check=%(objectsize)", input="".join(f"{b}\n" for b in blobs.values()))
    small = {
        name: blob
        for (name, blob), size in zip(blobs.items(), sizes.split("\n"), strict=False)
        if size.isdigit() and int(size) <= POINTER_BYTES
    }
    keys = {}
    for (name, _), content in zip(small.items(), _read_blobs(root, small.values()), strict=True):
        first = content.partition(b"\n")[0]
        if b"annex/objects/" in first:
            keys[name] = first.rpartition(b"/")[2].decode(errors="surrogateescape")
    return keys


def _read_blobs(root: Path, blobs: Iterable[str]) -> list[bytes]:
    """Return the content of git's objects, by one process."""
    asked = list(blobs)
    done = _run(root, ["cat-file", "--batch"], "".join(f"{blob}\n" for blob in asked))
    found, at = [], 0
    for _ in asked:
        end = done.index(b"\n", at)
        size = int(done[at:end].split()[2])
        found.append(done[end + 1 : end + 1 + size])
        at = end + 1 + size + 1
    return found


def is_absent(path: Path) -> bool:
    """Whether `path` is an annexed file whose content is not here."""
    if path.is_symlink() and not path.exists():
        return "annex/objects/" in str(path.readlink())
    if not path.is_file() or path.stat().st_size > POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def list_files(path: Path) -> Iterator[Path]:
    """Yield `path`, or the files below it but those of git."""
    if not path.is_dir():
        yield path
    for directory, names, files in os.walk(path):
        names[:] = [name for name in names if name != ".git"]
        yield from (Path(directory) / name for name in files)


def check_content(path: Path, files: Iterable[Path] | None = None) -> None:
    """Raise DataError, with the command that fetches it, if content of annexed `files` is not here; by default of all
    files at `path` if that is in a DataLad dataset."""
    if files is None:
        if find_root(path) is None:
            return
        files = list_files(path)
    absent = [file for file in files if is_absent(file)]
    if absent:
        raise DataError(
            f"the content of {len(absent)} annexed file{'s' if len(absent) > 1 else ''} of {path} is not here",
            f"git-annex has only the name of {absent[0].name}",
            f"datalad get {shlex.quote(str(path))}",
        )


def fetch_content(path: Path) -> None:
    """Fetch the annexed content at `path` by git-annex; DataError with its message if it cannot."""
    root = find_root(path)
    if root is not None:
        _git(root, "annex", "get", "--quiet", "--", str(path.absolute().relative_to(root)))


def _git(root: Path, *words: str, input: str = "") -> str:
    return _run(root, list(words), input).decode(errors="surrogateescape")


def _run(root: Path, words: list[str], input: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], input=input.encode(), capture_output=True)
    except OSError as error:
        raise DataError(f"{root} is a DataLad dataset, and git cannot be run", str(error), "install git") from error
    if done.returncode:
        why = (done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()).split("\n")
        raise DataError(f"git {words[0]} failed in the DataLad dataset {root}", why[-1])
    return done.stdout
