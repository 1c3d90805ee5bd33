"""Small stand-ins for Slurm: one in memory, with the methods of cluster.slurm.Slurm, and executables of its names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import client, sites
from cluster.directory import Directory
from cluster.sites import NodeType, Site
from cluster.slurm import Job, Slurm
from cluster.spec import ClusterSpec, Hooks
from raylab.errors import SlurmError, UsageError


class FakeSlurm(Slurm):
    """Jobs in a list. `away`: the controller does not answer; `refusal`: sbatch's words for the next job."""

    def __init__(self) -> None:
        super().__init__()
        self.table: list[Job] = []
        self.cancelled: list[str] = []
        self.submitted: list[Path] = []
        self.away, self.refusal = False, ""
        self.last = 100

    def add(self, comment: object, state: str = "PENDING", **facts: object) -> Job:
        self.last += 1
        found = {"id": str(self.last), "restarts": 0, "left": None, "node": "", "reason": "Priority", **facts}
        job = Job(state=state, comment=str(comment), **found)  # type: ignore[arg-type]
        self.table.append(job)
        return job

    def submit(self, script: Path) -> str:
        self._answer()
        if self.refusal:
            raise UsageError(f"Slurm refused the job {script.name}", self.refusal)
        self.submitted.append(script)
        comment = re.search(r"^#SBATCH --comment=(.*)$", script.read_text(), re.MULTILINE)
        assert comment, "a job of ours that nobody could find again"
        return self.add(comment[1].strip('"')).id

    def jobs(self) -> list[Job]:
        self._answer()
        return list(self.table)

    def cancel(self, ids: list[str]) -> None:  # type: ignore[override]
        self._answer()
        self.cancelled += ids
        self.table = [job for job in self.table if job.id not in ids]

    def config(self) -> dict[str, str]:
        self._answer()
        return {"KillWait": "25 sec"}

    def run(self, command: str, *arguments: str, **options: object) -> str:
        """What other commands answer: that there is nothing."""
        self._answer()
        return ""

    def _answer(self) -> None:
        if self.away:
            raise SlurmError("Slurm does not answer")


@pytest.fixture
def slurm() -> FakeSlurm:
    return FakeSlurm()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(
        name="here",
        shared=str(tmp_path),
        nodes={"cpu": NodeType(cpus=4, memory_mb=4000), "gpu": NodeType(cpus=8, memory_mb=16000, gpus=2, max=3)},
    )


@pytest.fixture
def make_spec(site: Site, tmp_path: Path) -> Callable[..., ClusterSpec]:
    """`client.make_spec` for that site, with what a test wants different."""

    def make(**other: object) -> ClusterSpec:
        return client.make_spec(
            **{
                "site": site, "home": tmp_path, "code": tmp_path / "code", "name": "ray", "low": 0, "high": 4,
                "types": ["cpu", "gpu"], "time": None, "static": None, "revision": "abc", "tracking": "",
                "hooks": Hooks(), "python": "python", **other,
            }
        )  # fmt: skip

    return make


@pytest.fixture
def directory(make_spec: Callable[..., ClusterSpec], tmp_path: Path) -> Directory:
    """A cluster's directory, as `up` makes it."""
    made = Directory(tmp_path / "clusters" / "ray")
    made.create(make_spec())
    return made


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., Path]:
    """A directory with executables of Slurm's names, from shell lines; each notes its arguments in NAME.calls."""

    def make(**scripts: str) -> Path:
        where = tmp_path / "bin"
        where.mkdir(exist_ok=True)
        for name, lines in scripts.items():
            path = where / name
            path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{path}.calls"\n{lines}\n')
            path.chmod(0o755)
        return where

    return make


@pytest.fixture
def own_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a user's own sites.toml."""

    def write(text: str) -> Path:
        path = tmp_path / "own-sites.toml"
        path.write_text(text)
        monkeypatch.setenv("RAYLAB_SITES", str(path))
        return path

    return write


@pytest.fixture(autouse=True)
def nobodys_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYLAB_SITES", str(tmp_path / "none.toml"))
    assert sites.own_file() == tmp_path / "none.toml"
