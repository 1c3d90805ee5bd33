"""Shards that share a pass have the bits of shards that are computed one by one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raylab.config.recipe import CXR_FRONTAL, CovidNetModel, RecurrentModel, ResidualModel
from raylab.models import network, recurrent
from raylab.models.ensemble import Ensemble
from raylab.models.shard_pass import Linear
from raylab.training import shard_gradients
from raylab.training.gradients import shard_gradient
from raylab.training.shard_gradients import CHECKS, VECTOR, Losses, ShardGradients, ShardInputs, can_take_passes

Found = list[tuple[int, Tensor, Tensor]]


def make_gru(generator: np.random.Generator, dropout: float, members: int = 1) -> tuple[nn.Module, int, int]:
    """A network of random size, its hours and its inputs per hour."""
    features, static, hours = (int(n) for n in generator.integers(1, 12, 3))
    hidden, layers = int(generator.integers(1, 40)), int(generator.integers(1, 4))
    config = RecurrentModel(name="gru", hidden=hidden, layers=layers, dropout=dropout)
    spec = {"features": [str(n) for n in range(features)], "static": [str(n) for n in range(static)]}
    networks = [recurrent.gru(config, spec, 1) for _ in range(members)]
    return Ensemble(networks) if members > 1 else networks[0], hours, 3 * features + static


def losses_of(model: nn.Module) -> Losses:
    def losses(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x).flatten(1).mean(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none")

    return losses


def start(model: nn.Module) -> ShardGradients:
    return ShardGradients(model, list(model.parameters()), 3, "cpu", False)


def sample_inputs(generator: np.random.Generator, shards: range, rows: int, hours: int, width: int) -> ShardInputs:
    x = generator.standard_normal((len(shards) * rows, hours, width)).astype(np.float32)
    x[:, :, width // 4 : width // 2] = x[:, :, width // 4 : width // 2] > 0
    return ShardInputs(shards, torch.from_numpy(x), torch.from_numpy(generator.integers(0, 2, len(x))))


def compute(gradients: ShardGradients, inputs: ShardInputs, losses: Losses, step: int = 0) -> Found:
    found = gradients.compute(inputs, step, 100, losses)
    return [(shard, loss.clone(), gradient.clone()) for shard, loss, gradient in found]


def are_equal(one: Found, other: Found) -> bool:
    return all(
        a == b and torch.equal(loss, its_loss) and torch.equal(gradient, its_gradient)
        for (a, loss, gradient), (b, its_loss, its_gradient) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_pass_has_the_bits_of_its_shards(seed):
    """Networks and shards of random sizes, all splits of the shards over passes; on a machine where this fails, exact
    training is slower but still exact (the next tests)."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, hours, width = make_gru(generator, dropout=0.3, members=1 + seed % 2)
    rows, losses = VECTOR * int(generator.integers(1, 4)), losses_of(model)
    for step in range(3):
        inputs = sample_inputs(generator, range(2, 7), rows, hours, width)
        one_by_one = [each for part in inputs.split() for each in compute(start(model), part, losses, step)]
        for cuts in ((0, 5), (0, 2, 5), (0, 1, 5)):
            gradients, found = start(model), []
            for low, high in pairwise(cuts):
                part = ShardInputs(
                    inputs.shards[low:high],
                    inputs.x[low * rows : high * rows].clone(),
                    inputs.y[low * rows : high * rows].clone(),
                )
                found += compute(gradients, part, losses, step)
            assert are_equal(found, one_by_one)
            assert all(count == 1 for count in gradients.checks.values()), "the passes differed, and were not used"


@pytest.mark.parametrize("members", [1, 2])
def test_the_gradients_of_a_pass_are_those_of_autograd(members):
    generator = np.random.default_rng(0)
    model, hours, width = make_gru(generator, dropout=0.0, members=members)
    inputs = sample_inputs(generator, range(3), VECTOR, hours, width)
    losses = losses_of(model)
    for (_, loss, gradient), part in zip(compute(start(model), inputs, losses), inputs.split(), strict=True):
        expected = losses(part.x, part.y).sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            gradient, shard_gradient(expected / 100, list(model.parameters())), rtol=1e-4, atol=1e-7
        )


def test_single_rows_share_a_pass_where_their_bits_need_not_be_repeated():
    """As under a privacy budget: each row has the gradient that autograd gives it alone."""
    generator = np.random.default_rng(1)
    model, hours, width = make_gru(generator, dropout=0.0)
    gradients = ShardGradients(model, list(model.parameters()), 3, "cpu", False, repeats_bits=False)
    rows = [np.array([row]) for row in range(7)]
    assert gradients.group_shards(rows, range(7)) == [range(7)]
    assert len(start(model).group_shards(rows, range(7))) == 7, "bits of an exact sum must not depend on the pass"
    inputs, losses = sample_inputs(generator, range(7), 1, hours, width), losses_of(model)
    found = compute(gradients, inputs, losses)
    assert not gradients.checks
    for (_, loss, gradient), part in zip(found, inputs.split(), strict=True):
        alone = losses(part.x, part.y).sum()
        torch.testing.assert_close(loss, alone)
        expected = shard_gradient(alone / 100, list(model.parameters()))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


