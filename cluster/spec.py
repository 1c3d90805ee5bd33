"""The specification of a cluster: cluster.json in its directory."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.sites import Site
from raylab.documents import describe_problems
from raylab.errors import SlurmError


class Hooks(BaseModel):
    """Commands that the head runs. `cluster` knows no runs and no MLflow, so the caller provides them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    services: dict[str, list[str]] = {}
    """kept running next to Ray, by name; `{port}` in a command is replaced by a free port, recorded in head.json"""
    requeue: list[str] = []
    """run by a head that Slurm has restarted"""
    drain: list[str] = []
    """run before the head leaves its node, within the time that Slurm allows"""


class ClusterSpec(BaseModel):
    """Written by `up`, once, and read by the head and by every node's agent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    id: str
    """in the tags of its jobs; a later cluster of the same name has another id"""
    site: Site
    types: list[str]
    """node types of the site that workers may have"""
    min: int
    max: int
    """nodes"""
    head_type: str = ""
    """the node type of the head's job where that node works as well; empty: the head has a node of its own"""
    static: int = 0
    """nodes of one fixed allocation; 0: the number of nodes follows the work"""
    time: str
    """time limit of each job, in Slurm's format"""
    home: str
    code: str
    """directory of the checkout, on storage that all nodes share"""
    revision: str
    python: str
    tracking: str = ""
    """address of the tracking server, without credentials; empty: the head serves that of the home"""
    login: bool = False
    """whether the cluster's directory holds credentials of the tracking server"""
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
    """The specification in cluster.json. Raises SlurmError that names what is missing or wrong."""
    try:
        document: Any = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SlurmError(
            f"{path} does not exist",
            "the cluster's directory is not on storage that this node shares",
            "set RAYLAB_HOME to a directory that login and compute nodes share",
        ) from error
    except ValueError as error:
        raise SlurmError(f"{path} is damaged", str(error), "run raylab cluster down, then up again") from error
    try:
        return ClusterSpec.model_validate(document)
    except ValidationError as error:
        raise SlurmError(
            f"{path} does not describe a cluster of this version",
            describe_problems(error),
            "end the cluster with the version that created it",
        ) from error
