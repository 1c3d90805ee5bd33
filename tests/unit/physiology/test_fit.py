"""Fitting: patients whose parameters are known are found again, and what the readings cannot tell is said."""

import pytest
import torch

from raylab.errors import UsageError
from raylab.physiology.fit import ERROR, FREE, IDENTIFIED, fit
from raylab.physiology.parameters import inputs
from raylab.physiology.steady import steady_state


@pytest.fixture(scope="module")
def cohort():
    """40 stays with 6 readings each, over FiO2 and PEEP, and their exact values."""
    generator = torch.Generator().manual_seed(1)
    n, m = 40, 6

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    truth = {
        "shunt": uniform(0.05, 0.4),
        "vq_log_sd": uniform(0.5, 1.4),
        "alveolar_dead_space": uniform(0.1, 0.5),
        "compliance_mL_per_cmH2O": uniform(20, 70),
    }
    stay = torch.arange(n).repeat_interleave(m)
    settings = {
        "fio2": torch.linspace(0.35, 1, m, dtype=torch.float64).repeat(n),
        "tidal_volume_mL": 430.0,
        "collapsed": 0.0,
    }
    readings = inputs({**settings, **{name: value[stay] for name, value in truth.items()}})
    found = steady_state(readings)
    measured = {name: found.values[name].clone() for name in ERROR}
    return truth, readings, measured, stay


def test_known_patients_are_found_again(cohort):
    truth, readings, measured, stay = cohort
    blank = readings.but(shunt=0.1, vq_log_sd=0.9, alveolar_dead_space=0.2, compliance_mL_per_cmH2O=40.0)
    found = fit(blank, measured, stay)
    assert found.settled.all()
    assert found.rms.max() < 0.5
    for name, tolerance in {"shunt": 0.04, "compliance_mL_per_cmH2O": 3.0, "alveolar_dead_space": 0.1}.items():
        assert (found.value[name] - truth[name]).abs().median() < tolerance, name
    for name, value in truth.items():
        inside = (found.low[name] <= value) & (value <= found.high[name])
        assert inside.float().mean() >= 0.9, name
    assert (found.shrink["shunt"] < IDENTIFIED).all()
    assert (found.shrink["compliance_mL_per_cmH2O"] < IDENTIFIED).all()
    assert (found.shrink["cardiac_output_L_per_min"] > IDENTIFIED).float().mean() > 0.9  # nothing here measures it


def test_gases_that_disagree_with_the_model_settle(cohort, monkeypatch):
    """With readings off by two of their errors, the way to the optimum lies in a curved valley, where steps of full
    length leap from side to side."""
    _, readings, measured, stay = cohort
    monkeypatch.setattr("raylab.physiology.fit.STEPS", 40)
    noise = torch.randn(len(stay), 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    off = {
        "pao2_mmHg": measured["pao2_mmHg"] * torch.exp(0.2 * noise[:, 0]),
        "paco2_mmHg": measured["paco2_mmHg"] * torch.exp(0.12 * noise[:, 1]),
    }
    blank = readings.but(shunt=0.1, vq_log_sd=0.9, alveolar_dead_space=0.2, compliance_mL_per_cmH2O=40.0)
    assert fit(blank, off, stay).settled.all()


def test_one_gas_leaves_wide_intervals(cohort):
    truth, readings, measured, stay = cohort
    first = torch.arange(0, len(stay), 6)
    many = fit(readings, measured, stay)
    one = fit(readings.take(first), {k: v[first] for k, v in measured.items()}, stay[first])

    def widths(found, name):
        return found.high[name] - found.low[name]

    assert (widths(one, "shunt") > widths(many, "shunt")).float().mean() > 0.9
    assert (one.shrink["vq_log_sd"] > many.shrink["vq_log_sd"]).all()
    for name, value in truth.items():
        inside = (one.low[name] <= value) & (value <= one.high[name])
        assert inside.float().mean() >= 0.85, name


def test_without_pressures_compliance_stays_at_its_prior(cohort):
    _, readings, measured, stay = cohort
    gases = {name: measured[name] for name in ("pao2_mmHg", "paco2_mmHg")}
    found = fit(readings, gases, stay)
    assert (found.value["compliance_mL_per_cmH2O"] - FREE["compliance_mL_per_cmH2O"].median).abs().max() < 1e-3
    assert found.shrink["compliance_mL_per_cmH2O"].min() > 0.999
    assert found.residual["plateau_cmH2O"].isnan().all()


def test_shunt_alone(cohort):
    truth, readings, measured, stay = cohort
    found = fit(readings, {"pao2_mmHg": measured["pao2_mmHg"]}, stay, free=["shunt"])
    assert (found.value["shunt"] - truth["shunt"]).abs().max() < 0.01
    assert list(found.value) == ["shunt"]


def test_impossible_readings_harm_only_their_stay(cohort):
    _, readings, measured, stay = cohort
    dying = readings.but(
        hb_g_per_dL=torch.where(stay == 3, 4.0, 10.5), fio2=torch.where(stay == 3, 0.21, readings.fio2)
    )
    dying = dying.but(vo2_mL_per_min=torch.where(stay == 3, 600.0, 250.0))
    free = ["shunt", "vq_log_sd"]
    found, calm = fit(dying, measured, stay, free), fit(readings, measured, stay, free)
    assert found.status.nonzero().flatten().tolist() == [3]
    assert found.value["shunt"].isnan().nonzero().flatten().tolist() == [3]
    others = torch.arange(40) != 3
    assert torch.allclose(found.value["shunt"][others], calm.value["shunt"][others], atol=1e-6)


def test_a_parameter_that_cannot_be_fitted_is_refused(cohort):
    _, readings, measured, stay = cohort
    with pytest.raises(UsageError, match="shunt"):
        fit(readings, measured, stay, free=["shunts"])
