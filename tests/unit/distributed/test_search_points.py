"""What a search tries: the same points, whether it was interrupted or not."""

import re
from pathlib import Path
from typing import Any

import pytest
from ray import tune as ray_tune

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.distributed.tune import PersistentOptunaSearch, distributions, pbt_param_space, search
from raylab.errors import UsageError
from raylab.tasks.recipes import shipped_recipe
from raylab.training.trials import Trials

PLANNED = 7


def make_recipe(search: str, seed: int = 3) -> Recipe:
    recipe = override(shipped_recipe("ards", smoke=True), {"search.search": search, "seed": seed})
    first = recipe.search.points[0]
    return override(recipe, {"search.points": [first, {**first, "optim.lr": 2e-3}, {**first, "optim.lr": 3e-3}]})


def try_points(directory: Path, recipe: Recipe, interruptions: set[int]) -> list[dict[str, Any]]:
    """The points of a search whose driver is killed after these trials have begun; the last of them has not ended."""
    space = distributions(recipe)
    trials = Trials(directory, PLANNED)
    search = PersistentOptunaSearch(trials, space, recipe)
    for at in range(PLANNED):
        if at in interruptions:
            trials = Trials(directory, PLANNED)
            search = PersistentOptunaSearch(trials, space, recipe)
            for again in trials.begun:
                assert search.suggest(f"again-{again}")["trial"] == {"number": again, "assigned": trials.params[again]}
                finish(trials, search, f"again-{again}", again)
        assert search.suggest(str(at))["trial"]["number"] == at
        if at + 1 not in interruptions:
            finish(trials, search, str(at), at)
    return [Trials(directory, PLANNED).params[number] for number in range(PLANNED)]


def finish(trials: Trials, search: PersistentOptunaSearch, name: str, number: int) -> None:
    objective = 0.5 + 0.01 * (number * 5 % 7)
    search.on_trial_complete(name, {"objective": objective})
    trials.end(number, {"how": "planned", "objective": objective, "params": trials.params[number]})


@pytest.mark.parametrize("interruptions", [{1}, {2, 5}, {1, 2, 3, 4, 5, 6}])
@pytest.mark.parametrize("search", ["random", "tpe"])
def test_an_interrupted_search_tries_the_same_points(tmp_path: Path, search: str, interruptions: set[int]) -> None:
    recipe = make_recipe(search)
    undisturbed = try_points(tmp_path / "undisturbed", recipe, set())
    assert try_points(tmp_path / "interrupted", recipe, interruptions) == undisturbed
    assert undisturbed[:3] == [dict(point) for point in recipe.search.points]
    assert len({str(point) for point in undisturbed}) == PLANNED
    assert try_points(tmp_path / "other", make_recipe(search, seed=4), set())[3:] != undisturbed[3:]


def test_an_interrupted_pbt_search_tries_the_same_points(tmp_path: Path) -> None:
    recipe = make_recipe("random")
    space = distributions(recipe)
    pbt_param_space(Trials(tmp_path / "undisturbed", PLANNED), space, recipe)
    for planned in (2, 4, PLANNED):
        pbt_param_space(Trials(tmp_path / "interrupted", planned), space, recipe)
    both = [Trials(tmp_path / name, PLANNED).params for name in ("undisturbed", "interrupted")]
    assert both[0] == both[1] and len({str(point) for point in both[0].values()}) == PLANNED


class Asked(Exception):
    """Raised instead of starting a search."""


@pytest.mark.parametrize("settings", [{}, {"scaling.gpu": True, "scaling.cpus_per_worker": 4}], ids=["cpu", "gpu"])
def test_a_trial_asks_for_what_a_worker_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    def with_resources(function: Any, resources: dict[str, float]) -> None:
        raise Asked(resources)

    monkeypatch.setattr(ray_tune, "with_resources", with_resources)
    with pytest.raises(Asked) as asked:
        search(override(make_recipe("random"), settings), tmp_path, tmp_path, None)  # type: ignore[arg-type]
    assert asked.value.args == ({"CPU": 4.0, "GPU": 1.0} if settings else {"CPU": 1.0},)


@pytest.mark.parametrize(
    ("space", "what", "do"),
    [
        ("model.layers=uniform(1,3)", "got a number with a fractional part", "use randint or choice"),
        ("model.hidden=choice(8,x)", "unable to parse string as an integer, got 'x'", "given with --space"),
        ("model.hiden=choice(8,16)", "unknown recipe field 'model.hiden'", "model.hidden"),
    ],
)
def test_a_space_that_a_field_does_not_take_is_refused_before_the_search(space: str, what: str, do: str) -> None:
    path, _, text = space.partition("=")
    recipe = override(shipped_recipe("ards"), {"search.space": {path: text}})
    with pytest.raises(UsageError, match=f"--space {re.escape(space)}: .*{what}") as error:
        distributions(recipe)
    assert do in error.value.do
