"""Shares, weights and logit adjustment of rare classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raylab.config.overrides import override
from raylab.errors import DataError, UsageError
from raylab.tasks.recipes import shipped_recipe
from raylab.training.imbalance import check, offsets, prior, sampler

RECIPE = shipped_recipe("covidnet", smoke=True)
CLASSES = ["normal", "pneumonia", "COVID-19"]


class Rows(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.y)


TRAIN = Rows(y=np.array([0] * 60 + [1] * 30 + [2] * 10), spec={"classes": CLASSES})


def test_priors_are_of_what_training_meets():
    assert prior(RECIPE, TRAIN) == pytest.approx([0.6, 0.3, 0.1])
    assert prior(override(RECIPE, {"data.class_fraction": 0.4}), TRAIN) == pytest.approx([0.4, 0.2, 0.4])
    assert prior(
        override(RECIPE, {"data.class_fraction": 0.5, "data.class_fraction_of": "normal"}), TRAIN
    ) == pytest.approx([0.5, 0.375, 0.125])


def test_offsets_are_tau_log_prior():
    assert offsets(RECIPE, TRAIN, "cpu") is None
    got = offsets(override(RECIPE, {"optim.logit_adjustment": 2.0}), TRAIN, "cpu")
    assert torch.allclose(got, 2 * torch.log(torch.tensor([0.6, 0.3, 0.1])))
    binary = Rows(y=np.array([0] * 9 + [1]), spec={"classes": ["no onset", "onset"]})
    got = offsets(override(shipped_recipe("ards", smoke=True), {"optim.logit_adjustment": 1.0}), binary, "cpu")
    assert got.tolist() == pytest.approx([np.log(0.1) - np.log(0.9)])


def test_batches_have_the_share_asked_for():
    batches = sampler(override(RECIPE, {"data.class_fraction": 0.5, "loop.global_batch_size": 20}), TRAIN)
    for step in range(2 * batches.per_epoch):
        _, shards = batches.shards_of(step)
        assert (TRAIN.y[np.concatenate(shards)] == 2).sum() == 10
    plain = sampler(RECIPE, TRAIN)
    assert sorted(np.concatenate([i for s in range(plain.per_epoch) for i in plain.shards_of(s)[1]])) == list(
        range(100)
    )


def test_what_does_not_fit_the_classes_is_refused():
    check(RECIPE, TRAIN)
    with pytest.raises(DataError, match="no row of class COVID-19"):
        check(RECIPE, Rows(y=np.array([0, 1, 1]), spec={"classes": CLASSES}))
    with pytest.raises(UsageError, match="2 values for 3 classes"):
        check(override(RECIPE, {"optim.class_weight": (1, 2)}), TRAIN)
    with pytest.raises(UsageError, match=r"unknown class 'covid'[\s\S]*COVID-19"):
        check(override(RECIPE, {"data.class_fraction": 0.3, "data.class_fraction_of": "covid"}), TRAIN)
