"""Signals that end a verb: Ctrl+C, SIGTERM and SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from raylab.witness import SIGNALS

AGAIN = b"raylab: already stopping; what is done is being recorded\n"


def handle_interrupts() -> None:
    """Let each of SIGNALS end this process the same way: a KeyboardInterrupt that closes the outboxes and marks the
    run. A signal that the caller had ignored, as under `nohup`, stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def ignore_interrupts() -> None:
    """Let SIGNALS change nothing until the next verb of this process."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, frame: None)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, unless the work of an earlier one is under way: that must complete. Where something has
    swallowed the earlier one, nothing is under way."""
    if not _is_ending(sys.exception()):
        raise KeyboardInterrupt
    with contextlib.suppress(OSError):
        os.write(2, AGAIN)


def _is_ending(error: BaseException | None) -> bool:
    """Whether `error`, which is being handled now, is a KeyboardInterrupt or was raised while one was handled."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let SIGNALS wait until the block has ended: nothing is left half-opened. Outside the main thread, which alone
    receives signals, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda received, frame: came.append(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])
