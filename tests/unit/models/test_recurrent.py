import numpy as np
import pytest
import torch

from raylab.config.overrides import has_field, override
from raylab.config.recipe import Recipe, RecurrentModel
from raylab.errors import UsageError
from raylab.models.ensemble import Ensemble
from raylab.models.recurrent import KNOTS, SHARE_KNOTS, GruD, Pooled
from raylab.models.weights import fill, match_inputs
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe, with_search_space
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.run import execute, load_samples, read_model

SPEC = {"kind": "icu-hourly", "classes": ["no", "yes"], "features": ["a", "b"], "static": ["s"], "hours": 4}


def test_grud_forgets_what_is_old_and_keeps_what_is_measured():
    model = GruD(2, 1, 1, RecurrentModel(name="grud", hidden=4))
    torch.nn.init.constant_(model.fade, 50.0)  # an age of 1 fades everything
    torch.nn.init.zeros_(model.forget.weight)
    torch.nn.init.zeros_(model.forget.bias)
    torch.nn.init.zeros_(model.pooled.layer.weight)  # the states alone
    x = torch.zeros(1, 4, 7)
    x[..., 0], x[..., 4] = 3.0, 1.0  # series a: a value, old, not measured
    without = torch.zeros(1, 4, 7)
    without[..., 4] = 1.0
    assert torch.allclose(model(x), model(without), atol=1e-5)
    x[..., 2] = without[..., 2] = 1.0  # measured: its age does not matter
    assert not torch.allclose(model(x), model(without), atol=1e-3)


@pytest.mark.parametrize("layers", [1, 2])
def test_grud_trains_its_decays(layers):
    model = GruD(2, 1, 1, RecurrentModel(name="grud", hidden=4, layers=layers))
    torch.nn.init.constant_(model.fade_from, 0.1)
    model(torch.rand(8, 4, 7)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_encoding_of_a_summary_is_piecewise_linear():
    """One input a gap between knots: 1 for those below the value, the share of the way in its own, 0 above; and all 0
    for what was never measured."""
    pooled = Pooled(1, 1, RecurrentModel(name="gru")).eval()
    seen = []
    pooled.layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.zeros(2, 4, 4)  # of one series value, mask, since; and the static
    x[0, :, 0], x[0, :, 1] = (KNOTS[3] + KNOTS[4]) / 2, 1.0
    pooled(x)
    gaps = len(KNOTS) - 1
    last_of, static_of = seen[0][:, :gaps], seen[0][:, 6 * gaps : 7 * gaps]
    assert last_of[0].tolist() == [1, 1, 1, 0.5, *[0] * (gaps - 4)]
    assert last_of[1].tolist() == [0] * gaps
    assert static_of[0].tolist() == [1] * KNOTS.index(0) + [0] * (gaps - KNOTS.index(0))
    shares = len(SHARE_KNOTS) - 1
    count, since = seen[0][:, 7 * gaps : 7 * gaps + shares], seen[0][:, 7 * gaps + shares :]
    assert count.tolist() == [[1] * shares, [0] * shares], "in each hour of the window, and never"
    assert since.tolist() == [[0] * shares] * 2, "just now, and never"


@pytest.mark.parametrize("name", ["gru", "lstm", "grud"])
@pytest.mark.parametrize("members", [1, 2])
def test_weights_go_by_the_names_of_inputs(name, members):
    """Series in another order and the static one absent: the same patient gets the same logits."""
    recipe = override(ensemble(members), {"model.name": name})
    job = find_task("ards")
    theirs = {**SPEC, "static": []}
    mine = {**SPEC, "features": ["new", "b", "a"], "static": ["age"]}
    parent = job.model(recipe, theirs).eval()
    child = job.model(override(recipe, {"seed": 9}), mine).eval()
    network = child.members[0] if members > 1 else child
    state = match_inputs(child.state_dict(), parent.state_dict(), network.inputs(mine), network.inputs(theirs))
    before = child.state_dict()
    fill(child, state, "the parent", own_head=True)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    x = torch.stack([a, b, ones, ones, zeros, zeros], 2)
    wide = torch.stack([zeros, b, a, zeros, ones, ones, zeros, zeros, zeros, zeros], 2)
    for key in state:  # what the parent does not know starts as new, and here is without effect
        if key.endswith("pooled.layer.weight"):
            at = [k for k, what in enumerate(network.inputs(mine)["pooled.layer.weight"]) if "age" in what]
            assert torch.equal(child.state_dict()[key][:, at], before[key][:, at])
            child.state_dict()[key][:, at] = 0
    assert torch.allclose(child(wide), parent(x), atol=1e-5)


def ensemble(members: int = 3) -> Recipe:
    return override(shipped_recipe("ards", smoke=True), {"model.members": members, "model.hidden": 4})


def test_an_ensemble_is_the_mean_of_its_members():
    job = find_task("ards")
    model = job.model(ensemble(), SPEC)
    assert isinstance(model, Ensemble)
    first = job.model(override(ensemble(1), {"seed": 1}), SPEC)
    x, y = torch.randn(5, 4, 7), torch.tensor([0, 1, 0, 1, 1])
    logits = model(x)
    assert logits.shape == (5, 3, 1) and torch.equal(logits[:, 1], first(x))  # member k is seed + k alone
    assert torch.allclose(job.outcome.probabilities(logits), torch.sigmoid(logits).mean(1))
    each = torch.stack([job.outcome.loss(member, y, None) for member in logits.unbind(1)])
    assert torch.allclose(job.outcome.loss(logits, y, None), each.mean(0))
    job.outcome.loss(logits, y, None).sum().backward()
    alone = job.outcome.loss(first(x), y, None).sum() / 3
    alone.backward()
    mine = dict(model.members[1].named_parameters())
    assert all(torch.allclose(mine[name].grad, p.grad, atol=1e-6) for name, p in first.named_parameters())


def test_no_ensemble_of_a_model_without_a_seed():
    with pytest.raises(UsageError, match="the model boosting has no field 'members'"):
        override(ensemble(), {"model.name": "boosting", "model.members": 2})


@pytest.mark.parametrize("name", ["grud", "lstm", "boosting", "logistic", "last_pf", "last_sf"])
def test_every_model_runs_and_is_read_back(ards_data, tmp_path, name):
    small = {"model.trees": 10, "model.hidden": 4}
    recipe = override(shipped_recipe("ards", smoke=True), {"model.name": name, "loop.epochs": 1})
    recipe = override(recipe, {path: value for path, value in small.items() if has_field(recipe, path)})
    rows: list = []
    result = execute(recipe, *load_samples(recipe, ards_data), tmp_path, lambda sent: rows.extend(sent))
    job, again, spec, model = read_model(tmp_path)
    val = job.load(ards_data, "val", again.data, spec)
    p = predict(job, model, val, ProcessGroup(), again, "cpu")
    assert job.outcome.log_loss(val.y, p) == pytest.approx(result["best"]["loss"], abs=1e-6) and np.isfinite(p).all()
    assert rows[-1]["val/auroc"] == result["val"]["auroc"]


def test_a_search_space_of_its_own():
    recipe = override(shipped_recipe("ards"), {"model.name": "boosting", "search.trials": 7})
    assert (
        "model.learning_rate" in with_search_space(recipe).search.space and with_search_space(recipe).search.trials == 7
    )
    assert with_search_space(shipped_recipe("ards")) == shipped_recipe("ards")
