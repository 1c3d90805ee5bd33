"""The messages with noise that a site has made: one that resumes sends the same again, never one with other noise.

Two messages with the same values and different noise would spend the budget twice. So a message is written here, as it
will be sent, masks and all, before it is sent; and the last round is noted, so that noise that was drawn and lost, with
the directory of the run for example, is not drawn again.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from raylab.documents import Document, read_document
from raylab.errors import RunError
from raylab.federation.fixed_point import Integers
from raylab.federation.rounds import KINDS, Kind, Round
from raylab.files import atomic_write, write_json

LAST = "last.json"


class LastRound(Document):
    """The last round for which noise was drawn."""

    kind: Kind
    number: int


class Journal:
    """A directory beside a site's key, for one agreement."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def keep(self, round: Round, make: Callable[[], Integers]) -> Integers:
        """Return the message of `round`: the one that was kept, else a new one of `make`, which is kept first. Raises
        RunError if there was one that is lost."""
        path = self.directory / f"{round}.msg"
        if path.is_file():
            return np.frombuffer(path.read_bytes(), dtype="<i8").astype(np.int64)
        if (last := self._read_last()) is not None and round.order <= last.order:
            raise RunError(
                f"the noise of round {round} was drawn before, and the message with it is no longer in "
                f"{self.directory}",
                "another message with other noise would spend the privacy budget twice",
                "restore the run and that directory, or make a new agreement, whose budget adds to this one's",
            )
        message = make()
        with atomic_write(path) as beside:
            beside.write_bytes(message.astype("<i8").tobytes())
        write_json(self.directory / LAST, {"kind": round.kind, "number": round.number})
        return message

    def forget(self, step: int) -> None:
        """Remove the messages of steps and validations before `step`, which no site needs again."""
        for path in self.directory.glob("*.msg"):
            number, _, kind = path.stem.partition("-")
            if kind in ("step", "validation") and int(number) < step:
                path.unlink()

    def _read_last(self) -> Round | None:
        path = self.directory / LAST
        if not path.exists():
            return None
        found = read_document(path, LastRound, "restore it, or make a new agreement")
        assert found.kind in KINDS
        return Round(found.kind, found.number)
