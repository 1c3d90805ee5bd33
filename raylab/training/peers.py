"""How the processes of a run find one another: a fixed group here; in raylab.distributed one whose members change."""

from typing import Protocol

from raylab.errors import RunError
from raylab.training.process_group import ProcessGroup


class Peers(Protocol):
    """The processes that may train a run, as one of them sees them. None of these calls is a collective."""

    def form_group(self, position: int) -> tuple[ProcessGroup, int | None]:
        """The next process group with this process in it, as soon as every member has called this.

        `position` says how far this process's state is. Also returns the rank whose state the members go on from, None
        where all are equally far. Raises RunError when no group forms.
        """

    def must_regroup(self) -> bool:
        """Whether this process knows that a member joins or leaves, for which the next step boundary is due."""

    def is_leaving(self) -> bool:
        """Whether this process itself must hand over at the next step boundary."""


class FixedPeers:
    """This process alone, or all ranks of the initialised torch.distributed group: whoever is lost ends the run."""

    def __init__(self) -> None:
        self.has_formed = False

    def form_group(self, position: int) -> tuple[ProcessGroup, int | None]:
        if self.has_formed:
            raise RunError("a worker of this run was lost", "its group has a fixed number of members")
        self.has_formed = True
        return ProcessGroup(), None

    def must_regroup(self) -> bool:
        return False

    def is_leaving(self) -> bool:
        return False
