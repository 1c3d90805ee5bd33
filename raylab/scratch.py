"""A private, short directory for the files of one Ray.

Ray makes its session directories world-writable (0777), including the one that it is given. It therefore gets a
directory inside one that mkdtemp creates with mode 0700: no other user can reach anything below it or create it first.
The directory is locked while its owner lives, so the next start removes what a `kill -9` left behind.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from raylab.errors import UsageError

SOCKET_BYTES = 107  # the longest path of a Unix socket, from Linux's sockaddr_un
# Bytes added to a parent directory: /rlab-XXXXXXXX/r/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store
RAY_BYTES = 80
PREFIX = "rlab-"
LOCK = "lock"
REMOVE_SECONDS = 5.0  # Ray's last processes may still write
LOG_BYTES = 20_000_000


class Scratch:
    """A private directory in the first suitable one of `parents`; removed when closed.

    `path` has mode 0700, `ray` is the directory inside it for Ray (`_temp_dir`, `--temp-dir`). Raises UsageError,
    with the reason for each of `parents`, if none is suitable.
    """

    def __init__(self, parents: Iterable[str | Path]) -> None:
        refusals: list[str] = []
        for parent in dict.fromkeys(Path(parent).absolute() for parent in parents):
            try:
                check_parent(parent)
                remove_stale(parent)
                self.path, self.lock = _create(parent)
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror or error}")
                continue
            self.ray = self.path / "r"
            return
        raise UsageError(
            "there is no directory for Ray's temporary files",
            "; ".join(refusals),
            f"export TMPDIR=DIRECTORY, node-local, at most {SOCKET_BYTES - RAY_BYTES} bytes long, writable by you only",
        )

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory; if Ray's last processes write for more than REMOVE_SECONDS, the next start removes
        it."""
        deadline = time.monotonic() + REMOVE_SECONDS
        while self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        os.close(self.lock)

    def keep_logs(self, directory: Path) -> None:
        """Copy the newest of Ray's log files to `directory`, up to LOG_BYTES in all."""
        files = [path for path in self.ray.glob("session_2*/logs/*") if path.is_file()]
        left = LOG_BYTES
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in sorted(files, key=lambda p: -p.stat().st_mtime):
            size = path.stat().st_size
            if size == 0 or size > left:
                continue
            left -= size
            shutil.copyfile(path, directory / path.name)


def default_parents() -> list[str]:
    """Candidate directories for the files of a local Ray, the user's choice first."""
    chosen = [os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")]
    return [path for path in (*chosen, "/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm") if path]


def check_parent(parent: Path) -> None:
    """Raise OSError, with the reason, if Ray's sockets would not fit or others could replace our directory."""
    if len(os.fsencode(parent)) + RAY_BYTES > SOCKET_BYTES:
        raise OSError(f"longer than {SOCKET_BYTES - RAY_BYTES} bytes, too long for the sockets below it")
    mode = parent.stat().st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        raise OSError("others can rename its contents (it is writable for them and has no sticky bit)")


def remove_stale(parent: Path) -> None:
    """Remove this user's directories in `parent` whose owner process has died."""
    with os.scandir(parent) as entries:
        ours = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(PREFIX)
            and entry.is_dir(follow_symlinks=False)
            and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
        ]
    for path in ours:
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # not created by raylab, or another process is removing it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its owner is alive
            pass
        finally:
            os.close(lock)


def _create(parent: Path) -> tuple[Path, int]:
    """A new directory in `parent` and its held lock. It is locked before it gets the name that `remove_stale`
    recognises."""
    work = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = None
    try:
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = work.with_name(work.name.removeprefix("."))
        work.rename(path)
    except BaseException:
        if lock is not None:
            os.close(lock)
        with contextlib.suppress(OSError):
            shutil.rmtree(work)
        raise
    return path, lock
