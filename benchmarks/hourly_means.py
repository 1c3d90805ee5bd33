"""A network with about a hundred weights, for `benchmarks/federation_privacy.py`: noise hides less of it than of a GRU.

It is a plugin, model `means`: a linear layer over the means of all inputs over the hours, and over the last values.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from raylab.config.recipe import NetworkModel
from raylab.models.shard_pass import Linear
from raylab.tasks.plugins import OwnModel, Plugin

LARGEST = 4.0  # standard deviations


class MeansModel(NetworkModel):
    name: Literal["means"]
    """name of the model"""


class Means(nn.Module):
    """x [B, T, 3F + S] -> logits [B, outputs]."""

    def __init__(self, settings: MeansModel, spec: dict[str, Any], outputs: int) -> None:
        super().__init__()
        self.features = len(spec["features"])
        self.head = Linear(4 * self.features + len(spec["static"]), outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-LARGEST, LARGEST)
        return self.head(torch.cat([x.mean(1), x[:, -1, : self.features]], 1))


PLUGIN = Plugin(models=(OwnModel(MeansModel, Means),))
