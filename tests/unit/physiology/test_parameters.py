from dataclasses import fields

import numpy as np
import pytest
import torch

from raylab.errors import DataError, UsageError
from raylab.physiology.parameters import QUANTITIES, Inputs, check, inputs


def test_every_input_has_its_range():
    assert [field.name for field in fields(Inputs)] == list(QUANTITIES)
    for quantity in QUANTITIES.values():
        assert quantity.low <= quantity.usual <= quantity.high
    check(inputs({}))


@pytest.mark.parametrize("name", QUANTITIES)
def test_what_is_out_of_range_or_no_number_is_refused_by_name_and_row(name):
    usual = QUANTITIES[name].usual
    for wrong in (QUANTITIES[name].low - 1e-6, QUANTITIES[name].high + 1e-6, float("nan")):
        with pytest.raises(DataError, match=rf"{name} is not within .*row 1: .*; 1 of 3 rows"):
            check(inputs({name: np.array([usual, wrong, usual])}))


def test_a_breath_below_the_dead_space_is_refused():
    with pytest.raises(DataError, match="does not exceed the airway dead space"):
        check(inputs({"tidal_volume_mL": 150.0, "predicted_weight_kg": 80.0}))


def test_an_unknown_input_prints_the_right_ones():
    with pytest.raises(UsageError, match="peep_cmH2O"):
        inputs({"peep": 5.0})


def test_lengths_that_differ_are_refused():
    with pytest.raises(DataError, match="different lengths"):
        inputs({"shunt": np.zeros(3), "fio2": np.ones(2)})


def test_one_number_serves_all_rows():
    given = inputs({"shunt": np.array([0.1, 0.2]), "fio2": 0.6})
    assert len(given) == 2
    assert given.but(fio2=torch.tensor([0.3, 0.4])).fio2.tolist() == pytest.approx([0.3, 0.4])
