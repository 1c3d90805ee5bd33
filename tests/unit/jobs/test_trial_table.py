"""The table of a search's trials."""

import io
import re

import pytest

from jobs.common import console
from jobs.common.trial_table import UP, TrialTable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal shows after `text`: lines, and ways up."""
    lines: list[str] = []
    at = 0
    for part in text.replace("\x1b[J", "").splitlines():
        if match := re.match(r"\x1b\[(\d+)A", part):
            at -= int(match[1])
            part = part[match.end() :]
        lines[at : at + 1] = [part]
        at += 1
    return lines


def fill(table: TrialTable) -> None:
    table.update(0, params={"optim.lr": 1e-3})
    table.update(1, params={"optim.lr": 2e-3})
    table.update(0, objective=0.7, epoch=1)
    table.update(1, objective=0.8, epoch=1)
    table.update(0, how="stopped", objective=0.7, epoch=1)
    table.update(1, how="failed", objective=None, error="no number")
    table.update(2, params={"optim.lr": 3e-3})


def test_on_a_terminal_the_table_moves_in_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "stream", terminal := Terminal())
    table = TrialTable(5, "val/auroc", quiet=False)
    fill(table)
    shown = screen(terminal.getvalue())
    assert [line.rstrip() for line in shown] == [line.rstrip() for line in table.lines()]
    assert shown[0].strip() == "2 of 5 trials ended, 1 running"
    assert "running" in shown[1] and "0.7000 after 1 epochs" in shown[2] and "no number" in shown[3]
    assert UP.format(2) in terminal.getvalue()


def test_in_a_file_a_trial_is_a_line_when_it_has_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "stream", file := io.StringIO())
    fill(TrialTable(5, "val/auroc", quiet=False))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["0", "1"]
    assert "\x1b" not in file.getvalue()


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(console, "stream", terminal := Terminal())
    fill(TrialTable(5, "val/auroc", quiet=True))
    assert terminal.getvalue() == ""
