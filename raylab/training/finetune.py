"""Transfer: which layers learn at a step and how fast; a function of the step alone, so that it resumes anywhere.

scratch   the parent's weights are left alone
probe     linear probe: the head alone learns, on features that stay as they are
full      fine-tuning of everything from the first step
lp-ft     a linear probe first, then everything (Kumar et al., arXiv 2202.10054): the head no longer distorts the
          features while it is random

A network without a parent or given weights learns as a whole at one rate, whatever the recipe's transfer part says.
"""

import math
import re

from torch import nn

from raylab.config.recipe import Recipe, Schedule
from raylab.models.weights import is_head


class Plan:
    """The phases of a run: the first `probe_steps` steps are a linear probe, the rest fine-tuning."""

    def __init__(self, recipe: Recipe, model: nn.Module, per_epoch: int, transferred: bool) -> None:
        how, epochs = recipe.transfer, recipe.loop.epochs
        mode = how.mode if transferred else "scratch"
        probing = {"probe": epochs, "lp-ft": min(epochs - 1, max(1, round(how.probe_share * epochs)))}.get(mode, 0)
        self.recipe = recipe
        self.planned = epochs * per_epoch
        self.probe_steps = probing * per_epoch
        self.learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        whole = layer_rates([name for name, _ in self.learning], how.first_rate if mode in ("full", "lp-ft") else 1.0)
        self.rates = {True: [float(is_head(name)) for name, _ in self.learning], False: whole}

    def probing(self, step: int) -> bool:
        return step < self.probe_steps

    def enter(self, model: nn.Module, step: int) -> list[float]:
        """Set the network up for `step`; returns the share of the learning rate of every weight, 0 for frozen ones.

        While probing, all but the head is in eval mode: dropout is off and batch norm keeps its statistics.
        """
        probing = self.probing(step)
        model.train(not probing)
        rates = self.rates[probing]
        if probing:
            for name, layer in model.named_modules():
                if is_head(f"{name}."):
                    layer.train()
        for (_, weight), rate in zip(self.learning, rates, strict=True):
            weight.requires_grad_(rate > 0)
        return rates

    def starts_tuning(self, step: int) -> bool:
        """Whether `step` is the first after a probe: what was waited for then counts anew."""
        return step == self.probe_steps > 0

    def rate(self, step: int, cuts: int) -> float:
        """The learning rate of the fastest layer. Each phase has the schedule to itself."""
        optim, schedule = self.recipe.optim, self.recipe.schedule
        if self.probing(step):
            return optim.lr * self.recipe.transfer.probe_rate * schedule_share(schedule, step, self.probe_steps, cuts)
        return optim.lr * schedule_share(schedule, step - self.probe_steps, self.planned - self.probe_steps, cuts)


def layer_rates(names: list[str], first: float) -> list[float]:
    """The share of the learning rate of every weight, by its name: 1 in the head, `first` in the first block, and
    geometric between (discriminative rates, Howard and Ruder, arXiv 1801.06146)."""
    blocks = list(dict.fromkeys(_block(name) for name in names if not is_head(name)))
    depth = {block: at / len(blocks) for at, block in enumerate(blocks)}
    return [1.0 if is_head(name) else first ** (1 - depth[_block(name)]) for name in names]


def schedule_share(schedule: Schedule, step: int, planned: int, cuts: int) -> float:
    """The share of the rate that `step` of `planned` uses, after `cuts` of the plateau schedule."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, planned - schedule.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * (step - schedule.warmup_steps) / span))
    if schedule.kind == "plateau":
        return schedule.factor**cuts
    return 1.0


def _block(name: str) -> str:
    """`stages.3` of `stages.3.blocks.0.weight`, `layer1` of `body.layer1.0.conv1.weight`."""
    parts = re.sub(r"^(members\.\d+\.)?(body\.)?", "", name).split(".")
    containers = {"stages", "features", "encoder", "layers"}
    at = next(i for i, part in enumerate(parts) if part not in containers or i == len(parts) - 1)
    return ".".join(parts[: at + 1])
