"""Scores of sections: depth errors with intervals over sections, and the contrastive loss of pairs."""

import numpy as np
import pytest
import torch

from raylab.evaluation.proximity import EMBEDDING, TEMPERATURE, compare_blocks, contrastive_losses, similarities
from raylab.evaluation.section_depth import depth_differences, depth_scores, section_means

RNG = np.random.default_rng(0)
SECTION = np.repeat(np.arange(20), RNG.integers(2, 9, size=20))
DEPTH = SECTION * 2.0


def test_the_error_of_a_section_is_that_of_its_mean_prediction():
    section = np.array([1, 1, 1, 4])
    scores = depth_scores(np.array([10.0, 10, 10, 20]), np.array([7.0, 13, 13, 18]), section)
    assert scores["section_error"].value == pytest.approx((1 + 2) / 2)
    assert scores["patch_error"].value == pytest.approx((3 + 3 + 3 + 2) / 4)
    assert scores["r2"].value == pytest.approx(1 - (27 + 4) / (3 * 2.5**2 + 7.5**2))
    assert "too few" in (scores["section_error"].why or "")


def test_intervals_resample_whole_sections():
    bias = RNG.normal(0, 3, size=20)[SECTION]
    scores = depth_scores(DEPTH, DEPTH + bias, SECTION)
    low, value, high = (getattr(scores["section_error"], end) for end in ("low", "value", "high"))
    each = np.abs(section_means(bias, SECTION))
    assert value == pytest.approx(each.mean()) and low < value < high
    assert high - low == pytest.approx(2 * 1.96 * each.std() / np.sqrt(20), rel=0.25)


def test_differences_are_of_the_same_resamples():
    worse = DEPTH + RNG.normal(0, 2, size=20)[SECTION]
    same = depth_differences(DEPTH, worse, worse, SECTION)
    assert same["section_error"].value == 0 and same["section_error"].low is None
    gain = depth_differences(DEPTH, DEPTH + 0.1 * (worse - DEPTH), worse, SECTION)["section_error"]
    assert gain.high is not None and gain.high < 0
    error = depth_scores(DEPTH, worse, SECTION)["section_error"].value
    assert error is not None and gain.value == pytest.approx(-0.9 * error)


def test_one_depth_has_no_r2():
    scores = depth_scores(np.zeros(40), RNG.normal(size=40), np.repeat(np.arange(20), 2))
    assert scores["r2"].value is None and scores["section_error"].low is not None


def pairs(count: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=(count, 2 * EMBEDDING)))


def test_the_loss_is_the_cross_entropy_over_similarities_both_ways():
    z, far = pairs(5), torch.arange(5.0)[:, None] * torch.tensor([10.0, 0, 0])
    a, b = (h / h.norm(dim=1, keepdim=True) for h in z.chunk(2, 1))
    table = a @ b.T / TEMPERATURE
    expected = -(table.diagonal() - table.logsumexp(1) + table.diagonal() - table.logsumexp(0)) / 2
    assert torch.allclose(contrastive_losses(z, far), expected)


def test_patches_beside_one_another_are_no_negatives():
    z = pairs(3)
    position = torch.tensor([[0.0, 0, 0], [0, 1, 1], [5, 0, 0]])
    table = similarities(z, position)
    assert torch.isinf(table).nonzero().tolist() == [[0, 1], [1, 0]]
    assert torch.isfinite(contrastive_losses(z, position)).all()
    beside = torch.zeros(2, 3)
    assert torch.equal(contrastive_losses(z[:2], beside), torch.zeros(2, dtype=z.dtype))
    z.requires_grad_()
    contrastive_losses(z, position).sum().backward()
    assert z.grad is not None and torch.isfinite(z.grad).all()


def test_equal_embeddings_are_found_and_random_ones_are_not():
    one = RNG.normal(size=(600, EMBEDDING))
    position = np.arange(600, dtype=np.float32)[:, None] * np.float32([10, 0, 0])
    loss, found = compare_blocks(np.concatenate([one, one], 1), position)
    assert found.all() and loss.mean() < 0.1
    loss, found = compare_blocks(RNG.normal(size=(600, 2 * EMBEDDING)), position)
    assert found.mean() < 0.05 and loss.mean() > 4
