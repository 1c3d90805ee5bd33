"""Which passes may be recorded; that recorded ones have the bits of others is shown on a GPU (tests/gpu)."""

import pytest
from torch import Tensor, nn

from raylab.config.overrides import override
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.shard_graphs import can_record


class Own(nn.Module):
    """A layer of somebody's own code."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("name", ["covidnet", "resnet50"])
def test_networks_of_raylab_and_torchvision_are_recorded_on_a_gpu_alone(name):
    recipe = override(shipped_recipe("covidnet", smoke=True), {"model.name": name})
    spec = {"kind": "cxr-frontal-u8", "classes": ["a", "b", "c"], "size": 32, "mean": 0.5, "std": 0.3}
    model = find_task("covidnet").model(recipe, spec)
    assert can_record(model, "cuda") and can_record(model, "cuda:1")
    assert not can_record(model, "cpu") and not can_record(model, "meta")


def test_a_network_with_a_layer_of_ones_own_is_not_recorded():
    assert can_record(nn.Sequential(nn.Linear(2, 2)), "cuda")
    assert not can_record(nn.Sequential(nn.Linear(2, 2), Own()), "cuda")
