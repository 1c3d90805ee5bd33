"""Gradients as one vector, in the memory layout of their weights."""

import torch
from torch import nn

from raylab.config.recipe import Optim
from raylab.training.adamw import AdamW
from raylab.training.gradients import flatten_gradients, shard_gradient


def train(layout: torch.memory_format) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1))
    x = torch.randn(4, 3, 9, 9)
    model.to(memory_format=layout)
    weights = list(model.parameters())
    flat, optimizer = flatten_gradients(weights), AdamW(weights)
    for _ in range(3):
        flat.copy_(shard_gradient(model(x).square().mean(), weights))
        optimizer.step(0.01, Optim())
    return {name: weight.detach().contiguous() for name, weight in model.named_parameters()}


def test_channels_last_weights_take_the_same_steps():
    """The fused AdamW pairs elements by their place in memory: a gradient in another order moves other weights."""
    plain, other = train(torch.contiguous_format), train(torch.channels_last)
    for name, weight in plain.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-5)
