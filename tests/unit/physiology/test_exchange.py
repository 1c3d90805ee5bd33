"""The compartments' equations: mass balance, textbook special cases, gradients, and rows that have no solution."""

import pytest
import torch
from scipy.stats import qmc

from raylab.physiology import blood, exchange
from raylab.physiology.parameters import LIVING, QUANTITIES, inputs
from raylab.physiology.steady import arterial, steady_state, total_shunt


@pytest.fixture(scope="module")
def many():
    """512 patients over the ranges of living ones, and their steady states."""
    unit = qmc.Sobol(len(LIVING), rng=3).random(512)
    scaled = qmc.scale(unit, *zip(*LIVING.values(), strict=True))
    given = inputs({name: scaled[:, i] for i, name in enumerate(LIVING)})
    return given, steady_state(given)


def test_mass_balance(many):
    """O2 in - O2 out = VO2 and CO2 out = VCO2, to 1e-6: inspired gas from the nitrogen that leaves each compartment."""
    given, found = many
    ok = found.status == 0
    assert ok.float().mean() > 0.75
    of, gas = found.of, found.gas
    # mL STPD / min: k = 8.63 is L BTPS mmHg in mL/dL L, so 10 / k turns L BTPS mmHg into mL STPD
    out_o2 = (of.ventilation * gas.x).sum(1) * 10 / of.k
    out_co2 = (of.ventilation * gas.y).sum(1) * 10 / of.k
    nitrogen = of.ventilation * (of.dry_mmHg[:, None] - gas.x - gas.y)
    inspired = nitrogen / (of.dry_mmHg * (1 - of.fio2))[:, None]
    in_o2 = (inspired * (of.fio2 * of.dry_mmHg)[:, None]).sum(1) * 10 / of.k
    assert torch.allclose((in_o2 - out_o2)[ok], given.vo2_mL_per_min[ok], rtol=1e-6)
    assert torch.allclose(out_co2[ok], (given.vo2_mL_per_min * given.rq)[ok], rtol=1e-6)
    o2_a, co2_a = arterial(of, gas)
    flow = 10 * given.cardiac_output_L_per_min
    assert torch.allclose((flow * (o2_a - gas.o2_v))[ok], given.vo2_mL_per_min[ok], rtol=1e-6)
    assert torch.allclose((flow * (gas.co2_v - co2_a))[ok], (given.vo2_mL_per_min * given.rq)[ok], rtol=1e-6)


def test_balance_holds_in_pure_oxygen():
    """At FiO2 1 there is no nitrogen to reckon with: alveolar O2 and CO2 fill the barometric pressure."""
    given = inputs({"fio2": 1.0})
    found = steady_state(given)
    assert torch.allclose(found.gas.x + found.gas.y, found.of.dry_mmHg[:, None].expand_as(found.gas.x), rtol=1e-9)
    out_co2 = (found.of.ventilation * found.gas.y).sum(1) * 10 / found.of.k
    assert torch.allclose(out_co2, given.vo2_mL_per_min * given.rq, rtol=1e-9)


def test_end_capillary_blood_is_blood(many):
    _, found = many
    of, gas = found.of, found.gas
    ok = found.status == 0
    now = blood.state(gas.ln_x, gas.ln_y, gas.h, *exchange.blood_of(of))
    assert now.excess[ok].abs().max() < 1e-8


def test_a_lung_of_one_kind_obeys_the_alveolar_gas_and_shunt_equations():
    given = inputs({"vq_log_sd": 0.0, "collapsed": 0.0, "shunt": torch.tensor([0.0, 0.3]), "fio2": 0.4})
    found = steady_state(given)
    of, gas = found.of, found.gas
    x, y = gas.x[:, 0], gas.y[:, 0]
    f, r = given.fio2, given.rq
    assert torch.allclose(x, f * of.dry_mmHg - y * (f + (1 - f) / r), rtol=1e-9)
    assert torch.allclose(y, 8.63 * given.vo2_mL_per_min * r / 10 / given.alveolar_ventilation_L_per_min(), rtol=1e-3)
    end = blood.state(gas.ln_x, gas.ln_y, gas.h, *exchange.blood_of(of)).o2[:, 0]
    o2_a, _ = arterial(of, gas)
    assert torch.allclose((end - o2_a) / (end - gas.o2_v), given.shunt, atol=1e-9)


def test_a_row_does_not_depend_on_its_neighbours(many):
    given, found = many
    rows = torch.tensor([5, 100, 400])
    alone = steady_state(given.take(rows))
    for name, value in alone.values.items():
        assert torch.equal(value.isnan(), found.values[name][rows].isnan())
        assert torch.allclose(value, found.values[name][rows], rtol=1e-9, equal_nan=True)


def test_gradients_are_those_of_the_solution():
    names = (
        "shunt",
        "vq_log_sd",
        "alveolar_dead_space",
        "compliance_mL_per_cmH2O",
        "collapsed",
        "cardiac_output_L_per_min",
    )
    at = {name: torch.tensor([QUANTITIES[name].usual], dtype=torch.float64, requires_grad=True) for name in names}
    found = steady_state(inputs(at))
    for output in ("pao2_mmHg", "paco2_mmHg", "ph", "plateau_cmH2O", "etco2_mmHg"):
        gradient = torch.autograd.grad(
            found.values[output].sum(), list(at.values()), retain_graph=True, allow_unused=True
        )
        for name, slope in zip(names, gradient, strict=True):
            e = 1e-5 * QUANTITIES[name].usual
            sides = [
                steady_state(inputs({**{k: v.detach() for k, v in at.items()}, name: at[name].detach() + s})).values[
                    output
                ]
                for s in (e, -e)
            ]
            expected = (sides[0] - sides[1]).item() / (2 * e)
            got = 0.0 if slope is None else slope.item()
            assert got == pytest.approx(expected, rel=2e-4, abs=1e-4), (output, name)


def test_a_patient_who_needs_more_oxygen_than_arrives_has_no_steady_state_and_harms_nobody():
    given = inputs(
        {"cardiac_output_L_per_min": torch.tensor([6.0, 1.5, 6.0]), "vo2_mL_per_min": 350.0, "hb_g_per_dL": 7.0}
    )
    found = steady_state(given)
    assert found.status.tolist() == [0, 2, 0]
    assert found.values["pao2_mmHg"].isnan().tolist() == [False, True, False]
    assert torch.equal(found.values["pao2_mmHg"][0], found.values["pao2_mmHg"][2])


def test_a_patient_who_hardly_breathes_has_no_steady_state():
    found = steady_state(inputs({"rate_per_min": 4.0, "alveolar_dead_space": 0.8, "fio2": 0.21}))
    assert found.status.tolist() == [2]


def test_equations_that_do_not_converge_are_said_row_by_row(monkeypatch):
    monkeypatch.setattr(exchange, "MORE_STEPS", ())
    monkeypatch.setattr(exchange, "ROUGH_STEPS", 4)
    given = inputs({"shunt": torch.linspace(0.02, 0.6, 60, dtype=torch.float64), "vq_log_sd": 1.5, "fio2": 0.3})
    with torch.no_grad():
        _, converged = exchange.solve(exchange.system(given, total_shunt(given, torch.ones(60, dtype=torch.float64))))
    assert 0 < converged.sum() < 60
    assert set(steady_state(given).status.tolist()) >= {0, 1}
