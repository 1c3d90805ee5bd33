"""A score with its interval: how it is computed is in raylab/evaluation, how it reads is here."""

from collections.abc import Iterator

from raylab.documents import Document


class Score(Document):
    """`value` is None where the score is undefined on the data, `low` and `high` where there is no interval; `why` then
    gives the reason."""

    value: float | None
    low: float | None
    high: float | None
    """ends of the 95% interval"""
    undefined: int | None = None
    """resamples in which the score does not exist"""
    why: str | None = None
    note: str | None = None
    """what the value is of, where that is not all of the data"""
    n: list[int] | None = None
    """rows of each class that are told apart"""

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 3, sign: str = "-") -> str:
        """`0.812 [0.760, 0.861]`, with more digits where its ends would look the same; or why there is no interval:
        `0.812 (too few: ...)`. `sign`: as in a format specification, "+" for differences."""
        if self.value is None:
            return f"undefined: {self.why or ''}"
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.{digits}f}{'' if self.why is None else f' ({self.why})'}"
        low, high = self.low, self.high
        digits = next((d for d in range(digits, 6) if f"{low:.{d}f}" != f"{high:.{d}f}"), 6)
        return f"{self.value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    def ends(self) -> Iterator[tuple[str, float]]:
        """("", value), ("_low", low), ("_high", high), as far as they are there: the endings of names in MLflow."""
        for ending, end in (("", self.value), ("_low", self.low), ("_high", self.high)):
            if end is not None:
                yield ending, end


class NetBenefit(Document):
    """A point of a decision curve: per row, of acting on whom the model names and of acting on everybody."""

    threshold: float
    model: Score
    everybody: float


def undefined(why: str) -> Score:
    """The score that does not exist on the data, because of `why`."""
    return Score(value=None, low=None, high=None, why=why)


def without_interval(value: float, why: str) -> Score:
    """The score without an interval, because of `why`."""
    return Score(value=value, low=None, high=None, why=why)
