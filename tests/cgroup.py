"""A memory cgroup for tests that run out of memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.wait import wait_for

VERSIONS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}


class Cgroup:
    def __init__(self, path: Path, limit_file: str) -> None:
        self.path, self.limit_file = path, limit_file

    def join(self) -> None:
        """Move this process here."""
        self.take(os.getpid())

    def take(self, pid: int) -> None:
        """Move a process here; those that it starts from now on are here as well."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def find_own(self, pid: int) -> Path:
        """The cgroup that a process is in now."""
        controller = "memory" if self.path.parent.name == "memory" else ""
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
        path = next(path for _, controllers, path in lines if controllers == controller)
        return self.path.parent / path.lstrip("/")

    def limit(self, size: int) -> None:
        (self.path / self.limit_file).write_text(str(size))


def is_empty(path: Path) -> bool:
    return not (path / "cgroup.procs").read_text()


@contextmanager
def memory_cgroup(name: str) -> Iterator[Cgroup]:
    """A cgroup, which is empty again at the end; the test is skipped where none can be made."""
    for root, limit_file in VERSIONS.items():
        path = root / f"raylab-{name}-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        try:
            if (path / limit_file).exists():
                yield Cgroup(path, limit_file)
                return
        finally:
            wait_for(partial(is_empty, path), 60, "the end of all processes there")
            path.rmdir()
    pytest.skip("no memory cgroup can be made here")
