"""The recipes that ship, by name."""

from raylab.tasks import TASKS

RECIPES = {
    f"{name}{end}": recipe for name, task in TASKS.items() for end, recipe in (("", task.full), ("-smoke", task.smoke))
}
