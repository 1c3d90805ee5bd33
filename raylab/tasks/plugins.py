"""One's own models, sources and tasks, from a Python file or an installed package.

A plugin is a module with `PLUGIN = Plugin(...)`: a file that `--plugin FILE` names, or what an entry point of the group
`raylab` of an installed package refers to. Its parts join the registries of those that ship: FAMILIES
(config/recipe.py), MODELS (models/), SOURCES (data/icu/prepare.py) and TASKS.

The code of a file is stored with every run that uses it, and used from there on. Stored code may be another's. It is
executed only if this user has named the same content with `--plugin` before: ALLOWED lists it by SHA-256.
"""

import hashlib
import linecache
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.abc import ExecutionLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from raylab.config.recipe import FAMILIES, ICU_HOURLY, Model, Recipe, Search, model_names
from raylab.documents import read_json
from raylab.errors import UsageError, unknown
from raylab.files import write_json
from raylab.tasks import TASKS
from raylab.tasks.base import Task

if TYPE_CHECKING:  # as in base.py
    from torch import nn

    from raylab.data.icu.concepts import SourceData
    from raylab.data.icu.prepare import Raw

log = logging.getLogger(__name__)

GROUP = "raylab"
"""of the entry points"""
FOLDER = "plugins"
"""of a run, or of a model: the code that it needs"""
PLACE = "plugin "
"""how the name of a plugin's file begins in tracebacks"""


@dataclass(frozen=True)
class OwnModel:
    """A model. `settings`: the class of its recipe fields, a NetworkModel with `name: Literal["NAME"]`, or a Model if
    the network has neither dropout nor members. `build`: (settings, spec of the inputs, outputs) -> network, from
    `inputs` of this kind to logits [B, outputs]. `search`: what `tune` searches unless `--space` says so."""

    settings: type[Model]
    build: "Callable[[Any, dict[str, Any], int], nn.Module]"
    inputs: str = ICU_HOURLY
    search: Search | None = None


@dataclass(frozen=True)
class Plugin:
    """What a file or a package adds: models, sources of intensive-care data by name, and tasks."""

    models: tuple[OwnModel, ...] = ()
    sources: "Mapping[str, Callable[[Raw], SourceData]]" = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()

    def names(self) -> dict[str, list[str]]:
        """{"model": [its names], "source": ..., "task": ...}"""
        models = [name for one in self.models for name in model_names(one.settings)]
        return {"model": models, "source": list(self.sources), "task": [task.name for task in self.tasks]}


class Code(NamedTuple):
    """The file of a plugin: its name without a directory, and its text."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Loaded:
    """A plugin in this process. `origin`: its file or package. `version`: the file's SHA-256, or the package's
    version. `code`: of a file. `path`: of a file that was named; stored code has none."""

    origin: str
    version: str
    plugin: Plugin
    code: Code | None = None
    path: Path | None = None


_loaded: dict[str, Loaded] = {}  # by origin
_named: set[str] = set()  # SHA-256 of code that this process was told to load
_searched = False  # whether installed packages were looked for


def load_file(path: Path) -> Loaded:
    """Execute the plugin in the file `path`, add its parts, and remember its content as allowed.

    A file of the same name that was loaded before is replaced. Raises UsageError if it cannot be read or executed, or
    if one of its names is taken.
    """
    try:
        code = Code(path.name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--plugin {path} could not be read", str(error), "give a Python file") from error
    found = replace(load_code(code), path=path)
    _loaded[code.name] = found
    _allow(code)
    return found


def load_code(code: Code) -> Loaded:
    """Execute the code of a plugin unless it is loaded already, and add its parts: see `load_file`."""
    _named.add(code.sha256)
    known = _loaded.get(code.name)
    if known is not None and known.version == code.sha256:
        return known
    found = Loaded(code.name, code.sha256, _read_plugin(_execute(code), code.name), code)
    _register(found)
    return found


def load_stored(directory: Path) -> None:
    """Load the plugins in `directory`/plugins, which a run or model was stored with.

    Raises UsageError for code that this user has never named.
    """
    for path in sorted((directory / FOLDER).glob("*.py")):
        code = Code(path.name, path.read_text(encoding="utf-8"))
        if code.sha256 not in _named and code.sha256 not in _read_allowed():
            raise UsageError(
                f"{directory} needs the code in {path}, which is not executed unasked",
                "it is stored with the run or model, may be another user's, and could do all that you can",
                f"read it; if you trust it, add --plugin {path} (once; in Python: raylab.load_plugin)",
            )
        load_code(code)


def load_installed() -> None:
    """Load the plugins of installed packages, once in a process."""
    global _searched
    if _searched:
        return
    _searched = True  # first: a plugin may ask for a task
    for point in metadata.entry_points(group=GROUP):
        package = point.dist.name if point.dist else point.value
        do = f"correct or uninstall the package {package}"
        try:
            module_or_plugin = point.load()
        except Exception as error:
            raise UsageError(f"the plugin of the package {package} could not be loaded", _explain(error), do) from error
        plugin = _read_plugin(module_or_plugin, package)
        _register(Loaded(package, point.dist.version if point.dist else "", plugin))


def used_by(recipe: Recipe) -> list[Loaded]:
    """The plugins that define the task or the model of a recipe."""
    return [
        found
        for found in _loaded.values()
        if recipe.task in found.plugin.names()["task"] or recipe.model.name in found.plugin.names()["model"]
    ]


def versions_of_data(task: str, source: str) -> dict[str, str]:
    """{file or package: SHA-256 or version} of the plugins that define the task or the source of data."""
    found = [one for one in _loaded.values() if task in one.plugin.names()["task"] or source in one.plugin.sources]
    return versions(found)


def code_of(recipe: Recipe) -> list[Code]:
    """The files that a recipe needs: for its run's directory, and for `load_all` in processes that do not have them."""
    return [found.code for found in used_by(recipe) if found.code is not None]


