"""Networks for scenes: sizes, boosting of several classes and labels, and pretrained weights over bands."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raylab.config.recipe import BoostingModel, SceneCnnModel, VisionModel
from raylab.errors import DataError
from raylab.models import network
from raylab.models.first_layer import RGB, spread, spread_bands

SMALL = BoostingModel(name="boosting", trees=12, leaves=4, learning_rate=0.3, l2=1.0, feature_fraction=1.0)


def spec(size: int, bands: tuple[str, ...], kind: str = "scenes") -> dict:
    return {"kind": kind, "size": size, "bands": list(bands), "classes": ["a", "b", "c"]}


@pytest.mark.parametrize("size", [1, 3, 4, 5, 13, 64])
def test_the_small_network_takes_scenes_of_any_size(size):
    model = network("scenes", "cnn")(SceneCnnModel(name="cnn", width=4), spec(size, ("x", "y")), 3)
    assert model(torch.zeros(2, 2, size, size)).shape == (2, 3)


def test_the_small_network_tells_the_centre_from_the_rim():
    """A mean over the last map could not."""
    torch.manual_seed(0)
    model = network("scenes", "cnn")(SceneCnnModel(name="cnn", width=8), spec(3, ("x",)), 2).eval()
    centre, rim = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    centre[..., 1, 1], rim[..., 0, 0] = 5, 5
    assert not torch.allclose(model(centre), model(rim))


@pytest.mark.parametrize("classes", [2, 3])
def test_boosting_gives_the_probabilities_of_scikit_learn(classes):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 2, 3, 3))).float()
    y = np.digitize(x[:, 0, 1, 1].numpy(), [-0.4, 0.4][: classes - 1])
    model = network("scenes", "boosting")(SMALL, spec(3, ("x", "y")), classes)
    model.fit(x, y)
    rows = model.summary(x).numpy()
    expected = model.grow(rows, y).predict_proba(rows)
    assert np.allclose(model(x).softmax(1).numpy(), expected, atol=1e-5)
    assert (expected.argmax(1) == y).mean() > 0.9


def test_boosting_of_several_labels_is_a_model_of_each():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 2, 3, 3))).float()
    y = np.stack([x[:, 0, 1, 1] > 0, x[:, 1, 0, 0] > 0.5, torch.zeros(200)], 1).astype(np.float32)
    model = network("scenes", "boosting")(SMALL, spec(3, ("x", "y")), 3)
    model.fit(x, y)
    p = model(x).sigmoid().numpy()
    assert ((p[:, :2] > 0.5) == (y[:, :2] == 1)).mean() > 0.9
    assert (p[:, 2] < 0.01).all(), "a label that no row has is predicted from its frequency"


def test_boosting_needs_rows_of_every_class():
    model = network("scenes", "boosting")(SMALL, spec(3, ("x",)), 3)
    with pytest.raises(DataError, match="no row of the classes"):
        model.fit(torch.zeros(10, 1, 3, 3), np.array([0, 1] * 5))


# pretrained weights


def test_weights_follow_the_colours_of_bands_and_others_get_the_mean():
    weight = torch.arange(3.0).view(1, 3, 1, 1) + 1  # red 1, green 2, blue 3
    out, words = spread_bands(weight, RGB, ("B02", "B04", "B08", "B03"))
    assert torch.allclose(out.flatten(), torch.tensor([3.0, 1, 2, 2]) * 3 / 4)
    assert words == (
        "pretrained weights of the first layer: B02, B04, B03 keep their own; "
        "the mean over red, green, blue for B08; all scaled by 0.75"
    )
    assert torch.equal(spread_bands(weight, RGB, RGB)[0], weight)
    assert torch.equal(spread_bands(weight, RGB, ("B04", "B03", "B02"))[0], weight)
    assert spread_bands(weight, RGB, ("B02", "B03", "B04"))[0].flatten().tolist() == [3, 2, 1]


def test_a_constant_scene_keeps_its_response():
    weight = torch.rand(8, 3, 7, 7)
    out, _ = spread_bands(weight, RGB, [f"band {k}" for k in range(13)])
    assert torch.allclose(out.sum((1, 2, 3)), weight.sum((1, 2, 3)), rtol=1e-5)


def test_torchvision_networks_get_as_many_channels_as_there_are_bands(tmp_path, caplog):
    make, bands = network("scenes", "resnet18"), ("B02", "B03", "B04", "B08")
    colour = make(VisionModel(name="resnet18"), spec(32, RGB), 3)
    assert colour.body.conv1.in_channels == 3
    state = {name.removeprefix("body."): t for name, t in colour.state_dict().items() if name.startswith("body.")}
    save_file(state, tmp_path / "colour.safetensors")
    with caplog.at_level(logging.WARNING):
        model = make(VisionModel(name="resnet18", weights=str(tmp_path / "colour.safetensors")), spec(32, bands), 3)
    assert model.body.conv1.in_channels == 4 and model(torch.zeros(2, 4, 32, 32)).shape == (2, 3)
    assert torch.allclose(model.body.conv1.weight[:, 2], colour.body.conv1.weight[:, 0] * 3 / 4)
    assert torch.equal(model.body.layer1[0].conv1.weight, colour.body.layer1[0].conv1.weight)
    assert "B02, B03, B04 keep their own; the mean over red, green, blue for B08" in caplog.text
    grey = make(VisionModel(name="resnet18"), spec(32, ("grey",)), 3)
    assert grey(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


def test_an_ensemble_and_a_network_without_convolutions_are_handled():
    member = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False))
    both = nn.Module()
    both.members = nn.ModuleList([member, member])
    state = {"members.0.0.weight": torch.ones(1, 1, 1, 1), "members.1.0.weight": torch.ones(1, 1, 1, 1)}
    out = spread(both, state, ["x"], ["x", "y"])
    assert [tuple(t.shape) for t in out.values()] == [(1, 2, 1, 1)] * 2
    assert spread(nn.Linear(1, 1), {"weight": torch.ones(1, 1)}, ["x"], ["y"]) == {"weight": torch.ones(1, 1)}
