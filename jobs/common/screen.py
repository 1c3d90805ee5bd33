"""The terminal of a verb: a region at its bottom that is drawn anew, below what `say` prints, which stays."""

import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, cast

from rich.console import Console, ConsoleDimensions, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from jobs.common import console
from jobs.common.duration import duration
from jobs.common.home import home

View = Callable[[int, int], RenderableType]
"""What the region shows, for so many columns and rows of the terminal."""

DRAWS_PER_SECOND = 4
FREE = 3  # columns at the right of the region: what the terminal itself writes there, ^C, must not wrap
OWN = ("jobs", "raylab", "tracking", "cluster")  # loggers whose messages are for the user
LIBRARIES = "libraries.log"  # in the home: what other loggers say


class Screen:
    """The region, and the lines above it. The region shows the view that was added last, or else the status."""

    def __init__(self, file: TextIO, status: str) -> None:
        """`file`: the terminal."""
        self.console = _Console(file)
        self.status = Status(status, self.console)
        self.views: list[View] = []
        self.live = Live(
            console=self.console,
            get_renderable=self._draw,
            refresh_per_second=DRAWS_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )

    def say(self, text: str) -> None:
        """Print `text`, which has no control characters, above the region."""
        lines = text.split("\n")
        wrapped = "\n".join(wrap_line(line, self.console.width) for line in lines)
        self.console.print(Text(wrapped), soft_wrap=True)

    def print(self, what: RenderableType) -> None:
        """Print `what` above the region."""
        self.console.print(what)

    @contextmanager
    def show(self, view: View) -> Iterator[None]:
        """Show a view while the context is open."""
        self.views.append(view)
        self.live.refresh()
        try:
            yield
        finally:
            self.views.remove(view)
            self.live.refresh()

    def set_status(self, text: str) -> None:
        """Show what is being done, and for how long, from now on."""
        self.status = Status(text, self.console)
        self.live.refresh()

    def _draw(self) -> RenderableType:
        view = self.views[-1] if self.views else self.status
        return view(self.console.width - FREE, self.console.height)


class _Console(Console):
    """The terminal `file`, which may be closed, and whose size may change, at any time. The cursor stays visible: a
    process that is killed could not show it again."""

    def __init__(self, file: TextIO) -> None:
        self.terminal = file
        super().__init__(
            file=cast(TextIO, _Outlet(file)), force_terminal=True, highlight=False, markup=False, emoji=False
        )

    @property
    def size(self) -> ConsoleDimensions:
        try:
            columns, rows = os.get_terminal_size(self.terminal.fileno())
        except (OSError, ValueError):  # it has been closed
            columns, rows = 0, 0
        return ConsoleDimensions(columns or 80, rows or 24)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError("the size is that of the terminal")

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Outlet:
    """Writes to the terminal `file` until it takes nothing any more (`console.lose_output`)."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.encoding = file.encoding

    def write(self, text: str) -> int:
        if console.lost is None:
            try:
                self.file.write(text)
            except OSError as error:
                console.lose_output(self.file, error)
        return len(text)

    def flush(self) -> None:
        if console.lost is None:
            try:
                self.file.flush()
            except OSError as error:
                console.lose_output(self.file, error)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.file.fileno()


def wrap_line(line: str, columns: int) -> str:
    """A line that is too long for the terminal as several, the others with a deeper indent; one with a command as it
    is, so that it can be copied."""
    if len(line) <= columns or "raylab " in line:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    further = f"{indent}    "
    wrapped = textwrap.wrap(line, columns, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapped)


class Status:
    """A view: what is being done, and for how long."""

    def __init__(self, text: str, console: Console) -> None:
        self.text, self.began = text, time.monotonic()
        self.spinner = Spinner("line" if console.options.ascii_only else "dots")

    def __call__(self, columns: int, rows: int) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        passed = duration(time.monotonic() - self.began)
        line.add_row(self.spinner, Text(f"{self.text}  {passed}", no_wrap=True, overflow="ellipsis"))
        return line


@contextmanager
def draw_on(terminal: TextIO, status: str) -> Iterator[Screen]:
    """A Screen on `terminal` with its first status, to which the warnings of our own loggers go, too."""
    terminal.flush()
    # a descriptor of its own: a session with Ray sends standard output to a file
    descriptor = os.dup(terminal.fileno())
    with open(descriptor, "w", encoding=terminal.encoding, errors="backslashreplace") as file:  # noqa: PTH123
        screen = Screen(file, status)
        with _route_logs(home() / LIBRARIES), screen.live:
            yield screen


class _ToScreen(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console.say(record.getMessage())


class _ToFile(logging.FileHandler):
    """A library may say what it likes, and where this cannot be kept, as on a full disk, the verb goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def _route_logs(path: Path) -> Iterator[None]:
    """Show our own warnings above the region; those of libraries go to a file, as they would cut through it."""
    shown, kept = _ToScreen(logging.WARNING), _ToFile(path, delay=True)
    kept.setLevel(logging.WARNING)
    kept.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s %(levelname)s %(message)s"))
    shown.addFilter(lambda record: record.name.partition(".")[0] in OWN)
    kept.addFilter(lambda record: record.name.partition(".")[0] not in OWN and path.parent.is_dir())
    root = logging.getLogger()
    logging.captureWarnings(True)
    for handler in (shown, kept):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (shown, kept):
            root.removeHandler(handler)
        kept.close()
        logging.captureWarnings(False)
