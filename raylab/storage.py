"""Storage that is full, read-only or not ours: checked before work begins, and explained when it fails later."""

import errno
import os
import tempfile
from pathlib import Path

from raylab.errors import DataError, RaylabError, RunError

ROOM = 1 << 16  # bytes
FREE = "free space, or use another disk; then run the same command again"
OWN = "give a path that you can write to, or use your own RAYLAB_HOME (docs/security.md)"
# errno: what is the matter, and what to do
CAUSES = {
    errno.ENOSPC: ("no space is left on the disk", FREE),
    errno.EDQUOT: ("the disk quota is used up", FREE),
    errno.EROFS: ("the file system is read-only", OWN),
    errno.EACCES: ("permission denied: it belongs to another user, or it is read-only", OWN),
    errno.EPERM: ("permission denied: it belongs to another user, or it is read-only", OWN),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.EISDIR: ("it is a directory", "move the directory away, or give another path"),
    errno.ENOTDIR: ("a part of this path is a file", "move the file away, or give another path"),
    errno.EIO: ("the disk reports an error", "check the disk, or use another one"),
}
OF_NAMES = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR)
OF_INPUT = (errno.EROFS, errno.EACCES, errno.EPERM, *OF_NAMES)
# Libraries that do not raise OSError (safetensors, polars, torch, SQLite) have these words in their messages
WORDS = {
    "No space left on device": errno.ENOSPC,
    "database or disk is full": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "readonly database": errno.EROFS,
    "Permission denied": errno.EACCES,
    "disk I/O error": errno.EIO,
}


def check_writable(path: Path, room: int = ROOM) -> None:
    """Raise OSError, as a later write would, unless a file of `room` bytes can be written to `path` now.

    Nothing is left behind. Missing parent directories are not made: the nearest one that exists is tried.
    """
    try:
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(room))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def describe_cause(error: Exception) -> str:
    """Return why storage has refused a write, in the words of `explain_storage_error` if the cause is known."""
    explained = explain_storage_error(error)
    return str(error).splitlines()[0] if explained is None else explained.why


def explain_storage_error(error: BaseException, name: str = "") -> RaylabError | None:
    """Return the error for the user if storage is the cause of `error`, or of the errors that led to it; else None.

    `name` is what the user calls the file; without it, the error has the path of the failed call, if that is known.
    """
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        if number not in CAUSES:
            number = next((number for words, number in WORDS.items() if words in str(link)), None)
        if number is not None:
            path = getattr(link, "filename", None)
            done = "opened" if number in (errno.EACCES, errno.EPERM, *OF_NAMES) else "written"  # reading may be denied
            what = f"{name or path or 'a file'} could not be {done}"
            return (DataError if number in OF_INPUT else RunError)(what, *CAUSES[number])
        link = link.__cause__ or link.__context__
    return None
