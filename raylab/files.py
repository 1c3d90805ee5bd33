"""Small files that several processes read and write concurrently, on file systems shared between nodes."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

UPLOADS = (".rayignore",)
IGNORE_FILES = (".gitignore", *UPLOADS)
UNFINISHED = re.compile(r"\..+\.\d+\.\d+")  # names of files that `atomic_write` has not renamed


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield an empty file next to `path` (mode 0600), which is fsynced and renamed to `path` at the end, or removed.

    A reader sees the old file, the new one, or none. The yielded name has no suffix, so pass an open file to
    `numpy.save`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def is_empty(directory: Path) -> bool:
    """Whether `directory` is missing, or has nothing but what a killed `atomic_write` has left."""
    return not directory.exists() or all(UNFINISHED.fullmatch(path.name) for path in directory.iterdir())


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """SHA-256 of the content of files and of their names below `root`, in this order."""
    import hashlib  # loads OpenSSL, which a witness does not need

    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON to `path`, completely or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, completely or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. ValueError if it is none, or is nested more deeply than Python can read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file that is appended to, without lines truncated by a crash."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(parse_json(line))
    return [line for line in found if isinstance(line, dict)]


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`. Without `wait`, yields False if another process or thread holds it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def is_unlocked(path: Path) -> bool:
    """Whether nobody holds the lock file `path`; False where the file system has no locks, as nobody can know."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def flock(fd: int, how: int) -> bool:
    """Call fcntl.flock, not lockf: the lock belongs to the open file, so it also works between threads of a process.
    Returns False if the file system has no locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # Lustre mounted without -o flock. On one node, an O_APPEND write is still one line.
        log.warning("this file system has no locks: use one writer per run")
        return False
    return True


def keep_out_of_git_and_uploads(directory: Path, names: Iterable[str] = IGNORE_FILES) -> None:
    """Write ignore files into `directory`, so that git ignores it and Ray does not upload it with a job. `names`: of
    these files; in a DataLad dataset, git-annex keeps data out of git, and may have it.

    Existing ignore files and the root of a repository stay unchanged.
    """
    if (directory / ".git").exists():
        return
    for name in names:
        if not (directory / name).exists():
            write_text(directory / name, "# written by raylab: data and results are not committed or uploaded\n*\n")
