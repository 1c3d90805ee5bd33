"""docs/notebook.ipynb on this machine, executed again after its kernel and its login session were killed."""

import json
import os
from pathlib import Path

import pytest

from raylab.files import read_lines
from raylab.training.trials import Trials
from tests.notebooks import Session, texts
from tests.wait import wait_for
from tracking.access import secret

TRIALS = 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_comes_back_to_its_search_after_each_kill(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "RAYLAB_HOME": str(home)}
    search = home / "runs" / "notebook"

    def ended(count: int) -> None:
        """Wait until so many trials have ended, and another one trains."""

        def there() -> bool:
            trials = Trials(search / "trials", 0) if (search / "run.json").is_file() else None
            return trials is not None and len(trials.ended) >= count and bool(trials.begun)

        wait_for(there, 240, f"{count} trials of the search")

    first = Session(tmp_path, environment)
    ended(1)
    submission = json.loads((home / "submitted" / "notebook.json").read_text())
    first.kill_kernel()
    second = Session(tmp_path, environment)
    ended(2)
    same = json.loads((home / "submitted" / "notebook.json").read_text())
    assert same == submission, "the search went on without its kernel"
    # The process of the search belongs to the first session, the notebook to the second
    done_before = Trials(search / "trials", 0).ended
    first.kill_all()
    second.kill_all()
    third = Session(tmp_path, environment)
    book = third.finish(500)

    trials = Trials(search / "trials", 0)
    assert len(trials.ended) == TRIALS and not trials.begun
    assert all(trials.ended[number] == end for number, end in done_before.items()), "none of these ran again"
    for number in trials.params:
        steps = [line["step"] for line in read_lines(trials.path(number) / "ledger.jsonl") if "step" in line]
        assert sorted(set(steps)) == list(range(1, max(steps) + 1))
    said = texts(book)
    assert "notebook: finished" in said and "6 of 6 trials ended" in said
    assert "test reads': 1" in said and "report: " in said
    pictures = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    token = secret.read(secret.path(home)) if secret.path(home).is_file() else None
    assert token is None or token not in json.dumps(book)
    assert [path.name for path in (home / "runs").iterdir() if (path / "run.json").is_file()] == ["notebook"]
