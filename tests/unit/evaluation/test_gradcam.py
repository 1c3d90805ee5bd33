"""Grad-CAM: where a network that looks at one known place is said to look."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from raylab.data.images.dataset import box_px, load_images
from raylab.errors import UsageError
from raylab.evaluation.gradcam import grad_cam, last_map, outside


class Corner(nn.Module):
    """Class 1 is brightness in the upper left corner, class 0 its opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.conv.weight)
        nn.init.constant_(self.conv.bias, 10.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.conv(x) * self.place(x.shape[-1])
        score = seen.mean((1, 2, 3))
        return torch.stack([-score, score], 1)

    @staticmethod
    def place(side: int) -> torch.Tensor:
        where = torch.zeros(side, side)
        where[: side // 4, : side // 4] = 1
        return where


class Gated(Corner):
    """The same, the place built into the map itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = self.conv((x + 10) * self.place(x.shape[-1]) - 10).mean((1, 2, 3))
        return torch.stack([-score, score], 1)


def test_maps_lie_where_the_evidence_is(covidnet_data: Path) -> None:
    samples = load_images(covidnet_data, "val")
    index = np.arange(3)
    maps = grad_cam(Gated(), samples, index, np.ones(3, np.int64))
    assert maps.shape == (3, 64, 64) and maps.min() >= 0 and maps.max() == pytest.approx(1)
    assert maps[:, 20:, 20:].max() < 0.2 * maps[:, :10, :10].mean()
    assert not grad_cam(Gated(), samples, index, np.zeros(3, np.int64)).any()  # evidence against, which is no evidence


def test_the_share_outside_the_lung_field() -> None:
    left, top, right, bottom = box_px(100)
    maps = np.zeros((4, 100, 100), np.float32)
    maps[0, top:bottom, left:right] = 1
    maps[1, :top] = 1
    maps[2] = 1
    share = outside(maps)
    assert share[:2].tolist() == [0, 1] and share[2] == pytest.approx(0.43) and np.isnan(share[3])


def test_the_last_map_that_shows_a_place() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert last_map(net, 64) is net[2] and last_map(net, 32) is net[1]
    with pytest.raises(UsageError, match="no convolution"):
        last_map(nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 2)), 64)
