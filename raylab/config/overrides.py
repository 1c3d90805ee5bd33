"""Applies settings of the command line, `--set optim.lr=3e-4`, to a recipe."""

from collections.abc import Mapping
from typing import Any

from raylab.config.old_names import FIELDS
from raylab.config.recipe import Model, Recipe, list_fields, model_family, model_names, recipe_types, validate
from raylab.errors import UsageError, unknown


def with_enough_shards(recipe: Recipe) -> Recipe:
    """The recipe with at least as many shards as its largest number of workers, so that each of them has work.

    UsageError when a batch has fewer samples than that.
    """
    most = max(recipe.scaling.workers[1], recipe.search.workers_per_trial)
    if most <= recipe.loop.shards:
        return recipe
    if most > recipe.loop.global_batch_size:
        raise UsageError(
            f"{most} workers cannot share a batch of {recipe.loop.global_batch_size} samples",
            "each of them needs one sample at least",
            f"--set loop.global_batch_size={most} or more, or fewer workers",
        )
    return override(recipe, {"loop.shards": most})


def without_weights(recipe: Recipe) -> Recipe:
    """The recipe with randomly initialised weights."""
    return recipe if recipe.model.weights_path is None else override(recipe, {"model.weights": None})


def has_field(recipe: Recipe, path: str) -> bool:
    """Whether the recipe has this field; the weight of one class (from 0) is one too: `optim.class_weight.2`."""
    parent, _, last = path.rpartition(".")
    return path in list_fields(recipe) or (parent == "optim.class_weight" and last.isdigit())


def unknown_field(recipe: Recipe, path: str) -> UsageError:
    """The error for a path that this recipe does not have. It names the models or tasks that do, or similar fields."""
    if path in FIELDS:
        return UsageError(f"the recipe field '{path}' is now '{FIELDS[path]}'", do=f"--set {FIELDS[path]}=VALUE")
    part, _, name = path.partition(".")
    if part == "model":
        owners = [
            owner for one in recipe.families() if name in one.model_fields for owner in model_names(one) or ("others",)
        ]
        if owners:
            return UsageError(
                f"the model {recipe.model.name} has no field '{name}'",
                f"models that have it: {', '.join(owners)}",
                f"fields of {recipe.model.name}: {', '.join(sorted(type(recipe.model).model_fields))}",
            )
    if part == "data":
        defaults = {task: kind.model_fields["data"].default for task, kind in recipe_types().items()}
        tasks = [task for task, data in defaults.items() if name in type(data).model_fields]
        if tasks:
            return UsageError(
                f"the task {recipe.task} has no field 'data.{name}'",
                f"tasks that have it: {', '.join(tasks)}",
                f"data fields of {recipe.task}: {', '.join(sorted(type(recipe.data).model_fields))}",
            )
    return unknown("recipe field", path, list_fields(recipe))


def shared_fields(one: type[Model], other: type[Model]) -> set[str]:
    """Names of the fields that two families of models describe in the same words: an own model's `width` may be units,
    and that of COVID-Net a factor."""
    fields, others = one.model_fields, other.model_fields
    return {name for name in fields.keys() & others.keys() if fields[name].description == others[name].description}


def override(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with `settings` {dotted path: value} applied; if only some class weights are given, the others are 1.

    Another `model.name` keeps the fields that mean the same in both models.
    """
    if settings.get("task", recipe.task) != recipe.task:
        raise UsageError(
            f"this recipe belongs to the task {recipe.task}", do=f"give the task as an argument: {settings['task']}"
        )
    if isinstance(name := settings.get("model.name"), str) and name != recipe.model.name:
        kept = recipe.model.model_dump(include=shared_fields(type(recipe.model), model_family(name)))
        recipe = validate(type(recipe), {**recipe.model_dump(), "model": {**kept, "name": name}})
    document = recipe.model_dump()
    for path, new in settings.items():
        if not has_field(recipe, path):
            raise unknown_field(recipe, path)
        *parents, leaf = path.split(".")
        if leaf.isdigit():
            place, leaf = int(leaf), parents.pop()
            given = document["optim"][leaf] or ()
            padded = [*given, *[1.0] * (place + 1 - len(given))]
            new = (*padded[:place], new, *padded[place + 1 :])
        at = document
        for name in parents:
            at = at[name]
        at[leaf] = new
    return validate(type(recipe), document)
