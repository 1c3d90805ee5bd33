"""Values computed ahead: the same for any number of threads, no more of them than stated, nothing left at the end."""

import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import wait

import pytest

from raylab.data.prefetch import Prefetcher, read_ahead
from tests.wait import wait_for


class Value:
    """A batch whose end can be watched."""

    def __init__(self, number: int) -> None:
        self.number = number


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_the_values_and_their_order_do_not_depend_on_the_threads(count, first):
    with Prefetcher(lambda number: number**2, 9, count) as values:
        assert [values.get(number) for number in range(first, 9)] == [number**2 for number in range(first, 9)]


def test_values_are_computed_before_they_are_needed_and_only_up_to_the_last():
    computed: list[int] = []
    with Prefetcher(computed.append, 4, 2) as values:
        values.get(0)
        wait_for(lambda: len(computed) == 4, 30, "all values")
        for number in range(1, 4):
            values.get(number)
    assert sorted(computed) == [0, 1, 2, 3], "each once, and none beyond the end"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_more_values_than_stated_are_in_memory(count):
    alive: weakref.WeakSet[Value] = weakref.WeakSet()
    most = 0

    def load(number: int) -> Value:
        value = Value(number)
        alive.add(value)
        return value

    with Prefetcher(load, 12, count) as values:
        for number in range(12):
            value = values.get(number)
            assert not wait(values.coming.values(), timeout=30).not_done
            most = max(most, len(alive))
            assert value.number == number
    assert most == (count + 2 if count else 1)


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_is_raised_by_the_value_that_has_it(count):
    def load(number: int) -> int:
        if number == 2:
            raise OSError("row 7 cannot be read")
        return number

    with pytest.raises(OSError, match="row 7") as caught, Prefetcher(load, 5, count) as values:
        assert [values.get(0), values.get(1)] == [0, 1]
        values.get(2)
    assert caught.traceback[-1].name == "load", "the traceback leads to the cause"
    assert threads() == []


def test_threads_end_with_the_block_and_start_nothing_after_it():
    started, may_end = threading.Event(), threading.Event()
    begun: list[int] = []

    def load(number: int) -> int:
        begun.append(number)
        if number > 0:
            started.set()
            assert may_end.wait(30)
        return number

    with pytest.raises(KeyboardInterrupt), Prefetcher(load, 50, 1) as values:
        values.get(0)
        assert started.wait(30)
        later = values.coming[2]
        threading.Thread(target=lambda: wait_for(later.cancelled, 30, "the end") and may_end.set()).start()
        raise KeyboardInterrupt
    assert begun == [0, 1] and threads() == []


def test_reading_ahead_keeps_order_and_raises_an_error_in_its_place():
    def values() -> Iterator[int]:
        yield from range(3)
        raise OSError("damaged")

    assert list(read_ahead(iter(range(5)))) == list(range(5)) and list(read_ahead(iter(()))) == []
    ahead = read_ahead(values())
    assert [next(ahead), next(ahead), next(ahead)] == [0, 1, 2]
    with pytest.raises(OSError, match="damaged"):
        next(ahead)


def test_reading_ahead_holds_one_more_value_and_ends_its_thread():
    computed: list[int] = []

    def values() -> Iterator[int]:
        for number in range(9):
            computed.append(number)
            yield number

    ahead = read_ahead(values())
    assert next(ahead) == 0
    wait_for(lambda: len(computed) == 2, 30, "the next value")
    ahead.close()
    assert computed == [0, 1] and threads() == []
