"""Every shipped recipe holds, builds, and searches only where it may; the small ones train."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from raylab.config.overrides import has_field, override
from raylab.config.recipe import FAMILIES, model_names
from raylab.config.search_space import parse_dimension
from raylab.errors import UsageError
from raylab.models import MODELS
from raylab.tasks import TASKS, find_task
from raylab.tasks.recipe_page import markdown
from raylab.tasks.recipes import parse_recipe, shipped_recipe
from raylab.training.loop import Report, fit
from tests.recipes import RECIPES

DATA = {name: f"{name.replace('-', '_')}_data" for name in TASKS}
NAMES = sorted(RECIPES)


def test_every_task_ships_a_full_and_a_small_recipe():
    for name in TASKS:
        assert shipped_recipe(name) is RECIPES[name] and shipped_recipe(name, smoke=True) is RECIPES[f"{name}-smoke"]


def test_every_model_is_of_one_family():
    distinct = {family for families in FAMILIES.values() for family in families}
    known = [name for family in distinct for name in model_names(family)]
    named = {name for models in MODELS.values() for name in models}
    assert len(known) == len(set(known)) and set(known) == named - {"resnet50", "vgg19"}  # these are of torchvision


def test_the_page_of_fields_is_what_the_code_says():
    page = Path(__file__).parents[3] / "docs" / "recipe-fields.md"
    assert page.read_text() == markdown(), "python -m raylab.tasks.recipe_page > docs/recipe-fields.md"


@pytest.mark.parametrize("wrong", ["ads", "ards-smoke", ""])
def test_other_names_are_refused_with_the_right_ones(wrong):
    with pytest.raises(UsageError, match="ards"):
        shipped_recipe(wrong)


@pytest.mark.parametrize("name", NAMES)
def test_loads(name):
    assert parse_recipe(json.loads(RECIPES[name].model_dump_json())) == RECIPES[name]


@pytest.mark.parametrize("name", NAMES)
def test_its_model_builds_and_its_seed_decides_the_weights(name, request):
    chosen = RECIPES[name]
    job = find_task(chosen.task)
    size = None if job.kind in ("scenes", "sections") else 64  # the fixture's own
    data = chosen.data.model_copy(update={"size": size})
    train = job.load(request.getfixturevalue(DATA[chosen.task]), "train", data, None)
    assert chosen.model.name in MODELS[train.spec["kind"]]
    first, again = job.model(chosen, train.spec), job.model(chosen, train.spec)
    other = job.model(override(chosen, {"seed": 1}), train.spec)
    x = train.batch(np.zeros(2, dtype=np.int64))
    for model in (first, again, other):
        model.eval()
    with torch.no_grad():
        assert first(x).shape == (2, job.outcome.count(train.spec))
        assert torch.equal(first(x), again(x)) and not torch.equal(first(x), other(x))


@pytest.mark.parametrize("name", NAMES)
def test_its_search_space_parses_and_its_points_lie_in_it(name):
    chosen = RECIPES[name]
    space = {path: parse_dimension(path, text) for path, text in chosen.search.space.items()}
    assert space and all(has_field(chosen, path) for path in space)
    for kind, bounds in space.values():
        assert kind in {"uniform", "loguniform", "randint", "choice"} and bounds
    for path, (_, bounds) in space.items():
        for bound in bounds:
            override(chosen, {path: bound})
    for point in chosen.search.points:
        assert set(point) == set(space)
        override(chosen, point)
        for path, at in point.items():
            kind, bounds = space[path]
            assert at in bounds if kind == "choice" else bounds[0] <= at <= bounds[1], path


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("-smoke")])
def test_small_recipes_train_an_epoch(name, request):
    chosen = override(RECIPES[name], {"loop.epochs": 1})
    job = find_task(chosen.task)
    directory = request.getfixturevalue(DATA[chosen.task])
    train = job.load(directory, "train", chosen.data, None)
    val = job.load(directory, "val", chosen.data, train.spec)
    result = fit(chosen, job, job.model(chosen, train.spec), train, val, Report())
    assert result["epochs"] == 1 and result["steps"] == result["planned_steps"] > 0
    assert math.isfinite(result["val"]["loss"]) and result["val"][job.objective] <= 1
