"""docs/notebook.ipynb on a Slurm cluster: the head is killed under a search, and the notebook goes on with it."""

import json
from pathlib import Path

import pytest

from raylab.training.trials import Trials
from tests.notebooks import Session, texts
from tests.slurm.conftest import Bed
from tests.slurm.lab import Lab
from tests.verbs import Verbs
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.campaign, pytest.mark.timeout(1500)]


def test_the_notebook_survives_its_head(testbed: Bed, ards_data: Path, verbs: Verbs) -> None:
    lab = Lab(testbed, ards_data, verbs, "notebook")
    place = lab.home / "user"
    place.mkdir()
    search = lab.home / "runs" / "notebook"

    def is_at_work() -> bool:
        """Whether a trial has ended and another one trains."""
        trials = Trials(search / "trials", 0) if (search / "run.json").is_file() else None
        return trials is not None and bool(trials.ended) and bool(trials.begun)

    try:
        first = Session(place, lab.environment, "testbed")
        wait_for(is_at_work, 400, "two trials of the search")
        run_id = json.loads((search / "run.json").read_text())["run_id"]
        before = lab.status()["head"]
        own = f"tr '\\0' '\\n' </proc/$pid/environ | grep -qx SLURM_JOB_ID={before['job']}"
        lab.bed.run(f"for pid in $(pgrep -f gcs/gcs_server); do {own} && kill -9 $pid; done; true", before["node"])
        book = first.finish(900)  # the same execution: it waits for the head
        assert lab.status()["head"]["generation"] > before["generation"]
        assert json.loads((search / "run.json").read_text())["run_id"] == run_id
        assert len(Trials(search / "trials", 0).ended) == 6
        again = Session(place, lab.environment, "testbed").finish(300)  # from the top: everything is there
        for one in (book, again):
            assert "notebook: finished" in texts(one)
        token = (lab.home / "clusters" / "ray" / "token").read_text()
        assert token not in json.dumps(book) + json.dumps(again)
    finally:
        lab.call("cluster", "down", "--name", "ray")
