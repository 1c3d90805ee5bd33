"""The learning-rate schedule: a function of the step and of the number of reductions on a plateau."""

import math

from raylab.config.recipe import Schedule


def lr_scale(schedule: Schedule, step: int, planned: int, lr_reductions: int) -> float:
    """Return the factor on the learning rate at `step` of `planned`, after `lr_reductions` on a plateau."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, planned - schedule.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - schedule.warmup_steps) / span))
    if schedule.kind == "plateau":
        return schedule.factor**lr_reductions
    return 1.0