def loaded_code() -> list[tuple[str, str]]:
    """Name and text of every file that is loaded in this process, for `load_all`."""
    return [(one.code.name, one.code.text) for one in _loaded.values() if one.code is not None]


def load_all(codes: Iterable[tuple[str, str]]) -> None:
    """Load code, as (name, text), that another process of this user has loaded."""
    for name, text in codes:
        load_code(Code(name, text))


def versions(found: Iterable[Loaded]) -> dict[str, str]:
    """{file or package: SHA-256 or version}"""
    return {one.origin: one.version for one in found}


def options_for(task: str) -> str:
    """The option ` --plugin FILE` of a command that names this task; empty if the task ships or is installed."""
    own = [found.path for found in _loaded.values() if found.path is not None and task in found.plugin.names()["task"]]
    return "".join(f" --plugin {path}" for path in own)


def search_of(model: str) -> Search | None:
    """The search space that the plugin of a model gives it; None if it gives none, and for models that ship."""
    own = [one for found in _loaded.values() for one in found.plugin.models if model in model_names(one.settings)]
    return own[0].search if own else None


class _TextLoader(ExecutionLoader):
    """Lets Python import a plugin's text, and find it for tracebacks and for the descriptions of fields."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def get_filename(self, fullname: str) -> str:
        return f"{PLACE}{self.code.name}"

    def get_source(self, fullname: str) -> str:
        return self.code.text


def _execute(code: Code) -> ModuleType:
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
    except Exception as error:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        do = "correct the file"
        raise UsageError(f"the plugin {code.name} could not be loaded", _explain(error), do) from error
    return module


def _explain(error: Exception) -> str:
    """What went wrong while a plugin was executed, and the last line of code that took part."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f"line {one.lineno}: " for one in reversed(frames) if one.filename.startswith(PLACE)), "")
    return f"{place}{type(error).__name__}: {error}"


def _read_plugin(found: object, origin: str) -> Plugin:
    """The checked PLUGIN of a module; UsageError says what is wrong with it."""
    plugin = getattr(found, "PLUGIN", None) if isinstance(found, ModuleType) else found
    do = "see docs/extend.md"
    if not isinstance(plugin, Plugin):
        raise UsageError(f"the plugin {origin} has no PLUGIN", "it must be a raylab.tasks.plugins.Plugin", do)
    for model in plugin.models:
        settings = model.settings
        if not (isinstance(settings, type) and issubclass(settings, Model) and model_names(settings)):
            why = "it is a subclass of raylab.config.recipe.Model or NetworkModel with a field name: Literal['NAME']"
            raise UsageError(f"the plugin {origin}: {settings!r} cannot be the settings of a model", why, do)
        if model.inputs not in FAMILIES:
            raise unknown("kind of inputs", model.inputs, FAMILIES)
    for task in plugin.tasks:
        kind = type(task.full).model_fields["task"].annotation
        if not all(isinstance(one, Recipe) and one.task == task.name for one in (task.full, task.smoke)):
            raise UsageError(f"the plugin {origin}: the recipes of task '{task.name}' are of another task ({kind})")
        if type(task.full).inputs not in FAMILIES:
            raise unknown("kind of inputs", type(task.full).inputs, FAMILIES)
    return plugin


def _register(found: Loaded) -> None:
    """Add the parts of a plugin to the registries, in place of those that the same file had before."""
    before = _loaded.get(found.origin)
    if before is not None:
        _remove(before)
    try:
        _check_free(found)
    except UsageError:
        if before is not None:
            _add(before)
        raise
    _add(found)


def _check_free(found: Loaded) -> None:
    from raylab.data.icu.prepare import SOURCES

    models = [name for of in FAMILIES.values() for family in of for name in model_names(family)]
    taken = {"model": models, "source": list(SOURCES), "task": list(TASKS)}
    for kind, names in found.plugin.names().items():
        for name in names:
            if name in taken[kind] or names.count(name) > 1:
                why = "raylab or another plugin has one of this name"
                raise UsageError(f"the plugin {found.origin}: the {kind} '{name}' is taken", why, "choose another name")


def _add(found: Loaded) -> None:
    for model in found.plugin.models:
        from raylab.models import MODELS  # loads torch, as the plugin has done

        FAMILIES[model.inputs].insert(0, model.settings)  # before those that accept every name
        MODELS[model.inputs] |= dict.fromkeys(model_names(model.settings), model.build)
    if found.plugin.sources:
        from raylab.data.icu.prepare import SOURCES

        SOURCES.update(found.plugin.sources)
    TASKS.update({task.name: task for task in found.plugin.tasks})
    _loaded[found.origin] = found


def _remove(found: Loaded) -> None:
    for model in found.plugin.models:
        from raylab.models import MODELS

        FAMILIES[model.inputs].remove(model.settings)
        for name in model_names(model.settings):
            del MODELS[model.inputs][name]
    if found.plugin.sources:
        from raylab.data.icu.prepare import SOURCES

        for name in found.plugin.sources:
            del SOURCES[name]
    for task in found.plugin.tasks:
        del TASKS[task.name]
    del _loaded[found.origin]


def allowed_file() -> Path:
    """The list of code that this user has named, beside the user's other settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "raylab" / "plugins.json"


def _read_allowed() -> dict[str, str]:
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


def _allow(code: Code) -> None:
    """Add code that was named to the list."""
    allowed = _read_allowed()
    if code.sha256 in allowed:
        return
    path = allowed_file()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(path, {**allowed, code.sha256: code.name})
    except OSError as error:
        log.warning("%s could not be written, so runs with %s will ask for --plugin: %s", path, code.name, error)
