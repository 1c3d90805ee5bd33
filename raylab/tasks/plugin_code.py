"""The code of plugin files: executed from its text, and only if this user has named it.

The text travels: it is stored with runs and models, and sent to workers and trials. `allowed_file` lists the SHA-256 of
all that this user has named with `--plugin`.
"""

import hashlib
import linecache
import logging
import os
import sys
import traceback
from importlib.abc import ExecutionLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from raylab.documents import read_json
from raylab.errors import OwnCodeError, UsageError
from raylab.files import locked, write_json

log = logging.getLogger(__name__)

PLACE = "plugin "
"""how the name of a plugin's file begins in tracebacks"""


class Code(NamedTuple):
    """The file of a plugin: its name without a directory, and its text."""

    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> "Code":
        """The code in a file; UsageError if it cannot be read."""
        try:
            return cls(path.name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the plugin {path} could not be read", str(error), "give a Python file") from error

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class _TextLoader(ExecutionLoader):
    """Lets Python import a plugin's text, and find it for tracebacks and for the descriptions of fields."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def get_filename(self, fullname: str) -> str:
        return f"{PLACE}{self.code.name}"

    def get_source(self, fullname: str) -> str:
        return self.code.text


def execute(code: Code) -> ModuleType:
    """The module of a plugin's code."""
    name, loader = f"raylab_plugin_{Path(code.name).stem}", _TextLoader(code)
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    linecache.cache.pop(loader.get_filename(name), None)  # of an earlier version
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        do = "correct the file"
        raise UsageError(f"the plugin {code.name} could not be loaded", explain(error), do) from error
    return module


def explain(error: BaseException) -> str:
    """What went wrong while a plugin was executed, and the last line of code that took part."""
    if isinstance(error, SyntaxError):
        return f"{'' if error.lineno is None else f'line {error.lineno}: '}{error.msg}"
    frame = _last_frame(error)
    return f"{'' if frame is None else f'line {frame.lineno}: '}{type(error).__name__}: {error}"


def explain_own_error(error: BaseException) -> OwnCodeError | None:
    """The error for the user where the code of a plugin took part in `error`, after it had been loaded."""
    frame = _last_frame(error)
    if frame is None:
        return None
    what = f"the code of the {frame.filename} failed (line {frame.lineno}: {type(error).__name__})"
    return OwnCodeError(what, str(error), "correct the file")


def _last_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The last line of a plugin's code that took part in an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((one for one in reversed(frames) if one.filename.startswith(PLACE)), None)


def allowed_file() -> Path:
    """The list of code that this user has named, beside the user's other settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "raylab" / "plugins.json"


def read_allowed() -> dict[str, str]:
    """{SHA-256: name of the file} of all code that this user has named; UsageError where others can write the list."""
    path = allowed_file()
    if not path.exists():
        return {}
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        why = f"its mode is {status.st_mode & 0o777:04o} and its owner {status.st_uid}; it lists code to execute"
        raise UsageError(f"{path} may be another user's", why, f"rm {path}")
    allowed: dict[str, str] = read_json(path, dict[str, str], f"rm {path}")
    return allowed


def allow(code: Code) -> None:
    """Add code that was named to the list."""
    if code.sha256 in read_allowed():
        return
    path = allowed_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(path.with_name(".plugins.lock")):
            write_json(path, {**read_allowed(), code.sha256: code.name})
    except OSError as error:
        log.warning("%s could not be written, so runs with %s will ask for --plugin: %s", path, code.name, error)
