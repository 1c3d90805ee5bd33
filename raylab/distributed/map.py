"""Run chunks of independent work on the connected Ray cluster, or in this process if there is none.

A chunk is done when its file exists. Calling an interrupted map again therefore continues it, on any number of
workers, and a worker or node that dies loses only the chunk it was working on.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raylab.errors import RaylabError, RunError

RETRIES = 5  # retries of a chunk whose worker or node died; Ray does not count announced preemptions
LEAST_IN_FLIGHT = 16  # the autoscaler reacts to waiting tasks

Work = Callable[[Any, Path], None]


def run_chunks(
    work: Work,
    chunks: Mapping[Path, Any],
    cpus: float = 1.0,
    tell: Callable[[int, int], None] | None = None,
) -> None:
    """Call work(argument, path) for every path of `chunks` that does not exist yet, each as a Ray task of `cpus`.

    `work` writes `path` atomically (`files.atomic_write`) into an existing directory on storage that all nodes share;
    it may run twice. `work` and its arguments must be picklable. `tell(done, total)` is called at the start and after
    each chunk.

    Raises the RaylabError that `work` raised, with the chunk's name, or RunError for any other exception, for a chunk
    that wrote no file, and for one whose workers died more than RETRIES times. On an error or an interrupt, running
    chunks are cancelled; the files of finished chunks stay.
    """
    left = {path: argument for path, argument in chunks.items() if not path.exists()}
    done = len(chunks) - len(left)

    def one_more(failure: RaylabError | None) -> None:
        nonlocal done
        if failure is not None:
            raise failure
        done += 1
        if tell is not None:
            tell(done, len(chunks))

    if tell is not None:
        tell(done, len(chunks))
    # If Ray is connected, it is already imported. Importing it here would take seconds and fix its token too early
    if left and "ray" in sys.modules and sys.modules["ray"].is_initialized():
        _over_the_cluster(work, left, cpus, one_more)
        return
    for path, argument in left.items():
        one_more(_failure(work, argument, path))


def _failure(work: Work, argument: Any, path: Path) -> RaylabError | None:
    """Run one chunk; return its error as a value, because values survive the transport unchanged."""
    again = "fix the error and rerun the same command; finished chunks are kept"
    try:
        work(argument, path)
    except RaylabError as error:
        return type(error)(f"{error.what} (chunk {path.name})", error.why, error.do)
    except Exception as error:
        return RunError(f"chunk {path.name} failed", f"{type(error).__name__}: {error}", again)
    return None if path.exists() else RunError(f"chunk {path.name} wrote no file", f"{path} does not exist", again)


def _over_the_cluster(
    work: Work, left: Mapping[Path, Any], cpus: float, one_more: Callable[[RaylabError | None], None]
) -> None:
    import ray

    task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_failure)
    shared = ray.put(work)
    waiting = list(left)[::-1]
    flying: dict[Any, Path] = {}
    try:
        while waiting or flying:
            # Twice the number of running tasks, so that no worker waits; updated as nodes come and go
            most = max(LEAST_IN_FLIGHT, int(2 * ray.cluster_resources().get("CPU", 0) / cpus))
            while waiting and len(flying) < most:
                path = waiting.pop()
                flying[task.remote(shared, left[path], path)] = path
            ended, _ = ray.wait(list(flying), num_returns=1, timeout=10)
            for reference in ended:
                path = flying.pop(reference)
                try:
                    failure = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # before `work` started: it could not be unpickled
                    why = str(error).strip().splitlines()[-1]
                    failure = RunError(f"chunk {path.name} could not start", why, "give every node the same code")
                except ray.exceptions.RayError as error:
                    failure = RunError(
                        f"the worker of chunk {path.name} died {RETRIES + 1} times",
                        str(error).strip().splitlines()[0],
                        "check whether workers run out of memory, or make chunks smaller; finished chunks are kept",
                    )
                one_more(failure)
    finally:  # tasks are still running only after an error or an interrupt
        for reference in flying:
            ray.cancel(reference)
