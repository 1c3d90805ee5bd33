from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raylab.config.recipe import CovidNetModel
from raylab.errors import DataError
from raylab.models.covidnet import covidnet, large
from raylab.models.vision import describe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: on a busy machine a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = CovidNetModel(name="covidnet", width=0.25, depth=0.4)


@pytest.mark.parametrize("size", [32, 64, 96, 101])
def test_any_input_size(size: int) -> None:
    assert covidnet(SMALL, {}, 3)(torch.randn(2, 1, size, size)).shape == (2, 3)


def test_published_layout() -> None:
    model = covidnet(CovidNetModel(name="covidnet"), {}, 3)
    stages = [stage for stage in model.stages if hasattr(stage, "blocks")]
    assert [len(stage.blocks) for stage in stages] == [3, 4, 6, 3]
    assert [stage.blocks[-1][-3].out_channels for stage in stages] == [56, 112, 216, 424]
    cost = describe(model, 224)
    assert 1.4e6 < cost["parameters"] < 1.6e6 and 0.3e9 < cost["macs"] < 0.33e9
    assert model.head.out_features == 3


def test_width_and_depth_scale() -> None:
    small, full = (describe(covidnet(c, {}, 3), 64) for c in (SMALL, CovidNetModel(name="covidnet")))
    assert small["parameters"] < full["parameters"] / 20


def test_seed_decides_the_weights() -> None:
    def state(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(covidnet(SMALL, {}, 3).parameters())

    assert torch.equal(state(1), state(1)) and not torch.equal(state(1), state(2))


def test_learns_and_every_parameter_takes_part() -> None:
    torch.manual_seed(0)
    model = covidnet(SMALL, {}, 2)
    y = torch.arange(16) % 2
    x = torch.randn(16, 1, 32, 32) + y[:, None, None, None]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] / 2


def test_small_and_large() -> None:
    """Reconstructions: the large one has 3.15 times the MACs of the small one, as the published two."""
    small, big = (describe(make(CovidNetModel(name="covidnet"), {}, 3), 480)["macs"] for make in (covidnet, large))
    assert big / small == pytest.approx(23.63 / 7.50, rel=0.1)


def test_weights_of_another_width_are_refused(tmp_path: Path) -> None:
    narrow = covidnet(SMALL, {}, 3)
    save_file(narrow.state_dict(), tmp_path / "w.safetensors")
    again = covidnet(SMALL.model_copy(update={"weights": str(tmp_path / "w.safetensors")}), {}, 3)
    assert torch.equal(again.head.weight, narrow.head.weight)
    with pytest.raises(DataError, match=r"stem\.0\.weight \(16, 1, 7, 7\), expected \(64, 1, 7, 7\)"):
        covidnet(CovidNetModel(name="covidnet", weights=str(tmp_path / "w.safetensors")), {}, 3)
