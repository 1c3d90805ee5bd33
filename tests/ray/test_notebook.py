"""docs/notebook.ipynb on this machine, executed again after its kernel and its login session were killed."""

import json
import os
from pathlib import Path

import pytest

from jobs.common.submitted import ThisMachine, read_submission
from raylab.files import read_lines
from raylab.training.trials import Trials
from tests.notebooks import Session, texts
from tests.wait import wait_for

TRIALS = 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_notebook_comes_back_to_its_search_after_each_kill(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "RAYLAB_HOME": str(home)}
    search, submission = home / "runs" / "notebook", home / "submitted" / "notebook.json"

    def is_at_work() -> bool:
        """Whether a trial has ended and another one trains."""
        trials = Trials(search / "trials", 0) if (search / "run.json").is_file() else None
        return trials is not None and bool(trials.ended) and bool(trials.begun)

    sessions = [Session(tmp_path, environment)]
    try:
        wait_for(is_at_work, 500, "two trials of the search")
        sessions[0].kill_kernel()
        first = read_submission(submission)
        assert ThisMachine().is_alive(first, "notebook"), "the search does not need its kernel"
        sessions[0].kill_all()
        ended_before = Trials(search / "trials", 0).ended

        sessions.append(Session(tmp_path, environment))
        wait_for(
            lambda: (read_submission(submission) or first).pid not in (0, first.pid), 500, "the search's resumption"
        )
        resumed = read_submission(submission)
        sessions[1].kill_kernel()

        sessions.append(Session(tmp_path, environment))
        book = sessions[2].finish(900)
        assert read_submission(submission) == resumed, "this notebook found the search, which was under way"
    finally:
        for session in sessions:
            session.kill_all()

    trials = Trials(search / "trials", 0)
    assert len(trials.ended) == TRIALS and not trials.begun
    assert all(trials.ended[number] == end for number, end in ended_before.items()), "none of these ran again"
    for number in trials.params:
        steps = [line["step"] for line in read_lines(trials.path(number) / "ledger.jsonl") if "step" in line]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    said = texts(book)
    assert "notebook: finished" in said and "6 of 6 trials ended" in said
    assert "'test reads': 1" in said and "report: " in said
    pictures = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    assert "token" not in json.dumps([cell.get("outputs") for cell in book.cells])
    assert [path.name for path in (home / "runs").iterdir() if (path / "run.json").is_file()] == ["notebook"]
