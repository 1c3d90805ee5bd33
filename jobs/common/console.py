"""Standard output and standard error, to which nobody may be listening."""

import contextlib
import os
import sys
from typing import TextIO

from raylab.errors import RaylabError, RunError, escape_unprintable
from raylab.storage import explain_storage_error

stream: TextIO | None = None  # set while standard output is redirected for Ray (session.py)
lost: OSError | None = None  # why standard output takes nothing any more


def say(text: str = "", start: str = "", end: str = "\n") -> None:
    """Print `text`, after moving the cursor with `start`.

    A closed pipe, a closed terminal or a full disk ends what is said, not the work. Names may contain anything, so
    control characters in `text` are escaped.
    """
    if lost is None:
        file = stream or sys.stdout
        try:
            print(start + escape_unprintable(text), end=end, file=file, flush=True)
        except OSError as error:
            lose_output(file, error)


def flush_output() -> None:
    """Write what libraries have printed."""
    try:
        sys.stdout.flush()
    except OSError as error:
        lose_output(sys.stdout, error)


def lose_output(file: TextIO, error: OSError) -> None:
    """Note that `file`, which is standard output, takes nothing any more."""
    global lost
    lost = error
    discard_output(file)


def discard_output(file: TextIO) -> None:
    """Send what `file` still holds, and whatever follows, nowhere: Python would try to write it again at its end."""
    with contextlib.suppress(OSError):  # it is no file of the system
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


def tell_error(error: object) -> None:
    """Print `raylab: ERROR` to standard error, if anybody listens there."""
    try:
        print(f"raylab: {error}", file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr)


def explain_lost_output(error: OSError) -> RaylabError | None:
    """Return the error of a verb whose output was lost to `error`; None if its reader has just closed."""
    if isinstance(error, BrokenPipeError):
        return None
    explained = explain_storage_error(error)
    why = explained.why if explained else error.strerror or str(error)
    do = "send it elsewhere; the work itself is complete, and what it keeps is stored"
    return RunError("not all output could be printed", why, do)
