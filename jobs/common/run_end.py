"""How a run has ended, recorded in its record and, through its outbox, in MLflow."""

import contextlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

from jobs.common.home import annotate, note
from raylab.errors import OwnCodeError, RaylabError, RunError
from raylab.memory import explain_memory_error
from raylab.storage import explain_storage_error
from raylab.training.run_failure import explain_own_failure
from raylab.training.run_record import RESUMABLE
from tracking.outbox import Outbox

RESERVE = ".reserve"
RESERVE_BYTES = 1 << 17  # of a status in the outbox, in run.json, and in an embedded MLflow's database

End = Literal["FINISHED", "FAILED", "KILLED"]


class Ending(NamedTuple):
    """How a run ended, as its record says: why it did not finish, and what to do about it."""

    status: End
    error: str = ""
    do: str = ""


def reserve_room(directory: Path) -> None:
    """Keep room on the run's disk for the record of its end, so that a disk that fills up does not prevent it."""
    path = directory / RESERVE
    if not path.exists():
        path.write_bytes(os.urandom(RESERVE_BYTES))  # which no file system compresses


def record_end(directory: Path, ending: Ending) -> None:
    """Record how the run ended."""
    try:
        _record(directory, ending)
    except OSError:
        free_reserve(directory)
        _record(directory, ending)
    free_reserve(directory)


def free_reserve(directory: Path) -> None:
    with contextlib.suppress(OSError):  # of a disk that is read-only by now
        (directory / RESERVE).unlink(missing_ok=True)


def _record(directory: Path, ending: Ending) -> None:
    outbox = Outbox(directory / "outbox")
    if ending.error or note(directory).error:  # of an earlier attempt
        outbox.append({"kind": "tags", "values": {"raylab.error": ending.error}})
    outbox.append({"kind": "status", "status": ending.status})
    # last: a run that says so has all its records
    annotate(directory, status=ending.status, error=ending.error or None, do=ending.do or None)


def explain_end(error: BaseException, directory: Path) -> RaylabError | None:
    """The error for the user if memory, storage or the code of a plugin is the cause of `error`, which ended the run in
    `directory`."""
    explained = explain_memory_error(error, directory.name) or explain_storage_error(error)
    explained = explained or explain_own_failure(error)
    if isinstance(explained, RunError) and note(directory).kind in RESUMABLE:
        do = explained.do.replace("run the same command again", f"raylab resume {directory.name}")
        return type(explained)(explained.what, explained.why, do)
    return explained


def describe_end(error: BaseException, explained: RaylabError | None = None) -> Ending:
    """What is recorded of a run that ended with `error`, `explained` to the user if `explain_end` can: of other errors
    than those of runs the type alone, as their messages may have values of data.
    """
    if isinstance(error, KeyboardInterrupt):
        return Ending("KILLED", "interrupted")
    told = explained or (error if isinstance(error, RunError) else None)
    if told is None:
        return Ending("FAILED", type(error).__name__)
    why = told.what if isinstance(told, OwnCodeError) else ": ".join(filter(None, (told.what, told.why)))
    return Ending("FAILED", why, told.do)
