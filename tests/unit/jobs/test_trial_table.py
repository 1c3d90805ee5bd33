"""The table of a search's trials."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.common import console
from jobs.common.console import open_screen
from jobs.common.trial_table import TrialTable
from tests.terminal import Terminal, show

PARAMS = {"optim.lr": 0.000344, "optim.weight_decay": 0.1234, "model.hidden": 16, "model.dropout": 0.5}
MORE = {"loop.global_batch_size": 128, "loop.ema_decay": 0.98, "optim.beta1": 0.9, "transfer.probe_lr_scale": 0.1}


def fill(table: TrialTable) -> None:
    table.update(0, params={"optim.lr": 1e-3})
    table.update(1, params={"optim.lr": 2e-3})
    table.update(0, objective=0.7, epoch=1)
    table.update(1, objective=0.8, epoch=1)
    table.update(0, how="stopped", objective=0.7, epoch=1)
    table.update(1, how="failed", objective=None, error="no number")
    table.update(2, params={"optim.lr": 3e-3})


def draw(table: TrialTable, columns: int, rows: int | None = None) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=columns).print(table.draw(columns, rows))
    return [line.rstrip() for line in file.getvalue().rstrip().split("\n")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "lost", None)
    return Terminal()


def test_on_a_terminal_the_table_is_drawn_in_place_and_stays(terminal: Terminal) -> None:
    table = TrialTable(5, "val/auroc", quiet=False)
    with terminal.as_output(), open_screen(False, "starting"), table.show():
        fill(table)
    shown = show(terminal.end())
    assert shown[0].startswith("  trial   1  failed    no number")
    assert shown[1].startswith("2 of 5 trials ended, 1 running, 0:00; best: trial 0, 0.7000")
    assert [line.split()[:2] for line in shown[3:6]] == [["2", "running"], ["0", "stopped"], ["1", "failed"]]
    assert len(shown) == 6


def test_every_parameter_is_a_column_where_there_is_room() -> None:
    table = TrialTable(5, "val/auroc", quiet=True)
    for number in range(4):
        table.update(number, params=PARAMS, objective=0.7 + number / 100, epoch=12, how="stopped")
    lines = draw(table, 77)
    assert max(map(len, lines)) <= 77
    assert lines[1:3] == [
        "                                                  weight_",
        "trial  status   epoch  time  val/auroc        lr    decay  hidden  dropout",
    ]
    assert lines[3] == "    3  stopped     12           0.7300  0.000344    0.123      16      0.5"


def test_in_a_narrow_terminal_the_parameters_of_a_trial_are_below_each_other() -> None:
    table = TrialTable(5, "val/auroc", quiet=True)
    table.update(0, params=PARAMS | MORE, objective=0.7, epoch=1)
    table.update(1, params=PARAMS | MORE)
    lines = draw(table, 77)
    assert max(map(len, lines)) <= 77
    for name in PARAMS | MORE:
        assert " ".join(lines).count(f" {name.rpartition('.')[2]}=") == 2


def test_names_that_differ_only_in_their_path_are_shown_with_it() -> None:
    table = TrialTable(5, "val/auroc", quiet=True)
    table.update(0, params={"a.rate": 1, "b.rate": 2, "c.size": 3}, how="planned")
    assert draw(table, 120)[2].split()[:2] == ["0", "done"]
    assert draw(table, 120)[1].split()[-3:] == ["a.rate", "b.rate", "size"]


def test_what_does_not_fit_a_terminal_is_counted() -> None:
    table = TrialTable(50, "val/auroc", quiet=True)
    for number in range(50):
        table.update(number, params=PARAMS, objective=number / 100, how="stopped" if number % 10 else "running")
    lines = draw(table, 120, 24)
    shown = [line.split()[0] for line in lines[3:-1]]
    assert len(lines) <= 23 and shown[:6] == ["0", "10", "20", "30", "40", "49"]
    assert lines[-1] == f"and {50 - len(shown)} more" and len(draw(table, 120)) == 53


def test_trials_wait_in_the_table_from_the_beginning(terminal: Terminal) -> None:
    table = TrialTable(3, "val/auroc", quiet=False, params=list(PARAMS))
    with terminal.as_output(), open_screen(False, "starting Ray"):
        lines = draw(table, 100, 24)
        assert lines[0] == "0 of 3 trials ended, 0 running, 0:00; starting Ray" and "weight_" in lines[1]
        assert [line.split() for line in lines[3:]] == [["0", "waiting"], ["1", "waiting"], ["2", "waiting"]]
        table.update(1, how="waiting", params=PARAMS)  # begun before an interruption
        table.update(2, how="planned", objective=0.8, epoch=3, params=PARAMS)
        table.update(0, params=PARAMS)
        lines = draw(table, 100, 24)
        assert lines[0] == "1 of 3 trials ended, 1 running, 0:00; best: trial 2, 0.8000"
        assert [line.split()[:2] for line in lines[3:]] == [["0", "running"], ["2", "done"], ["1", "waiting"]]
        assert len(draw(table, 100)) == 5, "what stays at the end has no trials that wait"
    terminal.end()


def test_in_a_file_a_trial_is_a_line_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stream", file := io.StringIO())
    fill(TrialTable(5, "val/auroc", quiet=False))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["0", "1"]
    assert "\x1b" not in file.getvalue()


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "stream", file := io.StringIO())
    fill(TrialTable(5, "val/auroc", quiet=True))
    assert file.getvalue() == ""
