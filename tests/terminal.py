"""A terminal of a test: a real one, whose other side is read, and what a person sees on it."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Terminal:
    """`path` is what a process opens to write to it."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.master, slave = pty.openpty()
        self.path = Path(os.ttyname(slave))
        self.slave = slave
        self.resize(columns, rows)
        self.said = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def resize(self, columns: int, rows: int = 24) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @contextmanager
    def as_output(self) -> Iterator[None]:
        """Let it be standard output while the context is open."""
        with self.path.open("w") as file, redirect_stdout(file):
            yield

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.master, 1 << 16)
            except OSError:  # nobody writes any more
                return
            self.said += part.decode(errors="replace")

    def hang_up(self) -> None:
        """Close it, as a person closes a window."""
        os.close(self.slave)
        os.close(self.master)

    def end(self) -> str:
        """All that was said, once no process has it open."""
        os.close(self.slave)
        self.reader.join(30)
        os.close(self.master)
        return self.said


def show(said: str) -> list[str]:
    """The lines that a terminal shows after `said`, down to the last that is not empty.

    Raises ValueError for a control sequence that it does not know.
    """
    lines, row, column = [""], 0, 0
    for token in TOKEN.finditer(said):
        text, count = token[0], int(token[1] or 1) if (token[1] or "1").isdigit() else 1
        if token[2] == "A":
            row = max(0, row - count)
        elif token[2] == "K" and token[1] == "2":
            lines[row] = ""
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token[2] is None:
            lines[row] = lines[row].ljust(column)[:column] + text + lines[row][column + len(text) :]
            column += len(text)
        elif token[2] != "m":
            raise ValueError(f"unknown control sequence {text!r}")
    return "\n".join(line.rstrip() for line in lines).rstrip("\n").split("\n")
