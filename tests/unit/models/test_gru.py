"""raylab's GRU and dropout against torch's."""

import copy

import pytest
import torch
from torch import nn

from raylab.models.dropout import Dropout
from raylab.models.gru import Gru


@pytest.mark.parametrize(("inputs", "hidden", "layers", "hours"), [(5, 8, 1, 12), (3, 7, 2, 4), (16, 16, 3, 1)])
def test_states_and_gradients_are_those_of_torch(inputs, hidden, layers, hours):
    torch.manual_seed(1)
    theirs = nn.GRU(inputs, hidden, layers, batch_first=True).double()
    ours = Gru(inputs, hidden, layers, batch_first=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, hours, inputs, dtype=torch.float64)
    slope = torch.randn(6, hours, hidden, dtype=torch.float64)
    seen = []
    for cell in (theirs, ours):
        given = x.clone().requires_grad_()
        states, _ = cell(given)
        (states * slope).sum().backward()
        seen.append([states, given.grad, *(p.grad for p in cell.parameters())])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_predictions_are_torchs_to_the_bit():
    theirs = nn.GRU(5, 8, 2, batch_first=True).eval()
    ours = Gru(5, 8, 2, batch_first=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 12, 5)
    with torch.no_grad():
        assert torch.equal(ours(x)[0], theirs(x)[0])


def test_layers_are_separated_by_dropout_in_training():
    cell = Gru(4, 8, 2, batch_first=True, dropout=0.5)
    x = torch.randn(3, 5, 4)
    torch.manual_seed(0)
    one = cell(x)[0]
    other = cell(x)[0]
    torch.manual_seed(0)
    assert torch.equal(cell(x)[0], one) and not torch.equal(one, other)
    cell.eval()
    assert torch.equal(cell(x)[0], cell(x)[0])


def test_bfloat16_trains():
    cell = Gru(4, 8, batch_first=True)
    with torch.autocast("cpu", torch.bfloat16):
        cell(torch.randn(3, 5, 4))[0].float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_that_many(p):
    torch.manual_seed(0)
    x = torch.ones(400, 500, requires_grad=True)
    out = Dropout(p)(x)
    assert (out == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    assert out.double().mean().item() == pytest.approx(1, abs=0.02)
    assert out.max().item() == pytest.approx(1 / (1 - p), rel=2e-4)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_dropout_changes_nothing_outside_training():
    layer, x = Dropout(0.5).eval(), torch.randn(3, 4)
    assert torch.equal(layer(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert copy.deepcopy(layer).p == 0.5
