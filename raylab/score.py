"""A score with its interval: the type and its text form (raylab/evaluation computes it)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

from raylab.documents import Document


class Score(Document):
    """A score with its 95% interval.

    `value` is None if the score is undefined on the data; `low` and `high` are None if there is no interval; `why`
    then gives the reason.
    """

    value: float | None
    low: float | None
    high: float | None
    """ends of the 95% interval"""
    undefined: int | None = None
    """number of resamples in which the score is undefined"""
    why: str | None = None
    note: str | None = None
    """what the value covers, if not all of the data"""
    n: list[int] | None = None
    """rows of each of the compared classes"""

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 3, sign: str = "-") -> str:
        """Format the score as `0.812 [0.760, 0.861]`, with more digits if the ends would look the same, or with the
        reason why there is no interval: `0.812 (too few: ...)`. `sign` is that of a format specification: "+" for
        differences."""
        if self.value is None:
            return f"undefined: {self.why or ''}"
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.{digits}f}{'' if self.why is None else f' ({self.why})'}"
        low, high = self.low, self.high
        digits = next((d for d in range(digits, 6) if f"{low:.{d}f}" != f"{high:.{d}f}"), 6)
        return f"{self.value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    def shorten(self) -> "Score":
        """The score with the first words of the reason why it has no interval: "too few"."""
        return self if self.why is None else self.model_copy(update={"why": self.why.partition(":")[0]})

    def ends(self) -> Iterator[tuple[str, float]]:
        """Yield ("", value), ("_low", low), ("_high", high) for those not None: suffixes of MLflow names."""
        for ending, end in (("", self.value), ("_low", self.low), ("_high", self.high)):
            if end is not None:
                yield ending, end


K = TypeVar("K")


def fold_reasons(scores: Mapping[K, Score]) -> tuple[dict[K, str], list[str]]:
    """The text of each score, and reasons for missing intervals that several of them give: these texts have only the
    first words of it."""
    times = Counter(score.why for score in scores.values() if score.why is not None and ":" in score.why)
    shared = [why for why, n in times.items() if n > 1]
    return {name: str(score.shorten() if score.why in shared else score) for name, score in scores.items()}, shared


class NetBenefit(Document):
    """A point of a decision curve: net benefit per row of treating by the model, and of treating everybody."""

    threshold: float
    model: Score
    everybody: float


def undefined(why: str) -> Score:
    """Return a score that is undefined on the data, for the reason `why`."""
    return Score(value=None, low=None, high=None, why=why)


def without_interval(value: float, why: str) -> Score:
    """Return a score without an interval, for the reason `why`."""
    return Score(value=value, low=None, high=None, why=why)
