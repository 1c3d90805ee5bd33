"""What a signal in the middle of a block does that must not end half-way."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs.common.interrupts import handle_interrupts, hold_interrupts
from raylab.witness import SIGNALS


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signals interrupt, as in `jobs.cli`; SIGINT is ignored, as in a background job of a shell."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    handle_interrupts()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_interrupt_what_an_earlier_one_has_begun(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    done = []

    @contextmanager
    def recorded() -> Iterator[None]:
        try:
            yield
        finally:
            try:
                raise OSError("in the middle of it")
            except OSError:
                signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)
            done.append("recorded")

    with pytest.raises(KeyboardInterrupt), recorded():
        signal.raise_signal(number)
    assert done == ["recorded"]
    assert "already stopping" in capfd.readouterr().err


def test_an_interrupt_that_a_library_swallows_can_be_repeated() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
