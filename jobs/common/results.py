"""The return types of the verbs in Python. `details` holds what `--json` writes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from jobs.common import home
from raylab.documents import Document, read_json
from raylab.errors import DataError
from raylab.score import Score
from raylab.training.run_result import read_result
from tracking.compare import Differences


@dataclass(frozen=True)
class Run:
    """A finished run, or a finished search, which represents its best trial.

    Other functions accept it, its name, its MLflow run id or its directory as `run`.
    """

    name: str
    run_id: str | None
    """id of its MLflow run; none if the server could not be reached since the run began"""
    task: str
    directory: Path
    data: Path
    """the prepared directory on which it was trained"""
    details: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, details: dict[str, Any]) -> "Run":
        """The run that a verb's result describes."""
        places = {name: Path(details[name]) for name in ("directory", "data")}
        return cls(details["name"], details["run_id"], details["task"], **places, details=details)

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """The finished run in `directory`, from its files: `details` has its result and its scores on val."""
        record = home.note(directory)
        scores = directory / "scores" / f"val-{(record.data_hash or '')[:12]}.json"
        facts = {"run_id": record.run_id, "name": directory.name, "directory": str(directory), "task": record.task}
        scored = read_json(scores, dict[str, Any], f"raylab resume {directory.name}")
        more = {"data": record.data, "synthetic": record.synthetic, "split": "val"}
        return cls.of({**read_result(directory), **scored, **facts, **more})

    @property
    def scores(self) -> dict[str, Score]:
        """The scores on the validation split, by name; scores of other cohorts are named COHORT/NAME."""
        return _scores_of(self.details)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run on a split of a prepared directory."""

    run: str
    """name of the run whose model was scored"""
    run_id: str | None
    """id of the MLflow run with the scores: that of `run` on its own data, otherwise a new one; none if the server
    could not be reached since it began"""
    data: Path
    split: str
    test_reads: int
    """how often the run has been scored on the test rows of this data, including this time"""
    details: dict[str, Any] = field(repr=False)

    @property
    def scores(self) -> dict[str, Score]:
        """The scores by name; scores of other cohorts are named COHORT/NAME."""
        return _scores_of(self.details)


@dataclass(frozen=True)
class Predictions:
    """A parquet file with a row for each stay or image: `id`, `source`, the label, and probabilities `p_CLASS`."""

    path: Path
    rows: int
    columns: tuple[str, ...]
    details: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """The tracked runs of an MLflow experiment and their HTML report."""

    experiment: str
    report: Path
    runs: list[dict[str, Any]] = field(repr=False)
    """a dictionary for each run: its name, task, data, scores"""
    differences: list[Differences] = field(default_factory=list)
    """of runs that were named: the scores of each minus those of the first, on the same rows"""

    @property
    def details(self) -> dict[str, Any]:
        of_runs = [one.to_json() for one in self.differences]
        return {"experiment": self.experiment, "report": str(self.report), "runs": self.runs, "differences": of_runs}


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory."""

    directory: Path
    task: str
    details: dict[str, Any] = field(repr=False)
    """its counts, attrition, label and hashes"""


RunReference = Run | str | Path
"""A run: the result of a verb, or a name, MLflow run id or directory."""


def find_run(run: RunReference) -> Path:
    """The directory of a run; UsageError with the nearest names when there is none."""
    return run.directory if isinstance(run, Run) else home.find(str(run))


def check_task(directory: Path, own: str, task: str | None) -> None:
    """Raise DataError if the run in `directory`, of the task `own`, was named with another task."""
    if task not in (None, own):
        do = f"give the task {own}, with data that was prepared for it, or another run: raylab runs --task {task}"
        raise DataError(f"run {directory.name} is of task '{own}', not '{task}'", do=do)


def read_scores(details: Mapping[str, Any]) -> dict[str, Score]:
    """The scores among the entries of a verb's result, or of a file of scores/; without those of other cohorts."""
    return {
        name: Score.model_validate(entry)
        for name, entry in details.items()
        if isinstance(entry, dict) and {"value", "low", "high"} <= entry.keys()
    }


class ScoresFile(Document):
    """scores/SPLIT-DATA.json: scores, which are its other fields, and the rows that they rest on."""

    data: str
    """hash of the data"""
    split: str
    n: int
    patients: int
    classes: dict[str, int]
    confusion: list[list[int]] = Field([])
    """rows by class and prediction, where there are classes"""

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        self.scores()
        return self

    def scores(self) -> dict[str, Score]:
        return read_scores(self.model_extra or {})


def _scores_of(details: dict[str, Any]) -> dict[str, Score]:
    """The scores among the entries of a verb's result."""
    scores = read_scores(details)
    for cohort, entries in details.get("cohorts", {}).items():
        if cohort != details.get("cohort"):
            scores |= {f"{cohort}/{name}": score for name, score in _scores_of(entries).items()}
    return scores
