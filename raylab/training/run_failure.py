"""failure.json: the error with which a worker or a trial ended, for the process that started it."""

from pathlib import Path

from raylab import errors
from raylab.documents import Document, read_document
from raylab.errors import OwnCodeError, RaylabError, RunError
from raylab.files import write_json
from raylab.tasks.plugin_code import explain_own_error

FILE = "failure.json"


class Failure(Document):
    kind: str
    """a class of raylab.errors"""
    args: tuple[str, str, str]
    """its arguments"""


def explain_own_failure(error: BaseException) -> OwnCodeError | None:
    """The error for the user where the code of a plugin took part in the `error` that ended a run."""
    failure = explain_own_error(error)
    if failure is None:
        return None
    do = "correct the file, and start another run: this one keeps the code with which it began"
    return OwnCodeError(failure.what, failure.why, do)


def write_failure(directory: Path, error: RaylabError) -> None:
    write_json(directory / FILE, {"kind": type(error).__name__, "args": error.args})


def read_failure(directory: Path) -> RaylabError | None:
    """Return the error in failure.json, None if there is none; raises DataError if the file is damaged."""
    path = directory / FILE
    if not path.is_file():
        return None
    failure = read_document(path, Failure, "remove it; then raylab resume goes on from the newest checkpoint")
    kind = getattr(errors, failure.kind, None)
    return (kind if isinstance(kind, type) and issubclass(kind, RaylabError) else RunError)(*failure.args)
