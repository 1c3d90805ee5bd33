"""A surrogate network of the lung model: standardised inputs [B, D] to standardised outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from raylab.config.recipe import ResidualModel
from raylab.models.dropout import Dropout
from raylab.models.shard_pass import Linear


class Residual(nn.Module):
    """Residual linear layers with SiLU, because the lung model is smooth."""

    def __init__(self, inputs: int, outputs: int, config: ResidualModel) -> None:
        super().__init__()
        self.first = Linear(inputs, config.hidden)
        self.layers = nn.ModuleList(Linear(config.hidden, config.hidden) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.head = Linear(config.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            h = h + layer(self.dropout(torch.nn.functional.silu(h)))
        return self.head(torch.nn.functional.silu(h))  # type: ignore[no-any-return]


def residual(config: ResidualModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Residual(len(spec["features"]), outputs, config)
