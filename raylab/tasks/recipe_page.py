"""Recipes for reading: the lines of `raylab recipe`, and the page of the documentation, which

    python -m raylab.tasks.recipe_page > docs/recipe-fields.md

writes.
"""

from collections.abc import Iterable
from typing import Any

from raylab.config.recipe import Recipe, list_fields, model_names
from raylab.tasks import TASKS
from raylab.tasks.recipes import parse_recipe

HEADER = """# Recipe fields

Written by `python -m raylab.tasks.recipe_page` from the descriptions in `raylab/config/recipe.py` and of the tasks. \
`raylab recipe TASK --model M` prints the values of a shipped recipe; [recipes](recipes.md) explains their use.
"""


def lines(recipe: Recipe) -> list[str]:
    """One line a field: path, value and description, in columns."""
    rows = [(path, text(value), description) for path, (value, description) in list_fields(recipe).items()]
    width, wide = max(len(path) for path, _, _ in rows), min(24, max(len(value) for _, value, _ in rows))
    return [f"{path:{width}}  {value:{wide}}  {description}" for path, value, description in rows]


def text(value: Any) -> str:
    """A value as --set takes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, int) for one in value):
        return ":".join(str(one) for one in dict.fromkeys(value))  # scaling.workers
    return f"{value:g}" if isinstance(value, float) else str(value)


def markdown() -> str:
    """The page: fields that all recipes have with their defaults, then those of each task and family of models."""
    common = {
        path: row
        for path, row in list_fields(parse_recipe({"task": "", "model": {"name": ""}})).items()
        if path != "task"
    }
    page = [HEADER, "## Every recipe", *table(common.items())]
    for task, of in TASKS.items():
        kind = type(of.full)
        for family in kind.families():
            known = model_names(family)
            name = known[0] if known else "NAME"
            own = list_fields(parse_recipe({"task": task, "model": {"name": name}})).items()
            title = ", ".join(known) or "other classifiers of torchvision"
            new = [(path, row) for path, row in own if path not in common and path.startswith("model.")]
            data = [(path, row) for path, row in own if path not in common and path.startswith("data.")]
            if family is kind.families()[0] and data:
                page += [f"## Task {task}", *table(data)]
            page += [f"### Models of {task}: {title}", *table(new)]
    return "\n".join(page)


def table(rows: Iterable[tuple[str, tuple[Any, str]]]) -> list[str]:
    """A Markdown table of fields, with an empty line behind it."""
    body = [f"| `{path}` | {text(value)} | {description} |" for path, (value, description) in rows]
    return ["", "| field | default | what it is |", "|---|---|---|", *body, ""]


if __name__ == "__main__":
    print(markdown(), end="")
