"""What `train` says of the ensemble that the benchmark of a task compares."""

import pytest

from jobs.train import describe_ensemble
from raylab.config.overrides import override
from raylab.tasks.recipes import shipped_recipe


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("ards", {}, "5 networks, as in the benchmark, takes up to 5 times as long: --set model.members=5"),
        ("ards", {"model.members": 3}, "takes longer"),
        ("ards", {"model.members": 5}, ""),
        ("ards", {"model.name": "boosting"}, ""),
        ("covidnet", {}, ""),
    ],
)
def test_a_recipe_with_fewer_networks_than_the_benchmark_says_so(task, settings, said):
    hint = describe_ensemble(override(shipped_recipe(task), settings))
    assert said in hint and bool(hint) == bool(said)
