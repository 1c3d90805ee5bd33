"""One's own models, sources and tasks, from a Python file or an installed package.

A plugin is a module with `PLUGIN = Plugin(...)`: a file that `--plugin FILE` names, or what an entry point of the group
`raylab` of an installed package refers to. Its parts join the registries of those that ship: FAMILIES
(config/recipe.py), MODELS (models/), SOURCES (data/icu/prepare.py) and TASKS.

The code of a file is stored with every run that uses it, and used from there on. Stored code may be another's. It is
executed only if this user has named the same content with `--plugin` before (plugin_code.py).
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from raylab.config.recipe import FAMILIES, ICU_HOURLY, Model, Recipe, Search, model_names
from raylab.errors import DataError, UsageError, unknown
from raylab.tasks import TASKS
from raylab.tasks.base import Task
from raylab.tasks.plugin_code import Code, allow, execute, explain, read_allowed

if TYPE_CHECKING:  # as in base.py
    from torch import nn

    from raylab.data.icu.concepts import SourceData
    from raylab.data.icu.prepare import Raw
    from raylab.data.samples import Samples

log = logging.getLogger(__name__)

GROUP = "raylab"
"""of the entry points"""
FOLDER = "plugins"
"""of a run, or of a model: the code that it needs"""


@dataclass(frozen=True)
class OwnModel:
    """A model. `settings`: the class of its recipe fields, a NetworkModel with `name: Literal["NAME"]`, or a Model if
    the network has neither dropout nor members. `build`: (settings, spec of the inputs, outputs) -> network, from
    `inputs` of this kind to logits [B, outputs]. `search`: what `tune` searches unless `--space` says so."""

    settings: type[Model]
    build: "Callable[[Any, dict[str, Any], int], nn.Module]"
    inputs: str = ICU_HOURLY
    search: Search | None = None

    def __post_init__(self) -> None:
        """Raises TypeError, which names the line of the plugin. `settings` is checked with the plugin's name."""
        if not callable(self.build):
            raise TypeError(f"`build` must be a class or function, not {self.build!r}")
        if not isinstance(self.inputs, str):
            raise TypeError(f"`inputs` must be the name of a kind of inputs, not {self.inputs!r}")
        if not isinstance(self.search, Search | None):
            raise TypeError(f"`search` must be a raylab.config.recipe.Search, not {self.search!r}")


@dataclass(frozen=True)
class Plugin:
    """What a file or a package adds: models, sources of intensive-care data by name, and tasks."""

    models: tuple[OwnModel, ...] = ()
    sources: "Mapping[str, Callable[[Raw], SourceData]]" = field(default_factory=dict)
    tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        """Raises TypeError, which names the line of the plugin."""
        for name, parts, kind in (("models", self.models, OwnModel), ("tasks", self.tasks, Task)):
            if not isinstance(parts, tuple | list) or not all(isinstance(part, kind) for part in parts):
                raise TypeError(f"`{name}` must be a tuple of {kind.__name__}, as (ONE,), not {parts!r}")
        sources = self.sources.items() if isinstance(self.sources, Mapping) else [(None, None)]
        if not all(isinstance(name, str) and callable(read) for name, read in sources):
            raise TypeError(f"`sources` must be {{name: function}}, not {self.sources!r}")

    def names(self) -> dict[str, list[str]]:
        """{"model": [its names], "source": ..., "task": ...}"""
        models = [name for one in self.models for name in model_names(one.settings)]
        return {"model": models, "source": list(self.sources), "task": [task.name for task in self.tasks]}


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
    code = Code.read(path)
    found = replace(load_code(code), path=path)
    _loaded[code.name] = found
    allow(code)
    return found


def load_code(code: Code) -> Loaded:
    """Execute the code of a plugin unless it is loaded already, and add its parts: see `load_file`."""
    _named.add(code.sha256)
    known = _loaded.get(code.name)
    if known is not None and known.version == code.sha256:
        return known
    found = Loaded(code.name, code.sha256, _read_plugin(execute(code), code.name), code)
    _register(found)
    return found


def load_stored(directory: Path) -> None:
    """Load the plugins in `directory`/plugins, which a run or model was stored with.

    Raises UsageError for code that this user has never named.
    """
    for path in sorted((directory / FOLDER).glob("*.py")):
        read = f"read it (of a registered model: plugins/{path.name} in the artifacts of its run)"
        load_trusted(Code.read(path), directory, path, read)


def load_trusted(code: Code, owner: Path, path: Path, read: str) -> None:
    """Load code that `owner` has stored in `path`; UsageError, with how to `read` it, if this user has never named
    it."""
    if code.sha256 not in _named and code.sha256 not in read_allowed():
        raise UsageError(
            f"{owner} needs the code in {path}, which is not executed unasked",
            "it is stored with the run or model, may be another user's, and could do all that you can",
            f"{read}; if you trust it, add --plugin {path} (once; in Python: raylab.load_plugin)",
        )
    named = _loaded.get(code.name)
    if named is not None and named.path is not None and named.version != code.sha256:
        log.warning("%s keeps the %s with which it began, so %s is not used", owner, code.name, named.path)
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
        except (Exception, SystemExit) as error:
            raise UsageError(f"the plugin of the package {package} could not be loaded", explain(error), do) from error
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
        if why := _explain_defaults(settings):
            raise UsageError(f"the plugin {origin}: the defaults of {settings.__name__} are invalid", why, do)
        if model.inputs not in FAMILIES:
            raise unknown("kind of inputs", model.inputs, FAMILIES)
    for task in plugin.tasks:
        kind = type(task.full).model_fields["task"].annotation
        if not all(isinstance(one, Recipe) and one.task == task.name for one in (task.full, task.smoke)):
            raise UsageError(f"the plugin {origin}: the recipes of task '{task.name}' are of another task ({kind})")
        if type(task.full).inputs not in FAMILIES:
            raise unknown("kind of inputs", type(task.full).inputs, FAMILIES)
    return plugin


def _explain_defaults(settings: type[Model]) -> str:
    """Which defaults of a model's settings are of another type or out of bounds; empty if none is."""
    fields = settings.model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    try:
        settings.model_validate({**defaults, "name": model_names(settings)[0]})
    except ValidationError as error:
        wrong = [one for one in error.errors(include_url=False) if not fields[str(one["loc"][0])].is_required()]
        return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}, got {one['input']!r}" for one in wrong)
    return ""


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


def check_network(task: Task, recipe: Recipe, samples: "Samples") -> None:
    """Raise UsageError if the network of an own model cannot be built for these samples, or returns something else than
    logits [B, outputs]. Nothing is checked of a model that ships."""
    import numpy as np
    import torch

    own = [found for found in used_by(recipe) if recipe.model.name in found.plugin.names()["model"]]
    if not own:
        return
    name, outputs = recipe.model.name, task.outcome.count(samples.spec)
    do = f"correct {own[0].origin}"
    x = samples.batch(np.zeros(2, dtype=np.int64))
    try:
        network = task.model(recipe, samples.spec).eval()
        with torch.no_grad():
            found = network(x)
    except (UsageError, DataError):
        raise
    except Exception as error:
        what = f"the network of model '{name}' does not work on inputs of shape {tuple(x.shape)}"
        raise UsageError(what, explain(error), do) from error
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape not in ((2, outputs), (2, getattr(recipe.model, "members", 1), outputs)):
        why = "it must return logits [rows, outputs]"
        raise UsageError(f"the network of model '{name}' returned {shape} for 2 rows and {outputs} outputs", why, do)
