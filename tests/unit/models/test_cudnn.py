"""Recurrent layers one by one, against torch's of all layers."""

import pytest
import torch
from torch import nn

from raylab.models.cudnn import run_layers


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_layers_one_by_one_are_those_of_one_call(kind):
    torch.manual_seed(1)
    net = kind(5, 8, 3, batch_first=True)
    x = torch.randn(4, 6, 5)
    assert torch.equal(run_layers(net, x), net(x)[0])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_dropout_between_layers_follows_the_seed_alone(kind):
    net, x = kind(5, 8, 2, batch_first=True, dropout=0.5), torch.randn(4, 6, 5)
    seen = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        seen.append(run_layers(net, x))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
