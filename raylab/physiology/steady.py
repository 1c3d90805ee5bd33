"""Settings and patients -> steady-state blood gases and pressures, and whether a steady state exists."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from raylab.physiology import blood, exchange, mechanics
from raylab.physiology.exchange import Gas, System
from raylab.physiology.parameters import Inputs

OUTPUTS = {
    "pao2_mmHg": "mmHg",
    "paco2_mmHg": "mmHg",
    "ph": "",
    "sao2": "fraction",
    "svo2": "fraction",
    "pvo2_mmHg": "mmHg",
    "pf_mmHg": "mmHg",
    "etco2_mmHg": "mmHg",
    "dead_space_fraction": "fraction",
    "shunt_total": "fraction",
    "plateau_cmH2O": "cmH2O",
    "driving_cmH2O": "cmH2O",
    "peak_cmH2O": "cmH2O",
    "mean_airway_cmH2O": "cmH2O",
    "power_J_per_min": "J/min",
}
STATUS = {
    0: "ok",
    1: "the equations did not converge",
    2: "no steady state: the tissues need more oxygen than they receive",
}


class Steady(NamedTuple):
    """`values` {name of OUTPUTS: [N]}, NaN where `status` [N] is not 0; and their inputs.
    `arterial`: see there."""

    values: dict[str, Tensor]
    status: Tensor
    gas: Gas
    of: System
    arterial: tuple[Tensor, Tensor]


def steady_state(given: Inputs, compiled: bool = False) -> Steady:
    """The steady state of each row. Inputs are not checked: `parameters.check` refuses impossible ones.

    `compiled`: see `exchange.solve`. Gradients with respect to `given` are exact (implicit function theorem) where
    autograd is on.
    """
    opened = mechanics.equilibrium(given)
    of = exchange.system(given, total_shunt(given, opened))
    gas, converged = exchange.solve(of, compiled=compiled)
    return outputs(given, opened, of, gas, converged, starved(of, converged, compiled))


@torch.no_grad()
def starved(of: System, converged: Tensor, compiled: bool = False) -> Tensor:
    """Which of the unsolved rows provably have no solution, bool [N].

    Either the gas of all alveoli together would hold no O2: by the balance of the whole lung its PCO2 is
    k VCO2 / VA and its PO2 F P - PCO2 (F + (1 - F) / R). Or even venous blood without O2 leaves the tissues short:
    the arteriovenous difference falls as venous content rises (some of it passes the shunt), so it is largest at 0.
    """
    rows = (~converged).nonzero()[:, 0]
    short = torch.zeros_like(converged)
    part = of.take(rows)
    pco2 = part.k * part.co2_a * part.flow / (1 - part.shunt) / part.ventilation.sum(1)
    po2 = part.fio2 * part.dry_mmHg - pco2 * (part.fio2 - (1 - part.fio2) * part.o2_a / part.co2_a)
    short[rows] = po2 <= 0
    rows, part = rows[po2 > 0], part.take(po2 > 0)
    if len(rows):
        nothing = torch.zeros_like(part.o2_a)
        gas, found = exchange.solve(replace(part, o2_a=nothing, o2_b=nothing), compiled=compiled)
        short[rows] = found & (arterial(part, gas)[0] < -part.o2_a)
    return short


def total_shunt(given: Inputs, opened: Tensor) -> Tensor:
    """Shunt of the patient and of collapsed lung. Blood flow to collapsed lung is not reduced (no hypoxic
    vasoconstriction: in ARDS, shunt is about the fraction of non-aerated tissue)."""
    return given.shunt + (1 - given.shunt) * mechanics.closed_part(given, opened)


def outputs(given: Inputs, opened: Tensor, of: System, gas: Gas, converged: Tensor, short: Tensor) -> Steady:
    """OUTPUTS of a solved system: arterial and venous tensions from contents, and the pressures.

    `short`: rows known to have no solution.
    """
    o2_a, co2_a = arterial(of, gas)
    sound = converged & (gas.o2_v > 0)
    twice = torch.cat([sound, sound])
    # arbitrary blood where there is no solution, because the search for tensions continues until all rows converge
    both = (
        torch.where(twice, torch.cat([o2_a, gas.o2_v]), 15.0),
        torch.where(twice, torch.cat([co2_a, gas.co2_v]), 50.0),
    )
    same = (torch.cat([value, value]) for value in (of.hb, of.base_excess, of.temperature_C))
    found = blood.tensions(*both, *same)
    n = len(of.fio2)
    expired = (of.ventilation * gas.y).sum(1)  # L/min mmHg
    pao2, paco2 = found.po2_mmHg[:n], found.pco2_mmHg[:n]
    total = given.rate_per_min * given.tidal_volume_mL / 1000
    values = {
        "pao2_mmHg": pao2,
        "paco2_mmHg": paco2,
        "ph": found.ph[:n],
        "sao2": found.s[:n],
        "svo2": found.s[n:],
        "pvo2_mmHg": found.po2_mmHg[n:],
        "pf_mmHg": pao2 / given.fio2,
        # end-tidal gas is approximated by the mixed gas of all alveoli, including those without blood flow
        "etco2_mmHg": expired / of.ventilation.sum(1) * (1 - given.alveolar_dead_space),
        # Enghoff's modification of Bohr's equation (1938; from memory), so it counts shunt and V/Q scatter too
        "dead_space_fraction": 1 - expired / total / paco2,
        "shunt_total": of.shunt,
        **mechanics.pressures(given, opened),
    }
    with torch.no_grad():
        fine = converged & found.converged[:n] & found.converged[n:]
        status = torch.where(short | (converged & ~sound), 2, torch.where(fine, 0, 1))
    nothing = torch.full_like(pao2, torch.nan)
    return Steady({k: torch.where(status == 0, v, nothing) for k, v in values.items()}, status, gas, of, (o2_a, co2_a))


def arterial(of: System, gas: Gas) -> tuple[Tensor, Tensor]:
    """O2 and CO2 content of arterial blood [N], mL/dL: end-capillary blood mixed with the shunt's."""
    mix = exchange.shares(gas.h)
    o2, co2 = [], []
    for start in range(0, max(1, len(of.fio2)), exchange.BLOCK):  # so that arrays stay in the cache
        rows = slice(start, start + exchange.BLOCK)
        patient = (value[rows] for value in exchange.blood_of(of))
        c = blood.state(gas.ln_x[rows], gas.ln_y[rows], gas.h[rows], *patient)
        o2.append((mix * c.o2).sum(1))
        co2.append((mix * c.co2).sum(1))
    through = 1 - of.shunt
    return through * torch.cat(o2) + of.shunt * gas.o2_v, through * torch.cat(co2) + of.shunt * gas.co2_v
