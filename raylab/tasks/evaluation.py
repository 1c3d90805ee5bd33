"""What a model's predictions on a split are worth: scores with intervals, and what they must be read with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from raylab.data.prepared import Meta
from raylab.documents import to_plain
from raylab.score import Score

if TYPE_CHECKING:  # as in base.py
    from raylab.data.samples import Samples
    from raylab.tasks.base import Task


@dataclass(frozen=True)
class Cohort:
    """Rows, positive rows and scores of a cohort; `why` it has none."""

    n: int
    positives: int = 0
    scores: Mapping[str, Score] = field(default_factory=dict)
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.why is not None:
            return {"n": self.n, "why": self.why}
        return {"n": self.n, "positives": self.positives, **to_plain(dict(self.scores))}


@dataclass(frozen=True)
class Evaluation:
    """A model on `samples` of a split, p [N] or [N, outputs] its probabilities.

    `tables` are counts beside the scores, `more` is what the task adds to them: scores and other entries of the
    result, by name. `differs` says where the label of the data is not the one that the model learnt. `cohort` is the
    one that the scores are of, `cohorts` has all of the task.
    """

    task: "Task"
    samples: "Samples"
    p: NDArray[Any]
    split: str
    meta: Meta
    parameters: int
    bootstraps: int
    scores: dict[str, Score]
    tables: dict[str, Any] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    cohort: str | None = None
    cohorts: dict[str, Cohort] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    leakage: dict[str, Any] | None = None

    @property
    def n(self) -> int:
        return len(self.samples)

    @property
    def patients(self) -> int:
        return len(np.unique(self.samples.group))

    @property
    def classes(self) -> dict[str, int]:
        """Rows of each class."""
        return self.task.outcome.class_counts(self.samples)

    @property
    def absent(self) -> list[str]:
        """Inputs of the model that the data has never measured."""
        return list(getattr(self.samples, "absent", []))

    def own_scores(self) -> dict[str, Score]:
        """The scores by name, those that the task adds among them."""
        return {**self.scores, **{name: one for name, one in self.more.items() if isinstance(one, Score)}}

    def all_scores(self) -> dict[str, Score]:
        """With those of the other cohorts, as COHORT/SCORE: their names in MLflow."""
        others = {name: cohort for name, cohort in self.cohorts.items() if name != self.cohort}
        return self.own_scores() | {f"{at}/{name}": s for at, of in others.items() for name, s in of.scores.items()}

    def to_json(self) -> dict[str, Any]:
        """The entries of a verb's result."""
        result: dict[str, Any] = {
            **to_plain(self.scores),
            **self.tables,
            "loss": self.task.outcome.log_loss(self.samples.y, self.p),
            "n": self.n,
            "patients": self.patients,
            "unit": self.meta.unit,
            "classes": self.classes,
            "absent": self.absent,
            "differs": self.differs,
            "warnings": self.meta.printable_warnings,
            "bootstraps": self.bootstraps,
        }
        if self.cohort is not None:
            result |= {"cohort": self.cohort, "cohorts": {name: of.to_json() for name, of in self.cohorts.items()}}
        more: dict[str, Any] = to_plain(self.more)
        return result | more
