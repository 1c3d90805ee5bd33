"""Names in recipes and checkpoints of version 0.1, whose runs and searches still resume, evaluate and compare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from raylab.config.recipe import TYPES, Recipe, model_family, parse_recipe
from raylab.errors import UsageError

V = TypeVar("V")

FIELDS = {
    "data.share": "data.class_fraction",
    "data.share_of": "data.class_fraction_of",
    "loop.batch": "loop.global_batch_size",
    "loop.early_stop": "loop.early_stopping_patience",
    "loop.ema": "loop.ema_decay",
    "loop.keep": "loop.max_checkpoints",
    "loop.sum": "loop.gradient_reduction",
    "model.rate": "model.learning_rate",
    "model.share": "model.feature_fraction",
    "optim.clip": "optim.max_grad_norm",
    "transfer.first_rate": "transfer.first_lr_scale",
    "transfer.probe_rate": "transfer.probe_lr_scale",
    "transfer.probe_share": "transfer.probe_fraction",
}
PROGRESS = {
    "cuts": "lr_reductions",
    "cut_wait": "epochs_since_lr_reduction",
    "waited": "epochs_since_best",
}


def rename_fields(values: Mapping[str, V]) -> dict[str, V]:
    """{dotted path: value} with today's paths."""
    return {FIELDS.get(path, path): value for path, value in values.items()}


def rename_progress(state: Mapping[str, V]) -> dict[str, V]:
    """A checkpoint's progress with today's names."""
    return {PROGRESS.get(name, name): value for name, value in state.items()}


def update_recipe(document: dict[str, Any]) -> dict[str, Any]:
    """A recipe's document with today's names, and without the fields of other models and tasks: version 0.1 wrote the
    fields of all of them."""
    document = {
        part: {FIELDS.get(f"{part}.{name}", f"{part}.{name}").partition(".")[2]: v for name, v in values.items()}
        if isinstance(values, dict)
        else values
        for part, values in document.items()
    }
    if search := document.get("search"):
        space, points = rename_fields(search["space"]), [rename_fields(point) for point in search["points"]]
        document["search"] = {**search, "space": space, "points": points}
    kind = TYPES.get(document["task"])
    if kind is None:
        return document
    own = {"model": model_family(document["model"]["name"]), "data": type(kind.model_fields["data"].default)}
    kept = {part: {k: v for k, v in document[part].items() if k in own[part].model_fields} for part in own}
    return {**document, **kept}


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file that a run has written; UsageError when there is none that can be used."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a valid recipe file", str(error), "restore it: the run itself writes it"
        ) from error
    return parse_recipe(update_recipe(document))
