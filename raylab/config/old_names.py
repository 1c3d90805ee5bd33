"""Field names of earlier versions, so that their runs and searches still resume, evaluate and compare."""

from collections.abc import Mapping
from typing import TypeVar

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
REMOVED = ("scaling.resize_seconds",)
"""fields that no longer have a meaning"""
PROGRESS = {
    "cuts": "lr_reductions",
    "cut_wait": "epochs_since_lr_reduction",
    "waited": "epochs_since_best",
}


def rename_fields(values: Mapping[str, V]) -> dict[str, V]:
    """{dotted path: value} with the present paths, without those that were removed."""
    return {FIELDS.get(path, path): value for path, value in values.items() if path not in REMOVED}


def rename_progress(state: Mapping[str, V]) -> dict[str, V]:
    """A checkpoint's progress with the present names."""
    return {PROGRESS.get(name, name): value for name, value in state.items()}
