"""The fitted models are, as networks, what scikit-learn says; and they train, tune and predict like any other."""

import numpy as np
import pytest
import torch

from raylab.config.recipe import BoostingModel, LinearModel, model_family
from raylab.errors import DataError
from raylab.models import baselines
from raylab.models.baselines import Summary

F, S, T = 3, 2, 6


def data(n: int = 300, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """x as icu_samples makes it: values carried forward, masks, ages; the label hangs on the last value of series 0
    and on whether series 1 was measured."""
    rng = np.random.default_rng(seed)
    value, mask = rng.normal(size=(n, T, F)), rng.random((n, T, F)) < 0.4
    mask[: n // 3, :, 1] = False
    x = np.zeros((n, T, 3 * F + S), dtype=np.float32)
    last, since = np.zeros((n, F)), np.full((n, F), np.inf)
    for t in range(T):
        last = np.where(mask[:, t], value[:, t], last)
        since = np.where(mask[:, t], 0.5, since + 1)
        x[:, t, :F], x[:, t, F : 2 * F], x[:, t, 2 * F : 3 * F] = last, mask[:, t], np.minimum(since / T, 1)
    x[:, :, 3 * F :] = rng.normal(size=(n, 1, S))
    logit = 2 * x[:, -1, 0] + mask[:, :, 1].any(1) - 0.5
    return torch.from_numpy(x), (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(np.int64)


SPEC = {"features": ["pf", "sf", "hr"], "static": ["age", "sex"]}


def test_summary_by_hand():
    x = torch.zeros(2, 3, 3 + 1)
    x[0, :, 0] = torch.tensor([0.0, 2.0, 5.0])  # measured in hours 1 and 2
    x[0, :, 1] = torch.tensor([0.0, 1.0, 1.0])
    x[0, :, 2] = torch.tensor([1.0, 0.2, 0.1])
    x[1, :, 2] = 1
    x[:, :, 3] = 7
    out = Summary(1)(x)
    #                          last mean least largest first change count since static
    assert out[0].tolist() == pytest.approx([5, 3.5, 2, 5, 2, 3, 2, 0.1, 7])
    assert out[1, :6].isnan().all() and out[1, 6:].tolist() == [0, 1, 7]


@pytest.mark.parametrize("leaves", [2, 5, 16])
def test_the_trees_are_scikit_learns(leaves):
    from sklearn.ensemble import HistGradientBoostingClassifier

    x, y = data()
    model = baselines.boosting(BoostingModel(name="boosting", trees=20, leaves=leaves, feature_fraction=1.0), SPEC, 1)
    model.fit(x, y)
    theirs = HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=20,
        max_leaf_nodes=leaves,
        l2_regularization=10.0,
        early_stopping=False,
        random_state=0,
    ).fit(Summary(F)(x).numpy(), y)
    new, _ = data(seed=1)
    mine = torch.sigmoid(model(new)[:, 0]).detach().numpy()
    assert mine == pytest.approx(theirs.predict_proba(Summary(F)(new).numpy())[:, 1], abs=1e-6)
    assert np.isnan(Summary(F)(new).numpy()).any()


@pytest.mark.parametrize("name", ["boosting", "logistic", "last_pf"])
def test_weights_alone_are_the_model(name):
    x, y = data()
    build = getattr(baselines, name)
    config = model_family(name)(name=name)
    model, again = build(config, SPEC, 1), build(config, SPEC, 1)
    model.fit(x, y)
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(x), again(x))
    ranked = model(x)[:, 0].detach().numpy()
    assert ranked[y == 1].mean() > ranked[y == 0].mean() + 0.5


def test_last_ratio_looks_at_one_value():
    x, y = data()
    model = baselines.last_pf(LinearModel(name="last_pf"), SPEC, 1)
    model.fit(x, y)
    other = x.clone()
    other[..., 1:F] += 3
    other[..., 3 * F :] += 3
    assert torch.equal(model(x), model(other))
    with pytest.raises(DataError, match="no sf"):
        baselines.last_sf(LinearModel(name="last_sf"), {"features": ["hr"], "static": []}, 1)


def test_one_class_cannot_be_learnt():
    x, y = data()
    with pytest.raises(DataError, match="only one class: 0 of 300"):
        baselines.logistic(LinearModel(name="logistic"), SPEC, 1).fit(x, y * 0)
