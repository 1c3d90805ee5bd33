"""Pressures of a passive, constant-flow breath, and the fraction of the lung that they open. cmH2O, mL, L, s; tensors
[N].

Opening: units of the collapsed part have normally distributed threshold opening pressures, mean 20 in ARDS, and closing
pressures some 15 lower (Crotti, Am J Respir Crit Care Med 2001;164:131: modes 20 and 5, both normal). A unit is open
where its opening pressure is reached at plateau and its closing pressure is not undershot at PEEP: Hickling's lung
(Am J Respir Crit Care Med 1998;158:194) at rest after the breath. Not modelled: overdistension, the chest wall apart
from the lung, intrinsic PEEP, spontaneous effort, the fall of cardiac output with PEEP.
"""

import torch
from torch import Tensor

from raylab.physiology.parameters import Inputs

CLOSING_BELOW_OPENING_cmH2O = 15.0
JOULE_PER_L_cmH2O = 0.098


def open_fraction(given: Inputs, plateau_cmH2O: Tensor) -> Tensor:
    """Of the recruitable part, 0 to 1: Phi((min(plateau, PEEP + 15) - mean opening pressure) / sd)."""
    reach = torch.minimum(plateau_cmH2O, given.peep_cmH2O + CLOSING_BELOW_OPENING_cmH2O)
    opened: Tensor = torch.special.ndtr((reach - given.opening_pressure_cmH2O) / given.opening_sd_cmH2O)
    return opened


def closed_part(given: Inputs, opened: Tensor) -> Tensor:
    """Fraction of the whole lung that is collapsed when `opened` of the recruitable part is open."""
    return given.collapsed * (1 - opened)


def plateau_pressure(given: Inputs, opened: Tensor) -> Tensor:
    """PEEP + VT / compliance of the open lung; compliance is proportional to the open lung ("baby lung")."""
    compliance = given.compliance_mL_per_cmH2O * (1 - closed_part(given, opened))
    return given.peep_cmH2O + given.tidal_volume_mL / compliance


def equilibrium(given: Inputs) -> Tensor:
    """Open fraction of the recruitable part [N] that is consistent with the resulting plateau pressure.

    More open lung lowers the plateau, a lower plateau opens less: there is exactly one such fraction. Bisection, then
    one Newton step with the graph.
    """
    with torch.no_grad():
        low, high = plateau_pressure(given, torch.ones_like(given.fio2)), plateau_pressure(given, 0 * given.fio2)
        for _ in range(60):
            middle = (low + high) / 2
            above = plateau_pressure(given, open_fraction(given, middle)) > middle
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        root = (low + high) / 2
        near = root + 1e-6
        slope = (plateau_pressure(given, open_fraction(given, near)) - root) / 1e-6
    if not torch.is_grad_enabled():
        return open_fraction(given, root)
    plateau = root - (plateau_pressure(given, open_fraction(given, root)) - root) / (slope - 1)
    return open_fraction(given, plateau)


def pressures(given: Inputs, opened: Tensor) -> dict[str, Tensor]:
    """plateau, driving, peak and mean airway pressure (cmH2O), mechanical power (J/min).

    Peak = plateau + resistance x flow, flow = VT / inspiratory time. Mean: the airway-pressure trace of constant flow
    over inspiration, PEEP over expiration (Marini and Ravenscraft, Crit Care Med 1992;20:1461; from memory).
    Power: Gattinoni, Intensive Care Med 2016;42:1567: 0.098 RR (VT^2 (E / 2 + RR (1 + I:E) / (60 I:E) R) + VT PEEP),
    which is 0.098 RR VT (peak - driving / 2).
    """
    plateau = plateau_pressure(given, opened)
    driving = plateau - given.peep_cmH2O
    volume_L = given.tidal_volume_mL / 1000
    inspiration_s = 60 / given.rate_per_min * given.inspired_fraction
    resistive = given.resistance_cmH2O_s_per_L * volume_L / inspiration_s
    peak = plateau + resistive
    return {
        "plateau_cmH2O": plateau,
        "driving_cmH2O": driving,
        "peak_cmH2O": peak,
        "mean_airway_cmH2O": given.peep_cmH2O + given.inspired_fraction * (resistive + driving / 2),
        "power_J_per_min": JOULE_PER_L_cmH2O * given.rate_per_min * volume_L * (peak - driving / 2),
    }
