"""The rounds of a federation, in the order in which all sites go through them."""

from typing import Literal, NamedTuple

Kind = Literal["join", "rows", "statistics", "counts", "start", "validation", "step", "average"]
KINDS: tuple[Kind, ...] = ("join", "rows", "statistics", "counts", "start", "average", "validation", "step")
"""those with the same number, in order: `step` n begins where n steps are done, and `validation` n scores them"""


class Round(NamedTuple):
    """One exchange of messages: of facts that are compared, or of integers that are added up."""

    kind: Kind
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Its place among all rounds."""
        return self.number, KINDS.index(self.kind)

    def __str__(self) -> str:
        return f"{self.number:08d}-{self.kind}"
