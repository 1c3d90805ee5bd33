"""What a verb draws on a terminal."""

import logging
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest

from jobs.common import console
from jobs.common.console import open_screen, say, set_status
from jobs.common.progress import Bar, epoch_header, epoch_line
from jobs.common.screen import LIBRARIES, wrap_line
from tests.terminal import Terminal, show
from tests.wait import wait_for

ROW = {
    "step": 8, "epoch": 1, "train/loss": 0.5, "train/epoch_loss": 0.45, "train/samples_per_s": 1234.5,
    "val/loss": 0.6, "val/auroc": 0.8123, "best/val/loss": 0.6, "best/val/auroc": 0.8123,
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    """A terminal of 80 columns; the home is empty."""
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "lost", None)
    return Terminal()


def test_what_is_said_stays_and_the_region_goes(terminal: Terminal) -> None:
    with terminal.as_output():
        with open_screen(False, "checking"):
            wait_for(lambda: "checking  0:00" in terminal.said, 10, "the first line")
            say("first")
            set_status("scoring")
            say("  second\x1b[2J")
            wait_for(lambda: "scoring" in terminal.said, 10, "the status")
        say("third")
    assert show(terminal.end()) == ["first", "  second\\x1b[2J", "third"]


def test_the_cursor_is_never_hidden(terminal: Terminal) -> None:
    with terminal.as_output(), open_screen(False, "checking"):
        say("first")
    assert "\x1b[?25" not in terminal.end()


@pytest.mark.parametrize("kind", ["quiet", "dumb", "file"])
def test_without_a_terminal_that_moves_there_is_no_screen(
    terminal: Terminal, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    with (tmp_path / "file").open("w") as file, terminal.as_output(), ExitStack() as stack:
        if kind == "file":
            stack.enter_context(redirect_stdout(file))
        with open_screen(kind == "quiet", "checking"):
            assert console.screen is None
            say("first")
    assert (tmp_path / "file").read_text() == ("first\n" if kind == "file" else "")
    assert show(terminal.end()) == ([""] if kind == "file" else ["first"])


def test_our_warnings_are_shown_and_those_of_libraries_kept(terminal: Terminal, tmp_path: Path) -> None:
    with terminal.as_output(), open_screen(False, "checking"):
        logging.getLogger("tracking.forwarder").warning("the server is gone")
        logging.getLogger("foreign.library").warning("fifty lines")
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    assert show(terminal.end()) == ["the server is gone"]
    assert "foreign.library WARNING fifty lines" in (tmp_path / LIBRARIES).read_text()
    assert logging.getLogger("foreign.library").handlers == [] and not logging.getLogger("jobs").handlers


def test_a_warning_that_cannot_be_kept_disturbs_nobody(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / LIBRARIES).symlink_to("/dev/full")
    with terminal.as_output(), open_screen(False, "checking"):
        logging.getLogger("foreign.library").warning("fifty lines")
    (tmp_path / LIBRARIES).unlink()
    (tmp_path / LIBRARIES).mkdir()
    with terminal.as_output(), open_screen(False, "checking"):
        logging.getLogger("foreign.library").warning("fifty lines")
    assert show(terminal.end()) == [""]


def test_a_terminal_that_is_closed_takes_nothing_any_more(terminal: Terminal) -> None:
    with terminal.as_output():
        with open_screen(False, "checking"):
            wait_for(lambda: "checking" in terminal.said, 10, "the first line")
            terminal.hang_up()
            wait_for(lambda: console.lost is not None, 10, "a write that fails")
            say("nobody hears this")
            set_status("scoring")
        say("nor this")


def test_the_region_follows_the_size_of_the_terminal(terminal: Terminal) -> None:
    bar = Bar(20, 100, "auroc")
    bar.add(ROW, 0.0)
    with terminal.as_output(), open_screen(False, "checking"):
        assert console.screen is not None
        with console.screen.show(bar):
            wait_for(lambda: "kept so far" in terminal.said, 10, "the bar")
            assert "samples/s" not in terminal.said and max(map(len, show(terminal.said))) <= 77
            terminal.resize(120)
            wait_for(lambda: "1,234 samples/s" in terminal.said, 10, "the wider bar")
    assert show(terminal.end()) == [""]


def test_a_bar_shows_the_mean_loss_of_its_epoch_the_best_epoch_and_the_time_left() -> None:
    bar = Bar(20, 100, "auroc")
    bar.start(6, 0.0)
    assert bar.seconds_left(0.0) is None
    bar.add({**ROW, "step": 7, "epoch": 0, "train/loss": 9.0}, 3.0)
    for step, loss in ((8, 0.5), (9, 0.7)):  # in the same bundle
        bar.add({"step": step, "epoch": 1, "train/loss": loss, "train/samples_per_s": 1.0}, 3.0)
    assert sum(bar.losses) / len(bar.losses) == pytest.approx(0.6)
    assert bar.best == "epoch 1, val auroc 0.8123"
    assert bar.seconds_left(3.0) == pytest.approx(91.0) and bar.seconds_left(13.0) == pytest.approx(81.0)
    bar.start(5, 20.0)  # again, from a checkpoint
    assert bar.seconds_left(21.0) is None


def test_the_history_of_epochs_is_aligned_and_marks_the_best() -> None:
    head, best = epoch_header("auroc"), epoch_line(ROW, 20, "auroc", 65.0)
    later = {name: value for name, value in ROW.items() if not name.startswith("best/") and name != "val/auroc"}
    assert best == "     2/20      0.4500      0.6000        0.8123      1:05  best so far"
    assert epoch_line(later, 20, "auroc", 65.0) == "     2/20      0.4500      0.6000             -      1:05"
    assert head == "    epoch  train loss    val loss     val auroc   elapsed"


def test_long_lines_are_wrapped_and_commands_are_not() -> None:
    assert wrap_line("  cohort a: " + "word " * 20, 40).split("\n")[1].startswith("      word")
    assert max(map(len, wrap_line("word " * 40, 40).split("\n"))) <= 40
    command = "next: raylab evaluate ards --run " + "x" * 60
    assert wrap_line(command, 40) == command
