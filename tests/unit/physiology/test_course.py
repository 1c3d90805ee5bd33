"""The time course: balances step by step, the steady state as its end, and published times."""

import pytest
import torch

from raylab.errors import DataError, UsageError
from raylab.physiology import blood, course, exchange
from raylab.physiology.parameters import inputs
from raylab.physiology.steady import arterial, steady_state


def test_without_a_change_nothing_changes():
    times, values, status = course.course(inputs({}), [], 5, step_min=0.5)
    assert len(times) == 11
    assert status.eq(0).all()
    for value in values.values():
        assert torch.allclose(value, value[:, :1].expand_as(value), rtol=1e-8)


def test_what_is_stored_is_what_came_in_less_what_went_out():
    """O2 and CO2 of lung and tissues over one step, to 1e-6 of what is taken up."""
    given = inputs({"collapsed": 0.0})
    stores, _ = course.begin(given)
    now = given.but(fio2=0.8, rate_per_min=12.0)
    minutes = 0.2
    after, _ = course.advance(now, stores, minutes)
    of = course.unsteady(now, stores, after.opened, minutes)
    o2_a, co2_a = arterial(of, after.gas)
    ml = 10 / of.k  # L BTPS mmHg -> mL STPD
    gas_L = given.gas_volume_mL[:, None] / 1000 * exchange.shares(of.ratio)
    for before, end, content, made, place, a, tension in (
        (stores.o2, after.o2, after.gas.o2_v, -given.vo2_mL_per_min, course.O2, o2_a, (stores.gas.x, after.gas.x)),
        (stores.co2, after.co2, after.gas.co2_v, given.vo2_mL_per_min * given.rq, course.CO2, co2_a,
         (stores.gas.y, after.gas.y)),
    ):  # fmt: skip
        tissues = sum(10 * tissue[place] * (end[i] - before[i]) for i, tissue in enumerate(course.TISSUES))
        lung = (gas_L * (tension[1] - tension[0])).sum(1) * ml
        exchanged = 10 * given.cardiac_output_L_per_min * (content - a) * minutes  # from blood into alveolar gas
        assert torch.allclose(tissues, made * minutes - exchanged, rtol=1e-6)
        if place == course.CO2:
            breathed = (of.ventilation * after.gas.y).sum(1) * ml * minutes
            assert torch.allclose(lung, exchanged - breathed, rtol=1e-6)
        else:
            # net uptake of gas is drawn in beside the expired
            net = (of.flow * of.k / of.dry_mmHg)[:, None] * exchange.shares(of.ratio)
            end_o2 = blood.state(*after.gas[:3], *exchange.blood_of(of))
            inspired = of.ventilation + net * (
                end_o2.o2 - after.gas.o2_v[:, None] - (after.gas.co2_v[:, None] - end_o2.co2)
            )
            o2_in = (inspired * (of.fio2 * of.dry_mmHg)[:, None]).sum(1) * ml * minutes
            o2_out = (of.ventilation * after.gas.x).sum(1) * ml * minutes
            assert torch.allclose(lung, o2_in - o2_out + exchanged, rtol=1e-6)


def test_the_end_is_the_steady_state_of_the_new_settings():
    given = inputs({"collapsed": torch.tensor([0.0, 0.3])})
    change = {"fio2": 0.7, "peep_cmH2O": 12.0, "rate_per_min": 26.0}
    _, values, _ = course.course(given, [(0, change)], 1200, step_min=10)
    goal = steady_state(given.but(**change)).values
    for name in ("pao2_mmHg", "paco2_mmHg", "ph", "plateau_cmH2O"):
        assert torch.allclose(values[name][:, -1], goal[name], rtol=2e-3), name


def test_oxygen_washes_in_within_minutes():
    """Cakar, Intensive Care Med 2001;27:655: 90 % of the rise of PaO2 after FiO2 .35 to .55 at 4.2 +- 4.1 min."""
    _, values, _ = course.course(inputs({"fio2": 0.35}), [(0, {"fio2": 0.55})], 20)
    pao2 = values["pao2_mmHg"][0]
    reached = (pao2 - pao2[0]) / (pao2[-1] - pao2[0])
    minutes = 0.1 * int((reached > 0.9).nonzero()[0])
    assert 0.5 < minutes < 8.3


def test_co2_takes_longer_than_oxygen():
    """Farhi and Rahn, J Appl Physiol 1955;7:472, in dogs: half-times after a change of ventilation .5 min for O2 stores
    and 4 min for CO2. In an adult half the rise of PaCO2 after halving the rate takes some 5 to 30 min."""
    _, values, _ = course.course(inputs({}), [(0, {"rate_per_min": 10})], 240, step_min=1)
    paco2 = values["paco2_mmHg"][0]
    half = int((paco2 > (paco2[0] + paco2[-1]) / 2).nonzero()[0])
    assert 5 < half < 30


def test_lung_closes_faster_than_it_opens():
    """Chiumello, Intensive Care Med 2013;39:1377: settled within 5 min of a fall of PEEP, not at 60 min of a rise."""
    patients = inputs({"collapsed": 0.3}, rows=2)
    _, values, _ = course.course(patients, [(0, {"peep_cmH2O": torch.tensor([15.0, 3.0])})], 300, step_min=1)
    rise, fall = values["pf_mmHg"]

    def progress(pf):
        return (pf - pf[0]) / (pf[-1] - pf[0])

    assert progress(fall)[5] > 0.9
    assert progress(rise)[30] < 0.9


def test_a_patient_who_fails_stays_failed():
    patients = inputs({"cardiac_output_L_per_min": torch.tensor([6.0, 2.2]), "hb_g_per_dL": 8.0})
    _, values, status = course.course(patients, [(1, {"fio2": 0.21})], 30, step_min=1)
    assert status[0].eq(0).all()
    assert status[1, -1] > 0
    assert status[1].diff().min() >= 0
    assert values["pao2_mmHg"][1].isnan().equal(status[1] > 0)


def test_wrong_changes_are_refused():
    with pytest.raises(UsageError, match="peep_cmH2O"):
        course.course(inputs({}), [(1, {"peep": 10})], 5)
    with pytest.raises(UsageError, match="minute 7"):
        course.course(inputs({}), [(7, {"fio2": 0.5})], 5)
    with pytest.raises(DataError, match="fio2 is not within"):
        course.course(inputs({}), [(1, {"fio2": 50})], 5)
