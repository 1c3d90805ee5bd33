"""Standard output and standard error, to which nobody may be listening."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from raylab.errors import RaylabError, RunError, escape_unprintable
from raylab.storage import explain_storage_error

if TYPE_CHECKING:  # it loads rich, which only a terminal needs
    from jobs.common.screen import Screen

stream: TextIO | None = None  # set while standard output is redirected for Ray (session.py)
screen: "Screen | None" = None  # set while a verb draws on a terminal (screen.py)
lost: OSError | None = None  # why standard output takes nothing any more
MANY = 10  # counts from which those of 0 are summed up


def say(text: str = "", start: str = "", end: str = "\n") -> None:
    """Print `text`, after moving the cursor with `start`.

    A closed pipe, a closed terminal or a full disk ends what is said, not the work. Names may contain anything, so
    control characters in `text` are escaped.
    """
    if screen is not None:
        screen.say(escape_unprintable(text))
    elif lost is None:
        file = stream or sys.stdout
        try:
            print(start + escape_unprintable(text), end=end, file=file, flush=True)
        except OSError as error:
            lose_output(file, error)


def list_counts(counts: Mapping[str, int]) -> str:
    """`water 3, forest 0`; of more than MANY counts, those of 0 are only counted."""
    shown = {name: n for name, n in counts.items() if n or len(counts) <= MANY}
    more = [f"{len(counts) - len(shown)} others 0"] if len(shown) < len(counts) else []
    return ", ".join([*(f"{name} {n}" for name, n in shown.items()), *more])


@contextlib.contextmanager
def open_screen(quiet: bool, status: str) -> Iterator[None]:
    """Let a verb draw on its terminal while the context is open (screen.py), and show first that `status` is being
    done. Does nothing if `quiet`, without a terminal that can move its cursor, or within another one."""
    global screen
    is_terminal = stream is None and sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if quiet or screen is not None or not is_terminal:
        yield
        return
    from jobs.common.screen import draw_on

    with draw_on(sys.stdout, escape_unprintable(status)) as screen:
        try:
            yield
        finally:
            screen = None


def set_status(text: str) -> None:
    """Show on the screen, if there is one, what is being done from now on."""
    if screen is not None:
        screen.set_status(escape_unprintable(text))


def count_columns() -> int | None:
    """The width of the terminal that standard output is; None if it is something else."""
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except OSError:
        return None


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
