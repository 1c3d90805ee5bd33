"""Transfer: which layers are trained at a step, and at which learning rate.

It is a function of the step alone, so that a run can resume at any step.

scratch   the parent's weights are not used
probe     linear probe: only the head is trained, on frozen features
full      all layers are fine-tuned from the first step
lp-ft     a linear probe first, then all layers (Kumar et al., arXiv 2202.10054), so that a random head does not
          distort the features

A network without a parent or given weights trains all layers at one learning rate, whatever the recipe's transfer part.
"""

import re

from torch import nn

from raylab.config.recipe import Recipe
from raylab.models.weights import is_head
from raylab.training.lr import lr_scale


class FinetuneSchedule:
    """The phases of a run: the first `probe_steps` steps are a linear probe, the rest fine-tuning."""

    def __init__(self, recipe: Recipe, model: nn.Module, per_epoch: int, transferred: bool) -> None:
        how, epochs = recipe.transfer, recipe.loop.epochs
        mode = how.mode if transferred else "scratch"
        probing = {"probe": epochs, "lp-ft": min(epochs - 1, max(1, round(how.probe_fraction * epochs)))}.get(mode, 0)
        self.recipe = recipe
        self.planned = epochs * per_epoch
        self.probe_steps = probing * per_epoch
        self.learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        all_layers = layer_lr_scales(
            [name for name, _ in self.learning], how.first_lr_scale if mode in ("full", "lp-ft") else 1.0
        )
        self.lr_scales = {True: [float(is_head(name)) for name, _ in self.learning], False: all_layers}
        self.is_whole = False  # the network was set up for training all layers

    def is_probing(self, step: int) -> bool:
        return step < self.probe_steps

    def prepare_step(self, model: nn.Module, step: int) -> list[float]:
        """Set up the network for `step`; return the learning-rate scale of every weight, 0 for frozen ones.

        During the probe, everything but the head is in eval mode: dropout is off and batch norm keeps its statistics.
        """
        probing = self.is_probing(step)
        scales = self.lr_scales[probing]
        if not probing and self.is_whole and model.training:
            return scales  # setting up a small network at every step would take a tenth of its step on a GPU
        self.is_whole = not probing
        model.train(not probing)
        if probing:
            for name, layer in model.named_modules():
                if is_head(f"{name}."):
                    layer.train()
        for (_, weight), scale in zip(self.learning, scales, strict=True):
            weight.requires_grad_(scale > 0)
        return scales

    def starts_finetuning(self, step: int) -> bool:
        """Whether `step` is the first one after a probe; patience restarts from zero there."""
        return step == self.probe_steps > 0

    def lr(self, step: int, lr_reductions: int) -> float:
        """Return the learning rate of the layer with scale 1. Each phase runs through the entire schedule."""
        optim, schedule = self.recipe.optim, self.recipe.schedule
        if self.is_probing(step):
            lr = optim.lr * self.recipe.transfer.probe_lr_scale
            return lr * lr_scale(schedule, step, self.probe_steps, lr_reductions)
        return optim.lr * lr_scale(schedule, step - self.probe_steps, self.planned - self.probe_steps, lr_reductions)


def layer_lr_scales(names: list[str], first: float) -> list[float]:
    """Return the learning-rate scale of every weight, by its name: 1 in the head, `first` in the first block, and
    geometric in between (discriminative learning rates, Howard and Ruder, arXiv 1801.06146)."""
    blocks = list(dict.fromkeys(_block(name) for name in names if not is_head(name)))
    depth = {block: at / len(blocks) for at, block in enumerate(blocks)}
    return [1.0 if is_head(name) else first ** (1 - depth[_block(name)]) for name in names]


def _block(name: str) -> str:
    """Return the block of a weight: `stages.3` for `stages.3.blocks.0.weight`, `layer1` for
    `body.layer1.0.conv1.weight`."""
    parts = re.sub(r"^(members\.\d+\.)?(body\.)?", "", name).split(".")
    containers = {"stages", "features", "encoder", "layers"}
    at = next(i for i, part in enumerate(parts) if part not in containers or i == len(parts) - 1)
    return ".".join(parts[: at + 1])
