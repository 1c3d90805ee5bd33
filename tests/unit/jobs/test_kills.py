"""A process that is killed at any write leaves a run that is all there or not there, and the next command completes it.

By default at a few writes of each verb; all of them are slow. `-s` prints the table.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.verbs import ROOT

VERBS = ("open", "trial", "sweep", "fit", "view", "finish", "register")
LONG = ("rerun", "federate")  # they train at each kill
SAMPLE = 4  # writes of each verb in the default suite

pytestmark = pytest.mark.timeout(3600)

Kill = Callable[[str, int | None], None]


@pytest.fixture(scope="module")
def kill() -> Iterator[Kill]:
    """Kills a verb at so many writes, or at all, and checks what is left (tests/kill_cases.py)."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", "tests.kill_cases"]
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, env=os.environ) as cases:
        assert cases.stdin and cases.stdout

        def ask(verb: str, sample: int | None) -> None:
            assert cases.stdin and cases.stdout
            print(json.dumps({"verb": verb, "sample": sample}), file=cases.stdin, flush=True)
            answer = json.loads(cases.stdout.readline())
            assert "error" not in answer, answer["error"]
            assert len(answer["table"]) >= (sample or 10)
            for point, before, said in answer["table"]:
                print(f"{verb:9} {point:3}  {before:58} {said}")

        yield ask
        cases.stdin.close()


@pytest.mark.parametrize("verb", VERBS)
def test_a_kill_at_some_writes_is_completed(verb: str, kill: Kill) -> None:
    kill(verb, SAMPLE)


@pytest.mark.campaign
@pytest.mark.parametrize("verb", VERBS + LONG)
def test_a_kill_at_any_write_is_completed(verb: str, kill: Kill) -> None:
    kill(verb, None)
