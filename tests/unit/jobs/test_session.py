"""What the end of a connection to Ray does in this process."""

import gc
import threading
from collections.abc import Callable

from jobs.common.session import _no_garbage


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
