"""Processes that are killed at the n-th write: forked children that end themselves with SIGKILL just before it.

What counts as a write is found by Python's audit events (files under one directory that are opened for writing,
renamed, made or removed) and by wrapping every method of MLflow's client that changes something, before and after it.
So what a later version writes joins by itself.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

CHANGES = ("create_", "log_", "set_", "update_", "delete_", "finalize_", "rename_", "restore_", "transition_")
FILE_EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Writes:
    """Counts the writes of this process under `directory` and to MLflow, and ends it before number `fatal`.

    What MLflow itself writes into `directory`/mlflow belongs to the call that does it.
    """

    def __init__(self, directory: Path, fatal: int | None) -> None:
        self.directory, self.fatal = str(directory), fatal
        self.seen: list[str] = []
        self.lock = threading.RLock()
        sys.addaudithook(self._hear)
        for name in dir(MlflowClient):
            if name.startswith(CHANGES):
                setattr(MlflowClient, name, self._wrap(name, getattr(MlflowClient, name)))

    def note(self, what: str) -> None:
        with self.lock:
            if len(self.seen) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append(what)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in FILE_EVENTS:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | bytes | os.PathLike):
            return
        text = os.fsdecode(path)
        if event == "os.mkdir" and Path(text).is_dir():  # it may exist, and does
            return
        if text.startswith(self.directory + os.sep) and not text.endswith(".lock"):
            relative = Path(text).relative_to(self.directory)
            if relative.parts[0] != "mlflow":
                self.note(f"{event.removeprefix('os.')} {_without_numbers(relative)}")

    def _wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.note(f"before MLflow's {name}")
            value = method(*arguments, **named)
            self.note(f"after MLflow's {name}")
            return value

        return call


def _without_numbers(path: Path) -> str:
    """The path, with the number of the process and the time left out of the names of unfinished files."""
    return str(path.with_name(".".join(part for part in path.name.split(".") if not part.isdigit() or len(part) < 4)))


def run_in_child(work: Callable[[], Any], log: Path) -> tuple[int, Any]:
    """(exit code, or -9 if it was killed; what `work` returned) of `work` in a forked child, which writes to `log`."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
            value = work()
            with os.fdopen(writer, "w") as pipe:
                json.dump(value, pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, json.loads(said) if said else None
