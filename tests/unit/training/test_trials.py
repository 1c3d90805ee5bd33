"""What a search's directory says of its trials; Ray itself is in tests/ray."""

import pytest

from raylab.errors import DataError, NonFiniteError, RunError
from raylab.training.run_failure import read_failure, write_failure
from raylab.training.trials import Trials


def test_a_trial_that_was_killed_before_it_had_parameters_is_numbered_again(tmp_path):
    """The kill came between the directory and params.json: the trial never existed, and its number is free."""
    (tmp_path / "000").mkdir()
    trials = Trials(tmp_path, planned=2)
    assert trials.params == {}
    assert trials.new({"optim.lr": 1e-3}) == 0
    assert trials.new({"optim.lr": 2e-3}) == 1
    assert Trials(tmp_path, planned=2).begun == [0, 1]


def test_ended_trials_are_not_begun_again(tmp_path):
    trials = Trials(tmp_path, planned=2)
    for rate in (1e-3, 2e-3):
        trials.new({"optim.lr": rate})
    trials.end(0, {"how": "planned", "objective": 0.7})
    again = Trials(tmp_path, planned=2)
    assert again.begun == [1]
    assert again.ended[0]["objective"] == pytest.approx(0.7)


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null"])
@pytest.mark.fault(19)
def test_a_damaged_trial_is_named_and_the_others_go_on(tmp_path, damage):
    trials = Trials(tmp_path, planned=3)
    for rate in (1e-3, 2e-3, 3e-3):
        trials.new({"optim.lr": rate})
        trials.end(len(trials.ended), {"how": "planned", "objective": rate})
    (tmp_path / "000" / "params.json").write_text(damage)
    (tmp_path / "001" / "end.json").write_text(damage)
    (tmp_path / "notes").mkdir()
    again = Trials(tmp_path, planned=3)
    assert again.begun == [1] and list(again.ended) == [2]
    assert "000/params.json" in again.damaged[0] and "001/end.json" in again.damaged[1]
    assert again.new({"optim.lr": 4e-3}) == 3, "the number of the trial that is left out is not used again"


@pytest.mark.parametrize("damage", ["", "[]", '{"kind": "RunError"}', '{"kind": "RunError", "args": "what"}'])
def test_a_damaged_failure_is_named(tmp_path, damage):
    write_failure(tmp_path, NonFiniteError("the loss is NaN", "why", "do"))
    assert isinstance(read_failure(tmp_path), NonFiniteError)
    (tmp_path / "failure.json").write_text('{"kind": "re", "args": ["what", "", ""]}')
    assert type(read_failure(tmp_path)) is RunError
    (tmp_path / "failure.json").write_text(damage)
    with pytest.raises(DataError, match=r"failure\.json"):
        read_failure(tmp_path)
