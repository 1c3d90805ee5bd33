"""What a cluster was asked to be: cluster.json of its directory."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.sites import Site
from raylab.documents import describe_problems
from raylab.errors import SlurmError


class Hooks(BaseModel):
    """Commands of the head. `cluster` knows no runs and no MLflow: whoever asks for a cluster names them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    services: dict[str, list[str]] = {}
    """kept running beside Ray, by name; `{port}` in a command stands for a free port, which head.json then names"""
    requeue: list[str] = []
    """run by a head that Slurm has started again"""
    drain: list[str] = []
    """run before the head leaves its node, within the time that Slurm gives"""


class ClusterSpec(BaseModel):
    """Written by `up`, once, and read by the head and by every node's agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    id: str
    """in the tags of its jobs: a later cluster of the same name has another"""
    site: Site
    types: list[str]
    """node types of the site that workers may have"""
    min: int
    max: int
    """nodes"""
    static: int = 0
    """nodes of one allocation that stays; 0: nodes come and go with the work"""
    time: str
    """limit of each job, as Slurm writes it"""
    home: str
    code: str
    """directory of the checkout, on storage that all nodes share"""
    revision: str
    python: str
    tracking: str = ""
    """address of the tracking server, without credentials; empty: the head serves the home's own"""
    login: bool = False
    """whether credentials of the tracking server lie in the cluster's directory"""
    group: str = ""
    """Unix group that may read the runs of the home"""
    versions: dict[str, str]
    hooks: Hooks = Hooks()
    kill_seconds: int = 30
    """Slurm's KillWait"""
    image_digest: str = ""
    job: str = ""
    """id of the head's job"""


def read_spec(path: Path) -> ClusterSpec:
    """The spec in cluster.json; SlurmError names what is missing or wrong."""
    try:
        document: Any = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SlurmError(
            f"{path} is not there",
            "the cluster's directory is not on storage that this node shares",
            "set RAYLAB_HOME to a directory that login and compute nodes share",
        ) from error
    except ValueError as error:
        raise SlurmError(f"{path} is damaged", str(error), "raylab cluster down, and up again") from error
    try:
        return ClusterSpec.model_validate(document)
    except ValidationError as error:
        raise SlurmError(
            f"{path} does not describe a cluster of this version",
            describe_problems(error),
            "end the cluster with the version that made it",
        ) from error
