"""The errors of raylab and their exit codes.

    RaylabError            1  anything below
    ├── UsageError         2  a wrong option, name or recipe field
    ├── DataError          2  input that is missing, corrupt, changed or of another kind
    ├── TrackingError      2  a tracking address that no MLflow server answers
    ├── SlurmError         1  Slurm does not answer, or a cluster on it failed to respond
    └── RunError           1  a run that failed
        ├── OutOfMemoryError 1 a process that the memory did not suffice for
        ├── NonFiniteError 1  a NaN or infinite loss or gradient
        ├── OwnCodeError 1    an error that the code of a plugin raised
        ├── CheckpointError 1 a checkpoint that cannot be written or read
        └── IncompleteError 1 a run that ended before its planned last step

Every error says what happened, why, and what to do next. `jobs` prints it and exits with
`exit_code`; nothing else in the project ends the process.
"""

import difflib
import re
from collections.abc import Iterable


class RaylabError(Exception):
    """`what` happened (with the place), `why`, and `do`: the next command or edit.

    Errors are printed and logged, so credentials of addresses are removed from all three.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = redact(what), redact(why), redact(do)
        super().__init__(self.what, self.why, self.do)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.do:
            lines.append(f"  next: {self.do}")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback (IPython calls this)."""
        return [f"raylab: {self}"]


class UsageError(RaylabError):
    exit_code = 2


class DataError(RaylabError):
    exit_code = 2


class TrackingError(RaylabError):
    exit_code = 2


class SlurmError(RaylabError):
    pass


class RunError(RaylabError):
    pass


class OutOfMemoryError(RunError):
    pass


class NonFiniteError(RunError):
    pass


class OwnCodeError(RunError):
    """`why` is the message of the plugin's error. It may have values of data, so it is shown and not recorded."""


class CheckpointError(RunError):
    pass


class IncompleteError(RunError):
    pass


def redact(text: str) -> str:
    """`text` with `***` for the credentials of every address in it (`http://***@host`), and printable."""
    return escape_unprintable(re.sub(r"(\w://)[^\s/'\"]*@", r"\1***@", text))


def escape_unprintable(text: str) -> str:
    """`text` with control characters, marks of writing direction and undecodable bytes as escapes: the name of a file
    may have any of them, and would change what the rest of a terminal shows. Line breaks and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not one of `known`: lists similar names, else all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return UsageError(f"unknown {kind} '{name}'", do=f"use one of: {', '.join(near or names)}")
