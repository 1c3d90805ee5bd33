"""What a signal in the middle of a block does that must not end half-way."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from jobs.common.interrupts import hold_interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """SIGTERM interrupts, as in `jobs.cli`; SIGINT is ignored, as in a background job of a shell."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt), signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])


def test_an_interrupt_waits_until_the_block_has_ended() -> None:
    done, handler = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), hold_interrupts():
        done.append("begun")
        signal.raise_signal(signal.SIGTERM)
        done.append("ended")
    assert done == ["begun", "ended"]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_was_ignored_stays_ignored() -> None:
    with hold_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_an_error_in_the_block_is_not_lost() -> None:
    with pytest.raises(ValueError, match="broken"), hold_interrupts():
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
