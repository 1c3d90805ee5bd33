"""Shards that are too small for batch norm, found before a run starts."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from raylab.config.overrides import override
from raylab.data.sampler import shards_of, smallest_shard
from raylab.errors import UsageError
from raylab.tasks.recipes import shipped_recipe
from raylab.training.batchnorm import check_smallest_shard


class Rows:
    """`count` rows of one channel and `size` pixels."""

    spec: ClassVar[dict[str, Any]] = {}

    def __init__(self, count: int, size: int = 1) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def batch(self, index: np.ndarray, augment: tuple[int, int] | None = None) -> torch.Tensor:
        return torch.zeros(len(index), 1, self.size, self.size)


def network(norm: nn.Module) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, 4, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4, 2))


def recipe(batch: int, shards: int, mode: str = "full"):
    settings = {"loop.global_batch_size": batch, "loop.shards": shards, "transfer.mode": mode}
    return override(shipped_recipe("covidnet", smoke=True), settings)


@pytest.mark.parametrize("samples", [1, 7, 33, 64, 65, 100])
@pytest.mark.parametrize("batch", [1, 8, 16, 32, 200])
@pytest.mark.parametrize("shards", [1, 3, 8])
def test_the_smallest_shard_is_that_of_the_sampler(samples, batch, shards):
    steps = range(-(-samples // batch))
    sizes = [len(rows) for step in steps for rows in shards_of(step, samples, batch, shards, 0)[1] if len(rows)]
    assert smallest_shard(samples, batch, shards) == min(sizes)


@pytest.mark.parametrize(("samples", "batch", "shards"), [(33, 16, 1), (20, 16, 4), (33, 8, 8)])
def test_one_row_with_one_pixel_is_refused_with_settings_that_train(samples, batch, shards):
    with pytest.raises(UsageError) as refused:
        check_smallest_shard(recipe(batch, shards), network(nn.BatchNorm2d(4)), Rows(samples), False)
    settings = [word.rstrip(",").split("=") for word in refused.value.do.split() if "=" in word]
    assert settings
    for name, value in settings:
        given = {"loop.global_batch_size": batch, "loop.shards": shards, name: int(value)}
        assert smallest_shard(samples, *given.values()) > 1


@pytest.mark.parametrize(
    ("samples", "norm", "size"),
    [(34, nn.BatchNorm2d(4), 1), (33, nn.BatchNorm2d(4), 2), (33, nn.GroupNorm(2, 4), 1)],
    ids=["two rows", "more pixels", "another norm"],
)
def test_what_can_be_trained_is_not_refused(samples, norm, size):
    check_smallest_shard(recipe(16, 1), network(norm), Rows(samples, size), False)


def test_a_probe_keeps_the_statistics_of_its_parent():
    probe = recipe(16, 1, "probe")
    check_smallest_shard(probe, network(nn.BatchNorm2d(4)), Rows(33), True)
    with pytest.raises(UsageError):  # without a parent all layers learn
        check_smallest_shard(probe, network(nn.BatchNorm2d(4)), Rows(33), False)


def test_other_errors_of_a_network_stay_what_they_are():
    class Faulty(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        check_smallest_shard(recipe(16, 1), Faulty(), Rows(33), False)
