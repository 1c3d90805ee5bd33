import numpy as np
import pytest
import torch

from raylab.config.recipe import BoostingModel, RecurrentModel
from raylab.errors import UsageError
from raylab.evaluation.attributions import attributions, by_feature, unmeasured
from raylab.models import recurrent
from raylab.models.baselines import boosting
from raylab.models.ensemble import Ensemble

SPEC = {"features": ["a", "b"], "static": ["s"]}


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return recurrent.gru(RecurrentModel(name="gru", hidden=8), SPEC, 1)


@pytest.mark.parametrize("model", [network(), Ensemble([network(1), network(2)])], ids=["gru", "ensemble"])
def test_attributions_add_up_to_the_logits_difference(model):
    x = torch.randn(5, 4, 7)
    x[..., 2:4] = (x[..., 2:4] > 0).float()  # masks
    x[..., 4:6] = x[..., 4:6].abs()  # hours since
    found = attributions(model, x, 2)
    assert found.shape == (5, 4, 7)
    with torch.no_grad():
        logits = model.eval()(x) - model(unmeasured(x, 2))
    difference = logits.reshape(5, -1).mean(1).numpy()
    assert found.sum((1, 2)) == pytest.approx(difference, abs=0.05)


def test_parts_of_a_feature_are_added_and_statics_stand_in_the_last_hour():
    found = np.arange(2 * 3 * 7, dtype=float).reshape(2, 3, 7)
    names, matrix = by_feature(found, SPEC)
    assert names == ["a", "b", "s"] and matrix.shape == (2, 3, 3)
    assert matrix[0, 0].tolist() == (found[0, :, 0] + found[0, :, 2] + found[0, :, 4]).tolist()
    assert matrix[1, 2].tolist() == [0, 0, found[1, :, 6].sum()]
    assert matrix.sum() == pytest.approx(found.sum())


def test_trees_have_no_gradients():
    with pytest.raises(UsageError, match="need a network"):
        attributions(boosting(BoostingModel(name="boosting"), SPEC, 1), torch.zeros(1, 4, 7), 2)
