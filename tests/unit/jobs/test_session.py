"""What the end of a connection to Ray does in this process."""

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.common.session import STARTS, _Connection, _no_garbage
from raylab.errors import RunError


class Cycle:
    """Garbage that only a collection frees."""

    def __init__(self, freed: Callable[[], object]) -> None:
        self.itself, self.freed = self, freed

    def __del__(self) -> None:
        self.freed()


def test_no_garbage_is_left_and_none_is_collected_meanwhile():
    freed: list[str] = []
    gc.disable()
    try:
        Cycle(lambda: freed.append("before"))
        gc.enable()
        with _no_garbage():
            assert freed == ["before"] and not gc.isenabled()
            Cycle(lambda: freed.append("meanwhile"))
            assert freed == ["before"]
        assert gc.isenabled()
    finally:
        gc.enable()
    gc.collect()
    assert freed == ["before", "meanwhile"]


def test_a_collection_of_another_thread_is_waited_for():
    begun, may_end = threading.Event(), threading.Event()
    freed: list[str] = []

    def free_slowly() -> None:
        begun.set()
        may_end.wait(30)
        freed.append("theirs")

    gc.disable()
    try:
        Cycle(free_slowly)
        other = threading.Thread(target=gc.collect)
        other.start()
        assert begun.wait(30)
        threading.Timer(0.2, may_end.set).start()
        with _no_garbage():
            assert freed == ["theirs"] and not gc.isenabled()
        other.join(30)
        assert not gc.isenabled(), "whoever disabled it before expects it to stay so"
    finally:
        gc.enable()


RUN = """{"name": "first", "uri": "", "experiment": "raylab", "kind": "KIND", "task": "ards", "data": "ards",
"synthetic": true, "parent": null, "tags": {}, "status": "RUNNING"}"""


@pytest.mark.parametrize(
    ("kind", "then"), [("train", "raylab resume first"), ("tune", "raylab resume first"), ("fit", "the same command")]
)
def test_a_ray_that_does_not_start_names_the_next_command(kind: str, then: str, tmp_path: Path) -> None:
    scratch: Any = "a directory"
    connection = _Connection(1, None, scratch, lambda: None)
    attempts: list[int] = []

    def connect() -> None:
        attempts.append(1)
        raise Exception("the node started too slowly")

    connection._connect = connect  # type: ignore[method-assign]
    connection._disconnect = lambda: None  # type: ignore[method-assign]
    log = tmp_path / "first" / "ray.log"
    log.parent.mkdir()
    (log.parent / "run.json").write_text(RUN.replace("KIND", kind))
    with connection, pytest.raises(RunError, match="did not start") as error:
        connection.wait(log)
    assert len(attempts) == STARTS and "too slowly" in error.value.why
    assert then in error.value.do and str(log) in error.value.do


STUCK = """
import atexit, threading
from jobs import cli
from jobs.common import session
session.END_SECONDS = 0.1
session._Connection._connect = lambda self: None
session._Connection._disconnect = lambda self: threading.Event().wait({seconds})
atexit.register(lambda: print("the interpreter ends") or threading.Event().wait({seconds}))
cli.run = lambda verb, words: use()
def use():
    with session._Connection(1, "elsewhere", None, lambda: None):
        raise KeyboardInterrupt
print(cli.main(["tune"]))
"""


@pytest.mark.parametrize(("seconds", "printed"), [("None", ""), ("0", "130\nthe interpreter ends\n")])
def test_a_ray_that_does_not_end_does_not_keep_the_process(seconds: str, printed: str) -> None:
    """What Ray and Tune do when an interpreter ends would wait for it as well."""
    words = [sys.executable, "-c", STUCK.format(seconds=seconds)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == printed and done.returncode == (0 if printed else 130)
    assert "raylab: interrupted" in done.stderr and ("did not end" in done.stderr) is not bool(printed)
