"""A cluster's directory on shared storage: the files through which login node, head and workers communicate.

RAYLAB_HOME/clusters/NAME/
  cluster.json     the specification; written once, by `up`
  token            Ray's token of this cluster, 0600
  mlflow-login.json  the login of the tracking server, 0600; only if it needs one
  head.json        address of the current head; written by each head when it is ready
  status.json      Ray's nodes, demand and jobs, every few seconds, by the head
  jobs.jsonl       what Slurm has given to its jobs (bills.py); also that of earlier clusters of this name
  scripts/         every script that was submitted
  logs/            output of jobs and services, and Ray's log files
  problems/        why a node did not start, one file per job
"""

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from cluster.sites import Site
from cluster.spec import ClusterSpec, read_spec
from raylab.documents import Document, read_json
from raylab.errors import UsageError, unknown
from raylab.files import atomic_write, write_json


class Head(Document):
    """head.json"""

    job: str
    generation: int
    node: str
    address: str
    dashboard: str
    ports: dict[str, int]


class Status(Document):
    """status.json"""

    nodes: list[dict[str, Any]]
    demand: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    time: float


class Problem(Document):
    """A file in problems/."""

    job: str
    text: str
    time: float


FILES = {"head": Head, "status": Status}


class Directory:
    """Reads and writes the files above."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.token, self.logs, self.scripts = self.path / "token", self.path / "logs", self.path / "scripts"

    def create(self, spec: ClusterSpec, secrets: Mapping[str, str] = MappingProxyType({})) -> None:
        """Create the directory for a new cluster; logs of an earlier cluster of this name stay.

        `secrets`: {file: text}, written next to the token with mode 0600.
        """
        for directory in (self.path, self.logs, self.scripts, self.path / "problems"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in [
            self.path / "down",
            self.path / "head.json",
            self.path / "status.json",
            self.path / "mlflow-login.json",
            *(self.path / "problems").glob("*.json"),
        ]:
            stale.unlink(missing_ok=True)
        self.token.unlink(missing_ok=True)
        for name, text in {self.token.name: token_hex(32), **secrets}.items():
            with atomic_write(self.path / name) as beside:
                beside.write_text(text)
        self.write_spec(spec)

    def write_spec(self, spec: ClusterSpec) -> None:
        """Write cluster.json."""
        write_json(self.path / "cluster.json", spec.model_dump(mode="json"))

    @property
    def spec(self) -> ClusterSpec:
        return read_spec(self.path / "cluster.json")

    @property
    def site(self) -> Site:
        return self.spec.site

    def read(self, name: str) -> dict[str, Any] | None:
        """The content of head.json or status.json, None if it does not exist. Raises DataError if it is damaged."""
        path = self.path / f"{name}.json"
        if not path.is_file():
            return None
        content: dict[str, Any] = read_json(path, FILES[name], "raylab cluster down, then up again")
        return content

    def problem(self, job: str, text: str) -> None:
        """Record why the node of `job` did not start, for `status` and for the node provider."""
        write_json(self.path / "problems" / f"{job}.json", {"job": job, "text": text, "time": time.time()})

    def problems(self, seconds: float = 600) -> list[dict[str, Any]]:
        """The problems of the last `seconds`, newest first."""
        problems = [read_json(path, Problem, "remove it") for path in (self.path / "problems").glob("*.json")]
        return sorted((p for p in problems if time.time() - p["time"] < seconds), key=lambda p: -p["time"])


def versions() -> dict[str, str]:
    """Versions of Python and packages, which must be the same on all nodes of a cluster."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in ("ray", "torch", "raylab")}}


def find(home: Path, name: str | None) -> Directory:
    """The cluster `name` of this home, or its only one. Raises UsageError that lists the names."""
    known = {path.parent.name: path.parent for path in sorted((home / "clusters").glob("*/cluster.json"))}
    if name is None and len(known) == 1:
        return Directory(next(iter(known.values())))
    if not known:
        raise UsageError(
            f"no cluster in {home}", "none was started from this RAYLAB_HOME", "raylab cluster up --site SITE"
        )
    if name is None:
        raise UsageError("this home has several clusters", do=f"--name one of: {', '.join(known)}")
    if name not in known:
        raise unknown("cluster", name, known)
    return Directory(known[name])
