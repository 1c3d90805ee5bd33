import pytest
import torch

from raylab.physiology import mechanics
from raylab.physiology.parameters import inputs


def test_the_open_fraction_fits_its_plateau():
    peep = torch.linspace(0, 25, 60, dtype=torch.float64)
    given = inputs({"peep_cmH2O": peep, "collapsed": 0.5, "opening_sd_cmH2O": 2.0})
    opened = mechanics.equilibrium(given)
    again = mechanics.open_fraction(given, mechanics.plateau_pressure(given, opened))
    assert torch.allclose(opened, again, atol=1e-9)
    assert opened.diff().min() >= 0
    assert opened[0] < 0.05
    assert opened[-1] > 0.99


def test_closed_lung_is_stiff():
    given = inputs({"collapsed": 0.4, "opening_pressure_cmH2O": 60.0, "opening_sd_cmH2O": 1.0})
    found = mechanics.pressures(given, mechanics.equilibrium(given))
    assert 430 / found["driving_cmH2O"].item() == pytest.approx(0.6 * 40, rel=1e-6)


def test_mean_airway_pressure_is_the_mean_of_the_trace():
    given = inputs({})
    found = mechanics.pressures(given, mechanics.equilibrium(given))
    phase = torch.linspace(0, 1, 300001, dtype=torch.float64)
    fraction = given.inspired_fraction.item()
    resistive = (found["peak_cmH2O"] - found["plateau_cmH2O"]).item()
    inspiration = 8 + resistive + found["driving_cmH2O"].item() * phase / fraction
    trace = torch.where(phase < fraction, inspiration, torch.tensor(8.0, dtype=torch.float64))
    assert found["mean_airway_cmH2O"].item() == pytest.approx(trace.mean().item(), rel=1e-4)
