"""Scores of several labels, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from raylab.errors import DataError
from raylab.evaluation import multilabel
from raylab.evaluation.metrics import multiclass_point, multiclass_scores

CLASSES = ["water", "wood", "town", "rare"]
RNG = np.random.default_rng(5)
Y = (RNG.random((300, 4)) < [0.5, 0.3, 0.2, 0.0]).astype(np.float32)
P = np.clip(0.35 * Y + RNG.random((300, 4)) * 0.6, 0, 1)
GROUP = np.arange(300) // 3


def test_scores_are_those_of_scikit_learn():
    found = multilabel.scores(Y, P, GROUP, CLASSES, 100, 0)
    aps = [average_precision_score(Y[:, k], P[:, k]) for k in range(3)]
    assert found["map"].value == pytest.approx(np.mean(aps))
    assert [found[f"ap/{name}"].value for name in CLASSES[:3]] == pytest.approx(aps)
    called = P >= 0.5
    assert found["macro_f1"].value == pytest.approx(np.mean([f1_score(Y[:, k], called[:, k]) for k in range(3)]))
    assert found["micro_f1"].value == pytest.approx(f1_score(Y.ravel(), called.ravel()))
    assert found["map"].low < found["map"].value < found["map"].high
    assert found["map"].note.endswith("rare") and "ap/rare" not in found


def test_macro_f1_of_single_labels_is_that_of_scikit_learn():
    y, p = RNG.integers(3, size=200), RNG.dirichlet([1, 1, 1], size=200)
    expected = f1_score(y, p.argmax(1), average="macro")
    assert multiclass_point(y, p)["macro_f1"] == pytest.approx(expected)
    scored = multiclass_scores(y, p, np.arange(200), CLASSES[:3], 50)["macro_f1"]
    assert scored.value == pytest.approx(expected) and scored.low < expected < scored.high


def test_point_scores_do_not_depend_on_the_order_of_rows():
    order = RNG.permutation(300)
    assert multilabel.point(Y[order], P[order]) == multilabel.point(Y, P)


def test_a_label_of_few_groups_leaves_the_mean_without_an_interval_but_not_the_other_labels():
    y = Y.copy()
    y[:6, 3] = 1
    found = multilabel.scores(y, P, GROUP, CLASSES, 50, 0)
    assert found["map"].low is None and "with rare" in found["map"].why
    assert found["ap/water"].low is not None and found["ap/rare"].low is None
    assert "patient" in found["ap/rare"].why
    of_tiles = multilabel.scores(y, P, GROUP, CLASSES, 50, 0, "tile")
    assert "tiles with rare" in of_tiles["map"].why and "tiles with rare" in of_tiles["ap/rare"].why


def test_of_many_labels_that_lack_groups_some_are_named():
    y = np.zeros((40, 9))
    y[np.arange(36), np.arange(36) % 9] = 1
    found = multilabel.scores(y, np.full((40, 9), 0.5), np.arange(40), list("abcdefghi"), 20, 0, "tile")
    few = "too few: 4 tiles with a and 4 tiles with b and fewer than 10 tiles in 7 others"
    assert found["map"].why == f"{few}; an interval needs 10 of each"


def test_differences_of_a_model_with_itself_are_zero_and_with_a_worse_one_are_not():
    worse = np.clip(P + RNG.normal(0, 0.4, P.shape), 0, 1)
    assert multilabel.differences(Y, P, P, GROUP, CLASSES, 20)["map"].value == 0
    assert multilabel.differences(Y, P, worse, GROUP, CLASSES, 20)["map"].low > 0


def test_counts_and_bad_values():
    counts = multilabel.counts(Y, P, CLASSES)
    assert counts["water"]["rows"] == Y[:, 0].sum() and counts["rare"]["right"] == 0
    with pytest.raises(DataError, match="not probabilities"):
        multilabel.point(Y, P + 1)
    with pytest.raises(DataError, match="other than 0 and 1"):
        multilabel.point(Y + 1, P)
