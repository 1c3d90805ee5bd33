"""Recipes as data: what can be set, what is refused and how it is said, and search dimensions."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylab.config.assignments import parse_assignments, parse_value
from raylab.config.old_names import FIELDS
from raylab.config.overrides import has_field, override, with_enough_shards
from raylab.config.recipe import (
    Recipe,
    Search,
    flatten,
    list_fields,
)
from raylab.config.search_space import DISTRIBUTIONS, parse_dimension
from raylab.errors import UsageError
from raylab.tasks.recipes import parse_recipe, read_recipe, shipped_recipe, update_recipe
from tests.recipes import RECIPES

ARDS, COVIDNET = RECIPES["ards"], RECIPES["covidnet"]
# every path that a recipe has, as it may be written on the command line -> what it then is
SETTABLE: dict[str, tuple[str, Any]] = {
    "seed": ("17", 17),
    "data.cohort": ("ventilated_pf", "ventilated_pf"),
    "data.virtual_patient": ("true", True),
    "data.fill": ("forward", "forward"),
    "data.size": ("64", 64),
    "data.augment": ("false", False),
    "data.mask": ("centre", "centre"),
    "data.erase": ("0.5", 0.5),
    "data.strength": ("0.5", 0.5),
    "data.class_fraction": ("0.3", 0.3),
    "data.class_fraction_of": ("normal", "normal"),
    "model.name": ("lstm", "lstm"),
    "model.hidden": ("8", 8),
    "model.layers": ("2", 2),
    "model.members": ("3", 3),
    "model.dropout": ("0.25", 0.25),
    "model.width": ("2", 2.0),
    "model.depth": ("0.4", 0.4),
    "model.trees": ("50", 50),
    "model.leaves": ("4", 4),
    "model.learning_rate": ("0.1", 0.1),
    "model.feature_fraction": ("0.5", 0.5),
    "model.l2": ("1", 1.0),
    "model.weights": ("/data/weights.pt", "/data/weights.pt"),
    "optim.lr": ("3e-4", 3e-4),
    "optim.weight_decay": ("0", 0.0),
    "optim.beta1": ("0.8", 0.8),
    "optim.beta2": ("0.99", 0.99),
    "optim.max_grad_norm": ("None", None),
    "optim.class_weight": ("(1, 2.5)", (1.0, 2.5)),
    "optim.logit_adjustment": ("1", 1.0),
    "transfer.mode": ("probe", "probe"),
    "transfer.probe_fraction": ("0.5", 0.5),
    "transfer.probe_lr_scale": ("3", 3.0),
    "transfer.first_lr_scale": ("1", 1.0),
    "transfer.reestimate": ("false", False),
    "schedule.kind": ("plateau", "plateau"),
    "schedule.warmup_steps": ("5", 5),
    "schedule.factor": ("0.5", 0.5),
    "schedule.patience": ("0", 0),
    "loop.epochs": ("3", 3),
    "loop.global_batch_size": ("32", 32),
    "loop.shards": ("5", 5),
    "loop.gradient_reduction": ("float", "float"),
    "loop.threads": ("2", 2),
    "loop.ema_decay": ("null", None),
    "loop.early_stopping_patience": ("4", 4),
    "loop.bf16": ("True", True),
    "loop.channels_last": ("true", True),
    "loop.checkpoint_steps": ("none", None),
    "loop.checkpoint_seconds": ("90", 90.0),
    "loop.max_checkpoints": ("3", 3),
    "scaling.workers": ("1:3", (1, 3)),
    "scaling.gpu": ("true", True),
    "scaling.cpus_per_worker": ("0.5", 0.5),
    "scaling.priority": ("2.5", 2.5),
    "scaling.max_failures": ("0", 0),
    "scaling.silence_seconds": ("5", 5.0),
    "search.trials": ("2", 2),
    "search.scheduler": ("pbt", "pbt"),
    "search.search": ("random", "random"),
    "search.concurrent": ("1", 1),
    "search.workers_per_trial": ("2", 2),
    "search.space": ('{"optim.lr": "uniform(1e-4,1e-3)"}', {"optim.lr": "uniform(1e-4,1e-3)"}),
    "search.points": ("[{'optim.lr': 1e-3}]", ({"optim.lr": 1e-3},)),
}


BOOSTING = override(ARDS, {"model.name": "boosting"})
BASES = (ARDS, BOOSTING, COVIDNET, RECIPES["surrogate"])


def base_of(path: str) -> Recipe:
    """A recipe that has this field."""
    return next(recipe for recipe in BASES if has_field(recipe, path))


def test_every_path_is_tried_here():
    assert set(SETTABLE) == {path for recipe in BASES for path in flatten(recipe)} - {"task"}


@pytest.mark.parametrize("path", SETTABLE)
def test_every_path_can_be_set(path):
    text, expected = SETTABLE[path]
    base = base_of(path)
    changed = override(base, parse_assignments([f"{path}={text}"]))
    assert flatten(changed) == {**flatten(base), path: expected}
    assert type(flatten(changed)[path]) is type(expected)


@given(st.sets(st.sampled_from(sorted(SETTABLE))), st.sampled_from(sorted(RECIPES)))
def test_overridden_recipes_survive_dumping_and_loading(chosen, name):
    chosen = {path for path in chosen if path != "model.name" and has_field(RECIPES[name], path)}
    recipe = override(RECIPES[name], {path: SETTABLE[path][1] for path in chosen})
    assert parse_recipe(recipe.model_dump()) == recipe
    assert parse_recipe(json.loads(recipe.model_dump_json())) == recipe
    assert override(RECIPES[name], flatten(recipe)) == recipe
    assert override(recipe, {}) == recipe


def test_a_recipe_is_read_from_its_file(tmp_path):
    (tmp_path / "recipe.json").write_text(ARDS.model_dump_json())
    assert read_recipe(tmp_path / "recipe.json") == ARDS


def test_override_leaves_the_recipe_alone():
    before = ARDS.model_dump_json()
    override(ARDS, {"search.space": {}, "optim.lr": 1.0})
    assert ARDS.model_dump_json() == before


def refused(settings: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        override(ARDS, settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "near"),
    [("optim.lrr", "optim.lr"), ("optm.lr", "optim.lr"), ("lr", "optim.lr"), ("loop.epoch", "loop.epochs")],
)
def test_an_unknown_path_prints_the_nearest(path, near):
    said = refused({path: 1})
    assert f"'{path}'" in said and near in said


def test_a_part_is_no_field():
    assert "unknown recipe field 'optim'" in refused({"optim": {"lr": 1}})


def test_an_unknown_field_in_a_document_is_refused():
    document = ARDS.model_dump()
    assert parse_recipe(document) == ARDS
    document["optim"]["momentum"] = 0.9
    with pytest.raises(UsageError, match=r"unknown recipe field 'optim\.momentum'"):
        parse_recipe(document)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("optim.lr", "fast"),
        ("optim.lr", 0),
        ("optim.lr", float("nan")),
        ("optim.lr", float("inf")),
        ("optim.lr", None),
        ("optim.lr", True),
        ("optim.beta1", 1),
        ("optim.max_grad_norm", -1),
        ("optim.class_weight", "heavy"),
        ("optim.class_weight", ("a",)),
        ("model.dropout", 1),
        ("model.hidden", 2.5),
        ("schedule.kind", "linear"),
        ("schedule.factor", 1),
        ("loop.epochs", 0),
        ("loop.epochs", True),
        ("loop.global_batch_size", 3),  # fewer than the shards
        ("loop.shards", 129),  # more than the batch
        ("loop.gradient_reduction", "kahan"),
        ("loop.ema_decay", 1),
        ("loop.bf16", "maybe"),
        ("loop.max_checkpoints", 1),
        ("seed", -1),
        ("seed", 2**31),
        ("search.trials", 0),
        ("search.space", {"optim.lr": 3}),
    ],
)
def test_ill_typed_and_impossible_values_are_refused_with_their_place(path, wrong):
    said = refused({path: wrong})
    assert (path in said) or ("shards" in said), said


@pytest.mark.parametrize(
    ("text", "workers"),
    [("0", (0, 0)), ("2", (2, 2)), ("1:3", (1, 3)), (2, (2, 2)), ((1, 3), (1, 3)), ([2, 2], (2, 2))],
)
def test_workers(text, workers):
    assert override(ARDS, {"scaling.workers": text}).scaling.workers == workers


@pytest.mark.parametrize("text", ["3:1", "0:2", "-1", "1:", ":2", "1:2:3", "two", "1.5", 1.5, -1, (0, 3), True, None])
def test_workers_that_cannot_be(text):
    assert "workers" in refused({"scaling.workers": text})


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("-1", -1),
        ("(1, 2.0)", (1, 2.0)),
        ("[1, 2]", [1, 2]),
        ("TRUE", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("asha", "asha"),
        ("'3'", "3"),
        ("1:3", "1:3"),
        ("a=b", "a=b"),
        ("", ""),
        ("__import__('os')", "__import__('os')"),
        ("{[]: 1}", "{[]: 1}"),
    ],
)
def test_values_of_the_command_line(text, parsed):
    assert parse_value(text) == parsed and type(parse_value(text)) is type(parsed)


@given(st.text("0123eN[](){}:,'\"\\-. \0"))
def test_any_text_is_some_value(text):
    parse_value(text)


def test_assignments():
    assert parse_assignments(["optim.lr = 3e-4", "task=a=b"]) == {"optim.lr": 3e-4, "task": "a=b"}
    for wrong in ("optim.lr", "=3", ""):
        with pytest.raises(UsageError, match="is not PATH=VALUE"):
            parse_assignments([wrong])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("uniform(0.0,0.5)", ("uniform", [0.0, 0.5])),
        ("uniform(-1, 1)", ("uniform", [-1, 1])),
        (" loguniform ( 1e-5 , 1e-3 ) ", ("loguniform", [1e-5, 1e-3])),
        ("randint(1,5)", ("randint", [1, 5])),
        ("choice(32,64)", ("choice", [32, 64])),
        ("choice(gru)", ("choice", ["gru"])),
        ("choice((1.0,2.0),None,true,'a,b')", ("choice", [(1.0, 2.0), None, True, "a,b"])),
    ],
)
def test_dimensions(text, parsed):
    assert parse_dimension("optim.lr", text) == parsed


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1e-3", "is not a distribution"),
        ("loguniform", "is not a distribution"),
        ("loguniform(1e-5,1e-3", "is not a distribution"),
        ("lognormal(0,1)", "unknown distribution"),
        ("logunifrom(1e-5,1e-3)", "loguniform"),
        ("uniform(1)", "takes two numbers"),
        ("uniform(1,2,3)", "takes two numbers"),
        ("uniform()", "takes two numbers"),
        ("uniform(2,1)", "the lower one first"),
        ("uniform(1,1)", "the lower one first"),
        ("uniform(a,b)", "takes two numbers"),
        ("uniform(false,true)", "takes two numbers"),
        ("loguniform(0,1)", "above zero"),
        ("loguniform(-1,1)", "above zero"),
        ("randint(1,2.5)", "whole numbers"),
        ("choice()", "at least one value"),
    ],
)
def test_dimensions_that_cannot_be(text, why):
    with pytest.raises(UsageError, match=why) as caught:
        parse_dimension("optim.lr", text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("recipe", "path", "said"),
    [
        (ARDS, "model.trees", "the model gru has no field 'trees'"),
        (ARDS, "model.width", "unknown recipe field 'model.width'"),
        (BOOSTING, "model.hidden", "the model boosting has no field 'hidden'"),
        (BOOSTING, "model.members", "models that have it: gru, lstm, grud"),
        (COVIDNET, "model.hidden", "unknown recipe field 'model.hidden'"),
        (COVIDNET, "data.cohort", "the task covidnet has no field 'data.cohort'"),
        (ARDS, "data.size", "tasks that have it: covidnet"),
    ],
)
def test_a_field_of_another_model_or_task_is_refused(recipe, path, said):
    with pytest.raises(UsageError) as caught:
        override(recipe, {path: 1})
    assert said in str(caught.value)


def test_another_model_keeps_the_fields_that_both_have():
    lstm = override(ARDS, {"model.name": "lstm", "model.layers": 2})
    assert lstm.model.model_dump() == {**ARDS.model.model_dump(), "name": "lstm", "layers": 2}
    assert set(BOOSTING.model.model_dump()) == {"name", "trees", "leaves", "learning_rate", "feature_fraction", "l2"}
    assert override(BOOSTING, {"model.name": "gru", "model.hidden": 4}).model.model_dump()["hidden"] == 4
    assert "unknown ards model 'covidnet'" in refused({"model.name": "covidnet"})
    assert "use one of: gru" in refused({"model.name": "gruu"})
    assert "unknown ards model '7'" in refused({"model.name": 7})
    assert override(COVIDNET, {"model.name": "resnet18"}).model.model_dump()["dropout"] == 0.3


def test_the_task_is_not_overridden():
    assert "this recipe belongs to the task ards" in refused({"task": "covidnet"})
    assert override(ARDS, {"task": "ards"}) == ARDS


def test_a_recipe_of_version_0_1_is_read_without_the_fields_of_other_models(tmp_path):
    document = ARDS.model_dump(mode="json")
    document["model"] |= {"width": 1.0, "trees": 500, "weights": None}
    document["data"] |= {"size": None, "augment": True}
    (tmp_path / "recipe.json").write_text(json.dumps(document))
    assert read_recipe(tmp_path / "recipe.json") == ARDS
    assert parse_recipe(update_recipe(document)) == ARDS


def test_fields_of_version_0_1_have_their_new_names(tmp_path):
    recipe = override(ARDS, {"model.name": "boosting", "model.learning_rate": 0.2, "loop.ema_decay": 0.5})
    space = {"model.feature_fraction": "uniform(0.1,0.9)"}
    recipe = recipe.model_copy(update={"search": Search(space=space, points=({"model.feature_fraction": 0.3},))})
    text = json.dumps(recipe.model_dump(mode="json"))
    for old, new in FIELDS.items():
        for words in ((old.partition(".")[2], new.partition(".")[2]), (old, new)):
            text = text.replace(f'"{words[1]}"', f'"{words[0]}"')
    document = json.loads(text)
    document["scaling"]["resize_seconds"] = 60.0
    text = json.dumps(document)
    assert {"batch", "early_stop", "ema", "keep", "sum"} <= document["loop"].keys()
    assert document["model"]["rate"] == 0.2 and document["search"]["space"] == {"model.share": "uniform(0.1,0.9)"}
    (tmp_path / "recipe.json").write_text(text)
    assert read_recipe(tmp_path / "recipe.json") == recipe
    assert "is now 'loop.global_batch_size'" in refused({"loop.batch": 8})


def test_a_recipe_of_a_task_of_ones_own_has_plain_parts():
    recipe = parse_recipe({"task": "mine", "model": {"name": "tcn"}})
    assert override(recipe, {"optim.lr": 1e-4}).optim.lr == 1e-4
    with pytest.raises(UsageError, match=r"the task mine has no field 'data\.size'"):
        override(recipe, {"data.size": 64})


def test_every_field_is_described():
    for recipe in BASES:
        for path, (_, description) in list_fields(recipe).items():
            assert description, path


def test_paths_are_leaves_only():
    assert not {"optim", "loop", "model"} & set(flatten(ARDS))
    assert DISTRIBUTIONS.keys() == {"uniform", "loguniform", "randint", "choice"}


def test_one_weight_of_a_class_is_a_path_of_its_own():
    """So that the published search space can be written: weights of classes 2 and 3, uniform 1 to 10."""
    both = override(ARDS, {"optim.class_weight.1": 3, "optim.class_weight.2": 2.5})
    assert both.optim.class_weight == (1.0, 3.0, 2.5)
    assert override(both, {"optim.class_weight.0": 4}).optim.class_weight == (4.0, 3.0, 2.5)
    assert parse_dimension("optim.class_weight.2", "uniform(1,10)") == ("uniform", [1, 10])
    for wrong in ("optim.lr.1", "optim.class_weight.x", "data.1"):
        with pytest.raises(UsageError, match="unknown recipe field"):
            override(ARDS, {wrong: 1})


def test_each_worker_gets_a_shard():
    recipe = override(shipped_recipe("ards"), {"scaling.workers": "1:4"})
    assert with_enough_shards(recipe) == recipe and recipe.loop.shards == 4
    assert with_enough_shards(override(recipe, {"scaling.workers": "1:9"})).loop.shards == 9
    assert with_enough_shards(override(recipe, {"search.workers_per_trial": 6})).loop.shards == 6
    with pytest.raises(UsageError, match="129 workers cannot share a batch of 128"):
        with_enough_shards(override(recipe, {"scaling.workers": 129}))
