"""What is printed, and to whom."""

import io

import pytest

from jobs.common import console
from jobs.common.console import say


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(console, "stream", file)
    return file


def test_control_and_bidirectional_characters_of_names_are_escaped(printed: io.StringIO) -> None:
    say("run \x1b[2Jcleared \u202egnp.exe \udcff\r, and\tπ\n")
    assert printed.getvalue() == "run \\x1b[2Jcleared \\u202egnp.exe \\udcff\\r, and\tπ\n\n"


def test_the_display_still_moves_the_cursor(printed: io.StringIO) -> None:
    say("epoch 1", start="\r", end="")
    assert printed.getvalue() == "\repoch 1"


def test_of_many_counts_those_of_0_are_only_counted() -> None:
    assert console.list_counts({"a": 2, "b": 0}) == "a 2, b 0"
    assert console.list_counts(dict.fromkeys("bcdefghijkl", 0) | {"a": 2}) == "a 2, 11 others 0"


def test_what_nobody_takes_is_lost_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "lost", None)
    with open("/dev/full", "w") as full:  # noqa: PTH123
        monkeypatch.setattr(console, "stream", full)
        say("first")
        assert console.lost is not None
        say("second")
    failure = console.explain_lost_output(console.lost)
    assert failure is not None and failure.exit_code == 1 and "no space" in failure.why
    assert console.explain_lost_output(BrokenPipeError(32, "Broken pipe")) is None
