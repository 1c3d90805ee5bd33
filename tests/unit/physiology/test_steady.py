"""Responses of the steady state: direction and size, against what is published. The plots are in docs/physiology.md."""

import pytest
import torch

from raylab.physiology.parameters import inputs
from raylab.physiology.steady import OUTPUTS, steady_state


def values(**given):
    found = steady_state(inputs(given))
    assert set(found.status.tolist()) == {0}
    return found.values


def line(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


HEALTHY = {
    "fio2": 0.21, "peep_cmH2O": 0, "tidal_volume_mL": 500, "rate_per_min": 13, "shunt": 0.02, "vq_log_sd": 0.4,
    "alveolar_dead_space": 0, "collapsed": 0, "compliance_mL_per_cmH2O": 80, "hb_g_per_dL": 15,
    "cardiac_output_L_per_min": 5, "rq": 0.8,
}  # fmt: skip


def test_a_healthy_person_has_ordinary_gases():
    found = values(**HEALTHY)
    assert 85 < found["pao2_mmHg"] < 100
    assert 36 < found["paco2_mmHg"] < 42
    assert found["ph"].item() == pytest.approx(7.4, abs=0.03)
    assert 0.7 < found["svo2"] < 0.78
    assert 35 < found["pvo2_mmHg"] < 42  # mixed venous PO2 of 40
    assert 0.25 < found["dead_space_fraction"] < 0.36


def test_the_usual_patient_has_moderate_ards():
    """P/F 100 to 200; dead space .58 +- .09 (Nuckton, N Engl J Med 2002;346:1281); driving pressure and compliance of
    the MIMIC-IV demo: P10 to P90 of static compliance 27 to 63, driving pressure 11."""
    found = values()
    assert 100 < found["pf_mmHg"] < 200
    assert 0.40 < found["dead_space_fraction"] < 0.76
    assert 27 < 430 / found["driving_cmH2O"] < 63
    assert 8 < found["driving_cmH2O"] < 14
    assert set(found) == set(OUTPUTS)


def test_iso_shunt():
    """P/F at one shunt is not one number: it falls, then rises with FiO2 (Karbing, Crit Care 2007;11:R118; Feiner and
    Weiskopf, Crit Care Med 2017;45:e40: most between shunts of .1 and .3, hardly at higher ones above FiO2 .4)."""
    fio2 = torch.linspace(0.21, 1, 40, dtype=torch.float64)
    varies = {}
    for shunt in (0.1, 0.2, 0.3, 0.5):
        pf = values(fio2=fio2, shunt=shunt, collapsed=0, vq_log_sd=0)["pf_mmHg"]
        upper = pf[fio2 > 0.4]
        varies[shunt] = (upper.max() - upper.min()).item()
        assert pf.min() < pf[0]
    assert min(varies[0.1], varies[0.2]) > 100
    assert varies[0.5] < 0.5 * min(varies[0.1], varies[0.2])
    # 30 % shunt in pure oxygen: PaO2 near 100 to 200 mmHg, not 600; 50 %: oxygen hardly helps
    assert 80 < values(fio2=1.0, shunt=0.3, collapsed=0)["pao2_mmHg"] < 220
    gain = values(fio2=line(0.5, 1.0), shunt=0.5, collapsed=0)["pao2_mmHg"]
    assert gain[1] - gain[0] < 15


def test_oxygen_undoes_scatter_but_not_shunt():
    scatter = values(fio2=line(0.25, 1.0), vq_log_sd=1.6, shunt=0.02, collapsed=0)["pao2_mmHg"]
    assert scatter[0] < 70
    assert scatter[1] > 450


def test_ventilation_moves_co2_and_little_else():
    rate = values(rate_per_min=line(12, 24))
    assert rate["paco2_mmHg"][1] == pytest.approx(rate["paco2_mmHg"][0].item() / 2, rel=0.08)
    assert rate["power_J_per_min"][1] > 1.9 * rate["power_J_per_min"][0]
    # from 12 to 6 mL/kg as in the ARDS network's trial: dead space weighs more, CO2 more than doubles at one rate
    volume = values(tidal_volume_mL=line(12 * 66, 6 * 66), alveolar_dead_space=0.1)
    assert 2 < volume["paco2_mmHg"][1] / volume["paco2_mmHg"][0] < 3
    assert volume["driving_cmH2O"][1] == pytest.approx(volume["driving_cmH2O"][0].item() / 2, rel=0.15)


def test_peep_opens_what_can_be_opened():
    peep = values(peep_cmH2O=line(5, 10, 15), collapsed=0.3)
    assert peep["pf_mmHg"].diff().min() > 10
    assert peep["shunt_total"].diff().max() < 0
    # Chiumello 2013: P/F 170 at PEEP 10, some tens more at 15
    fixed = values(peep_cmH2O=line(5, 15), collapsed=0)
    assert fixed["pf_mmHg"][0] == fixed["pf_mmHg"][1]
    assert fixed["driving_cmH2O"][0] == fixed["driving_cmH2O"][1]


def test_power_is_gattinonis():
    given = inputs({})
    found = steady_state(given)
    ie = (given.inspired_fraction / (1 - given.inspired_fraction)).item()
    volume, rate, peep = 0.430, 20.0, 8.0
    elastance = found.values["driving_cmH2O"].item() / volume
    resistance = given.resistance_cmH2O_s_per_L.item()
    power = 0.098 * rate * (volume**2 * (elastance / 2 + rate * (1 + ie) / (60 * ie) * resistance) + volume * peep)
    assert found.values["power_J_per_min"].item() == pytest.approx(power, rel=1e-9)


def test_end_tidal_lies_below_arterial_by_dead_space_and_shunt():
    found = values(alveolar_dead_space=line(0, 0.3), shunt=line(0.02, 0.02))
    gap = found["paco2_mmHg"] - found["etco2_mmHg"]
    assert 0 < gap[0] < 6
    assert gap[1] > 12


def test_little_blood_flow_lowers_venous_and_arterial_oxygen():
    found = values(cardiac_output_L_per_min=line(3.5, 7))
    assert found["svo2"][0] < found["svo2"][1] - 0.15
    assert found["pao2_mmHg"][0] < found["pao2_mmHg"][1]
