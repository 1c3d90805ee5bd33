"""A memory cgroup for tests that run out of memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VERSIONS = {Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes", Path("/sys/fs/cgroup"): "memory.max"}


class Cgroup:
    def __init__(self, path: Path, limit_file: str) -> None:
        self.path, self.limit_file = path, limit_file

    def join(self) -> None:
        """Move this process here."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int) -> None:
        (self.path / self.limit_file).write_text(str(size))

    def used_bytes(self) -> int:
        name = "memory.usage_in_bytes" if "limit" in self.limit_file else "memory.current"
        return int((self.path / name).read_text())


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
            path.rmdir()
    pytest.skip("no memory cgroup can be made here")
