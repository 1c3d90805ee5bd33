"""Values that a few threads compute ahead of the one who needs them, in order."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")
END: Any = object()


class Prefetcher(Generic[T]):
    """`load(0)`, `load(1)`, ... up to `load(end - 1)`, each computed by one of `threads` threads before it is needed.

    `load` must depend on its number alone: then neither the threads nor their timing change a value. While the caller
    works on a value, at most `threads + 1` further ones are in memory. An error of `load(n)` is raised by `get(n)`, not
    before. With 0 threads, `get` computes the value itself.

    As a context manager it ends its threads, whatever ended the block; a value that is being computed is waited for.
    """

    def __init__(self, load: Callable[[int], T], end: int, threads: int) -> None:
        self.load, self.end, self.ahead = load, end, threads + 1
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch") if threads > 0 else None
        self.coming: dict[int, Future[T]] = {}

    def get(self, number: int) -> T:
        """`load(number)`; the values after it are computed from now on."""
        if self.pool is None:
            return self.load(number)
        mine = self.coming.pop(number, None) or self.pool.submit(self.load, number)
        for later in range(number + 1, min(number + 1 + self.ahead, self.end)):
            if later not in self.coming:
                self.coming[later] = self.pool.submit(self.load, later)
        return mine.result()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
        self.coming.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def read_ahead(values: Iterator[T]) -> Generator[T]:
    """Yield `values`, each computed by a thread while the caller works on the one before it: one more is in memory. An
    error is raised where its value would have been."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        coming = thread.submit(next, values, END)
        while (value := coming.result()) is not END:
            coming = thread.submit(next, values, END)
            yield value
