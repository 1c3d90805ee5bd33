"""The tasks, by name. A new one is a file here and its name in this list, or a plugin (plugins.py)."""

from raylab.errors import unknown
from raylab.tasks import (
    ards,
    covidnet,
    landcover,
    landcover_multilabel,
    mortality,
    sections,
    sections_pretraining,
    surrogate,
)
from raylab.tasks.base import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        ards,
        covidnet,
        landcover,
        landcover_multilabel,
        mortality,
        sections,
        sections_pretraining,
        surrogate,
    )
}


def find_task(name: str) -> Task:
    """The task of this name; UsageError with those there are."""
    load_installed()
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def load_installed() -> None:
    """Add what installed packages define, once in a process."""
    from raylab.tasks import plugins  # which adds to TASKS

    plugins.load_installed()
