"""Two runs on one Ray: spare workers are shared by priority, and who has more than its share gives the rest back."""

import os
import signal
from pathlib import Path

import pytest

from tests import paced
from tests.paced import PACED
from tests.ray.conftest import Lab
from tests.wait import wait_for

RECIPE = ("--smoke", "--set", PACED, "loop.epochs=4000", "loop.shards=4", "loop.checkpoint_steps=10000")


@pytest.mark.timeout(600)
def test_a_second_run_gets_its_share_and_gives_it_back(lab: Lab, ards_data: Path) -> None:
    """Three CPUs: after both minimums one worker is left, which goes to the run of the higher priority."""

    def workers(name: str) -> list[int]:
        return [line["workers"] for line in lab.ledger(name) if "workers" in line]

    def has(name: str, count: int) -> None:
        wait_for(lambda: workers(name)[-1:] == [count], 150, f"{count} workers of {name}")

    words = ("train", "ards", "--plugin", paced.__file__, "--data", ards_data, "--workers", "1:3")
    first = lab.start(*words, "--name", "first", *RECIPE)
    has("first", 3)
    urgent = lab.start(*words, "--priority", 2, "--name", "urgent", *RECIPE)
    has("urgent", 2)
    assert workers("first")[-1] == 1
    os.kill(urgent.pid, signal.SIGTERM)
    urgent.communicate(60)
    has("first", 3)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(60)
    assert [line for line in lab.ledger("first") if "start" in line][1:] == [], "it began once"
