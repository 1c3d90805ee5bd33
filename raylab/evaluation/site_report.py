"""What a site tells of a model on its patients: aggregates alone, in a schema that has no place for rows.

Every field is a number, a fixed word, or a table of numbers by a name from a closed list, that of the model's inputs,
of its classes or of scores: there is no list, no free text, and no identifier. Counts below LIMIT are not told.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raylab.data.icu.prepare import FRACTIONS
from raylab.documents import describe_problems
from raylab.errors import DataError

LIMIT = 10  # of patients, stays or values: what rests on fewer is not told
SCORE = re.compile(r"[a-z][a-z0-9_@.%]{0,39}")
MOST_SCORES = 64  # beside those of each class
CLASS_SCORES = 4  # of a class
Count = int | Literal["<10"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Interval(Part):
    """A score with its 95% interval over patients; none: undefined, or too few for one."""

    value: float | None
    low: float | None
    high: float | None


class Recalibration(Part):
    """Intercept and slope fitted on some patients of the site, and scores of the others before and after."""

    patients: Count
    intercept: float
    slope: float
    before: dict[str, Interval]
    after: dict[str, Interval]


class SiteReport(Part):
    """The scores of a bundle at a site."""

    format: Literal[2]
    bundle: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its bundle.json"""
    task: str
    synthetic: bool
    split: str
    rows: Count
    patients: Count
    classes: dict[str, Count]
    """class -> rows"""
    scores: dict[str, Interval]
    """score, or score/class -> its value"""
    coverage: dict[str, float | None]
    """input -> fraction of rows with a value; none: below LIMIT rows; empty where no row can lack one"""
    shift: dict[str, float | None]
    """input -> (mean here - mean in training) / standard deviation in training; none: below LIMIT patients"""
    recalibration: Recalibration | None

    @field_validator("split")
    @classmethod
    def _is_split(cls, split: str) -> str:
        if split not in (*FRACTIONS, "all"):
            raise ValueError("not the name of a split")
        return split


def tell_count(count: int) -> Count:
    """A count that may leave a site."""
    return count if count == 0 or count >= LIMIT else "<10"


def find_few(rows: int, patients: int, classes: Mapping[str, int]) -> list[str]:
    """What of a split is too few for scores that may leave a site, in words: its patients, a class or what is not in
    it. Rows of a class that has none tell nothing of anybody, but scores need two classes."""
    few = [f"{patients} patients"] if patients < LIMIT else []
    few += [f"{n} rows of class {name}" for name, n in classes.items() if 0 < n < LIMIT]
    few += [f"{rows - n} rows of other classes than {name}" for name, n in classes.items() if 0 < rows - n < LIMIT]
    return few + ["rows of one class alone"] * (len(classes) > 1 and sum(n > 0 for n in classes.values()) < 2)


def check_report(
    content: Mapping[str, Any], concepts: Collection[str], classes: Collection[str], task: str, bundle: str
) -> SiteReport:
    """Return the report in a JSON document. Raises DataError if it has a field or a name that is not in the schema, or
    is not about this `bundle` (its hash) of this `task` with the inputs `concepts` and the outputs `classes`."""
    try:
        report = SiteReport.model_validate(content)
    except ValidationError as error:
        raise DataError("this is not a report that may leave a site", describe_problems(error)) from error
    again = report.recalibration
    scores = [report.scores, *([again.before, again.after] if again else [])]
    wrong = [name for table in (report.coverage, report.shift) for name in table if name not in concepts]
    wrong += [name for name in report.classes if name not in classes]
    wrong += [name for table in scores for name in table if not _is_score(name, classes)]
    most = MOST_SCORES + CLASS_SCORES * len(classes)
    wrong += [f"{len(table)} scores" for table in scores if len(table) > most]
    wrong += ["task"] * (report.task != task) + ["bundle"] * (report.bundle != bundle)
    if wrong:
        raise DataError("this is not a report that may leave a site", f"unexpected: {', '.join(wrong)[:300]}")
    return report


def _is_score(name: str, classes: Collection[str]) -> bool:
    """Whether this is the name of a score, or of a score of one of the classes."""
    score, slash, of = name.partition("/")
    return SCORE.fullmatch(score) is not None and (not slash or of in classes)
