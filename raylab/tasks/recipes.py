"""Recipes by task: read from files and documents, and those that ship."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylab.config.old_names import rename_fields
from raylab.config.overrides import has_field
from raylab.config.recipe import Recipe, Search, model_family, validate
from raylab.errors import UsageError
from raylab.files import parse_json
from raylab.tasks import TASKS, find_task, load_installed
from raylab.tasks.plugins import load_stored, search_of


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """The recipe of a parsed JSON document; UsageError names every field that does not fit."""
    return validate(_type(document.get("task")), document)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file that a run has written, beside the code that it needs; UsageError when there is none
    that can be used."""
    load_stored(path.parent)
    what, do = f"{path} is not a valid recipe file", "restore it: the run itself writes it"
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(what, f"{type(error).__name__}: {error}", do) from error
    return parse_stored_recipe(document, what, do)


def parse_stored_recipe(document: Any, what: str, do: str) -> Recipe:
    """The recipe of a JSON value that this or an earlier version has stored. Raises UsageError, which says `what` could
    not be read and what to `do`, for a value of any other form."""
    try:
        return parse_recipe(update_recipe(document))
    except UsageError as error:
        why = f"{error.what}{f': {error.why}' if error.why else ''}"
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
    raise UsageError(what, why, do)


def update_recipe(document: dict[str, Any]) -> dict[str, Any]:
    """A recipe's document with today's names, and without the fields of other models and tasks: version 0.1 wrote the
    fields of all of them."""
    document = {
        part: _rename_in(part, values) if isinstance(values, dict) else values for part, values in document.items()
    }
    if search := document.get("search"):
        space, points = rename_fields(search["space"]), [rename_fields(point) for point in search["points"]]
        document["search"] = {**search, "space": space, "points": points}
    kind = _type(document["task"])
    if kind is Recipe:
        return document
    own = {"model": model_family(document["model"]["name"]), "data": type(kind.model_fields["data"].default)}
    kept = {part: {k: v for k, v in document[part].items() if k in own[part].model_fields} for part in own}
    return {**document, **kept}


def _rename_in(part: str, values: dict[str, Any]) -> dict[str, Any]:
    renamed = rename_fields({f"{part}.{name}": value for name, value in values.items()})
    return {path.removeprefix(f"{part}."): value for path, value in renamed.items()}


def _type(task: object) -> type[Recipe]:
    """The type of a task's recipes; plain for a task that is not among TASKS."""
    load_installed()
    return type(TASKS[task].full) if isinstance(task, str) and task in TASKS else Recipe


def shipped_recipe(task: str, smoke: bool = False) -> Recipe:
    """The recipe that ships for a task: the full one, or the small one of tests and first tries."""
    found = find_task(task)
    return found.smoke if smoke else found.full


def with_search_space(recipe: Recipe) -> Recipe:
    """The recipe with the search space of its model, where that is not the recipe's own."""
    own = find_task(recipe.task).searches.get(recipe.model.name) or search_of(recipe.model.name)
    if own is None:
        own = _search_fields(recipe)
    if recipe.search.space.keys() == own.space.keys():
        return recipe
    kept = recipe.search.model_dump(exclude={"space", "points"})
    return recipe.model_copy(update={"search": Search(space=own.space, points=own.points, **kept)})


def _search_fields(recipe: Recipe) -> Search:
    """The recipe's search, of those fields that its model has."""
    space = {path: text for path, text in recipe.search.space.items() if has_field(recipe, path)}
    points = [{path: value for path, value in point.items() if path in space} for point in recipe.search.points]
    return Search(space=space, points=tuple(points))