class Uneven(nn.Module):
    """Adds to the rows something that depends on their number: in every pass, or from the third on."""

    def __init__(self, harmless: int) -> None:
        super().__init__()
        self.harmless = harmless

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > VECTOR:
            self.harmless -= 1
            return x if self.harmless >= 0 else x + 1e-3
        return x


@pytest.mark.parametrize("harmless", [0, 2])
def test_a_pass_that_changes_bits_is_not_used(harmless):
    generator = np.random.default_rng(1)
    model = nn.Sequential(Linear(5, 3), Uneven(harmless), Linear(3, 1))
    gradients, losses = start(model), losses_of(model)
    for step in range(CHECKS + 2):
        inputs = sample_inputs(generator, range(4), VECTOR, 1, 5)
        inputs = ShardInputs(inputs.shards, inputs.x[:, 0], inputs.y)
        one_by_one = [each for part in inputs.split() for each in compute(start(model), part, losses, step)]
        assert are_equal(compute(gradients, inputs, losses, step), one_by_one)
    assert model[1].harmless == -1, "one pass that differed, and none after it"


def test_only_shards_that_fill_vectors_share_a_pass():
    gradients = start(nn.Sequential(Linear(2, 1)))

    def group(*sizes: int, own: range | None = None) -> list[range]:
        return gradients.group_shards([np.zeros(size) for size in sizes], own or range(len(sizes)))

    assert group(32, 32, 32, 32) == [range(4)]
    assert group(32, 32, 32, 32, own=range(2, 4)) == [range(2, 4)]
    assert group(64, 64, 63, 63) == [range(2), range(2, 3), range(3, 4)]
    assert group(96, 96, 32, 32) == [range(2), range(2, 4)]
    assert group(8, 8) == [range(1), range(1, 2)]
    gradients.size = 2**25  # 128 MB for each shard's gradient
    assert group(32, 32, 32) == [range(2), range(2, 3)]


def test_frozen_weights_have_no_gradient():
    generator = np.random.default_rng(2)
    model, hours, width = make_gru(generator, dropout=0.2)
    inputs, gradients = sample_inputs(generator, range(2), VECTOR, hours, width), start(model)
    compute(gradients, inputs, losses_of(model))  # leaves its values in the memory of the passes
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    head = sum(p.numel() for p in model.head.parameters())
    for _, _, gradient in compute(gradients, inputs, losses_of(model)):
        assert not gradient[:-head].any() and gradient[-head:].any()


@pytest.mark.parametrize(
    ("kind", "config", "takes"),
    [
        ("icu-hourly", RecurrentModel(name="gru", hidden=4), True),
        ("icu-hourly", RecurrentModel(name="lstm", hidden=4), False),
        ("icu-hourly", RecurrentModel(name="grud", hidden=4), False),
        ("lung-parameters", ResidualModel(name="residual", hidden=4), True),
        (CXR_FRONTAL, CovidNetModel(name="covidnet", width=0.1, depth=0.1), False),
    ],
)
def test_models_whose_weights_all_belong_to_such_layers_take_passes(kind, config, takes):
    spec = {"features": ["a", "b"], "static": ["s"], "size": 32}
    model = network(kind, config.name)(config, spec, 2)
    assert can_take_passes(model, "cpu", False) is takes
    assert can_take_passes(Ensemble([model, model]), "cpu", False) is takes
    assert not can_take_passes(model, "cuda", False) and not can_take_passes(model, "cpu", True)


def test_a_weight_outside_its_layer_is_an_error():
    """Its gradient would be the sum over the shards of a pass."""
    model = nn.Sequential(Linear(5, 1))
    x = torch.randn(2 * VECTOR, 5)
    inputs = ShardInputs(range(2), x, torch.zeros(len(x), dtype=torch.int64))
    with pytest.raises(AssertionError, match="outside its layer"):
        compute(start(model), inputs, lambda x, y: model(x)[:, 0] * model[0].weight.sum())


def test_the_memory_of_single_shards_is_bounded_and_changes_no_bit(monkeypatch):
    generator = np.random.default_rng(3)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    parts = [sample_inputs(generator, range(shard, shard + 1), 4, 1, 5) for shard in range(6)]
    every = [each for part in parts for each in compute(start(model), part, losses_of(model))]
    gradients = start(model)
    monkeypatch.setattr(shard_gradients, "PASS_BYTES", 2 * 4 * gradients.size)
    for _ in range(2):
        assert are_equal([each for part in parts for each in compute(gradients, part, losses_of(model))], every)
        assert len(gradients.rows) == 2
