"""What a search's directory says of its trials; Ray itself is in tests/ray."""

import pytest

from raylab.distributed import tune


def test_a_trial_that_was_killed_before_it_had_parameters_is_numbered_again(tmp_path):
    """The kill came between the directory and params.json: the trial never existed, and its number is free."""
    (tmp_path / "000").mkdir()
    trials = tune.Trials(tmp_path, planned=2)
    assert trials.params == {}
    assert trials.new({"optim.lr": 1e-3}) == 0
    assert trials.new({"optim.lr": 2e-3}) == 1
    assert tune.Trials(tmp_path, planned=2).begun == [0, 1]


def test_ended_trials_are_not_begun_again(tmp_path):
    trials = tune.Trials(tmp_path, planned=2)
    for rate in (1e-3, 2e-3):
        trials.new({"optim.lr": rate})
    trials.end(0, {"how": "planned", tune.OBJECTIVE: 0.7})
    again = tune.Trials(tmp_path, planned=2)
    assert again.begun == [1]
    assert again.ended[0][tune.OBJECTIVE] == pytest.approx(0.7)
