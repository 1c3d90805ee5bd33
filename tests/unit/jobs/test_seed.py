"""`--seed` of the verbs that train."""

import pytest

from jobs import cli, train, tune
from raylab.errors import UsageError

WORDS = {
    "train": ("ards", "--data", "x"),
    "tune": ("ards", "--data", "x"),
    "transfer": ("ards", "--data", "x", "--from", "first"),
    "estimate": ("train", "ards", "--data", "x"),
}


@pytest.mark.parametrize("verb", WORDS)
def test_every_verb_that_trains_takes_a_seed(verb: str) -> None:
    parser, _ = cli.build_parser(verb)
    args = parser.parse_args([*WORDS[verb], "--seed", "7", "--set", "optim.lr=1e-3"])
    assert train.parse_settings(args) == {"optim.lr": 1e-3, "seed": 7}
    assert "seed" not in train.parse_settings(parser.parse_args([*WORDS[verb]]))


def test_the_recipe_has_the_seed() -> None:
    for module in (train, tune):
        parser, _ = cli.build_parser(module.__name__.removeprefix("jobs."))
        assert module.recipe_of(parser.parse_args(["ards", "--data", "x", "--seed", "7"])).seed == 7


def test_two_seeds_are_refused_unless_they_agree() -> None:
    parser, _ = cli.build_parser("train")
    words = [*WORDS["train"], "--seed", "7", "--set"]
    with pytest.raises(UsageError, match="--seed 7 contradicts --set seed=8"):
        train.parse_settings(parser.parse_args([*words, "seed=8"]))
    assert train.parse_settings(parser.parse_args([*words, "seed=7"])) == {"seed": 7}
