"""Small files that other processes read and write at the same time, on file systems that several nodes share."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

IGNORE_FILES = (".gitignore", ".rayignore")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """An empty file beside `path` (0600) to write to; it is fsynced and renamed to `path` at the end, or removed.

    A reader sees the old file, the new one, or none. The name yielded has no suffix: give `numpy.save` an open file.
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


def write_json(path: Path, value: object) -> None:
    """`value` as JSON at `path`, whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    with atomic_write(path) as beside:
        beside.write_text(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file that is appended to; a line cut short by a crash is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`. Without `wait`, yields False when somebody else holds it."""
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


def flock(fd: int, how: int) -> None:
    """fcntl.flock, not lockf: it belongs to the open file, so it also keeps threads of one process apart."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # Lustre mounted without -o flock. One O_APPEND write is still one line on one node.
        log.warning("this file system has no locks: keep to one writer a run")


def keep_out_of_git_and_uploads(directory: Path) -> None:
    """Write ignore files into `directory`: git does not see it, and Ray does not upload it with a job.

    Ignore files that are there, and the root of a repository, stay as they are.
    """
    if (directory / ".git").exists():
        return
    for name in IGNORE_FILES:
        if not (directory / name).exists():
            (directory / name).write_text("# written by raylab: data and results are not committed or uploaded\n*\n")
