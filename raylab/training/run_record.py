"""run.json: what a run is, where MLflow has it, and how far it has come."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raylab.documents import Document, read_document

FILE = "run.json"
Kind = Literal["train", "transfer", "tune", "trial", "evaluate", "benchmark", "simulate", "fit"]
"""The verb that made a run; a trial is one of a search."""


class Registration(BaseModel):
    """How the winner of a search enters MLflow's model registry."""

    model_config = ConfigDict(frozen=True)

    name: str
    score: float | None
    """the objective; none where val has one class only"""
    loss: float


class RunRecord(Document):
    """Written by jobs when the run is created, and changed as it goes on."""

    name: str
    run_id: str
    """in MLflow"""
    uri: str
    """of the MLflow server or store, without credentials"""
    experiment: str
    kind: Kind
    task: str
    """of a sweep or a view of the lung model, what it computes"""
    data: str
    """the prepared directory; of a sweep or a fit, what it writes"""
    data_hash: str | None = None
    split_hash: str | None = None
    synthetic: bool
    parent: str | None = None
    """name of the run whose weights this one starts from, or whose model it scores"""
    parent_directory: str | None = None
    tags: dict[str, str] = Field({})
    cluster: str | None = None
    """name of the Slurm cluster that it runs on"""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] | None = None
    number: int | None = None
    """of a trial"""

    steps: int | None = None
    best_step: int = 0
    """last step of the epoch whose model is kept"""
    weights_sha256: str | None = None
    model_logged: bool | None = None
    """false where the model waits for `raylab sync`"""
    input_shape: tuple[int, ...] = ()
    register_as: Registration | None = Field(None, alias="register")
    registered: str | None = None
    """NAME/VERSION in MLflow's model registry"""
    best_version: int | None = None
    """version that the alias `best` names"""

    test_reads: int = 0
    """how often the test split of its own data was read"""
    test_reads_elsewhere: dict[str, int] = Field({})
    """the same of other data, by data hash"""


def read_run_record(directory: Path) -> RunRecord:
    """The record of the run in `directory`; DataError names the field that is missing or wrong."""
    return read_document(directory / FILE, RunRecord, "restore the file, or remove the run's directory")
