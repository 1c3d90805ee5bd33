"""run.json: the identity of a run, its MLflow run, and its progress."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from raylab.data.datalad import DatasetState
from raylab.documents import Document, read_document

FILE = "run.json"
Kind = Literal["train", "transfer", "tune", "trial", "evaluate", "benchmark", "simulate", "fit", "federate"]
"""The verb that created a run; a trial belongs to a search."""
RESUMABLE: tuple[Kind, ...] = ("train", "transfer", "tune")
"""What `raylab resume` continues."""


class Registration(BaseModel):
    """How the best model of a search is registered in MLflow's model registry."""

    model_config = ConfigDict(frozen=True)

    name: str
    score: float | None
    """the objective; none if val has only one class"""
    loss: float


class RunRecord(Document):
    """The record of a run; jobs write it when the run is created and update it as it proceeds."""

    name: str
    run_id: str | None = None
    """id of the MLflow run; none until MLflow has it"""
    uri: str
    """URI of the MLflow server or store, without credentials"""
    experiment: str
    kind: Kind
    task: str
    """the task; for a sweep or a view of the lung model, what it computes"""
    data: str
    """the prepared directory; for a sweep or a fit, its output"""
    data_hash: str | None = None
    split_hash: str | None = None
    datalad: DatasetState | None = None
    """the DataLad dataset in which the prepared directory is"""
    annex_keys: dict[str, str] = Field({})
    """git-annex key of each annexed file of the prepared directory, by path in the dataset"""
    synthetic: bool
    parent: str | None = None
    """name of the run whose weights this one starts from, or whose model it scores"""
    parent_directory: str | None = None
    tags: dict[str, str] = Field({})
    cluster: str | None = None
    """name of the Slurm cluster on which it runs"""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"] | None = None
    error: str | None = None
    """why it did not finish"""
    do: str | None = None
    """what to do about it, where the error says so"""
    number: int | None = None
    """number of a trial"""

    steps: int | None = None
    best_step: int = 0
    """last step of the best epoch, whose model is saved"""
    weights_sha256: str | None = None
    charts: str | None = None
    """of a search: the part of an address that opens the charts of its trials in MLflow"""
    model_logged: bool | None = None
    """false if the model waits for `raylab sync`"""
    input_shape: tuple[int, ...] = ()
    register_as: Registration | None = Field(None, alias="register")
    registered: str | None = None
    """NAME/VERSION in MLflow's model registry"""
    best_version: int | None = None
    """version that the alias `best` names"""

    cost: str | None = None
    """what it has cost, once MLflow's outbox has it"""

    test_reads: int = 0
    """how often the test split of its own data was read"""
    test_reads_elsewhere: dict[str, int] = Field({})
    """how often that of other data was read, by data hash"""


def read_run_record(directory: Path) -> RunRecord:
    """Read the record of the run in `directory`; DataError names the missing or invalid field."""
    return read_document(directory / FILE, RunRecord, "restore the file, or remove the run's directory")
