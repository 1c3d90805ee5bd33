"""The time course of gases and pressures through changes of settings (implicit Euler).

What changes slowly, and how:
  alveolar gas   each compartment holds a share of the end-expiratory volume in proportion to its blood flow
  body O2, CO2   two tissues in parallel, in equilibrium with the blood that leaves them: blood-equivalent volumes with
                 a share of flow and metabolism each. CO2: 10 L with 75 % and 13 L with 25 % of the flow; at a slope of
                 some 4.5 mL/L/mmHg that is 105 mL/mmHg, the 1.5 mL/kg/mmHg of Farhi and Rahn (J Appl Physiol
                 1955;7:472, in dogs) for 70 kg; the split was chosen here, so that the fast part alone lets PaCO2 rise
                 by 3 to 4 mmHg/min at full production. O2: 4 L, half-time about .5 min as there.
  open lung      first order towards the equilibrium of `mechanics`: closing within minutes, opening over an hour
                 (Chiumello, Intensive Care Med 2013;39:1377: after a fall of PEEP oxygenation was settled at 5 min,
                 after a rise not even at 60 min)
Not modelled: circulation delays (under a minute), slower CO2 stores (bone), changes of cardiac output or metabolism.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylab.errors import UsageError
from raylab.physiology import exchange, mechanics
from raylab.physiology.exchange import Gas, System
from raylab.physiology.parameters import SETTINGS, Inputs, check
from raylab.physiology.steady import Steady, outputs, steady_state, total_shunt

STEP_min = 0.1
OPENING_min = 20.0  # time constants of the open fraction
CLOSING_min = 1.5
TISSUES = ((0.75, 10.0, 3.0), (0.25, 13.0, 1.0))
"""(share of flow and metabolism, CO2 volume, O2 volume) of each; volumes in L of blood with the same content."""
CO2, O2 = 1, 2  # indices in a tissue


class Stores(NamedTuple):
    """The state that one step passes to the next: gas of compartments [N, K], contents of tissues [N] each, open
    fraction [N]."""

    gas: Gas
    o2: list[Tensor]
    co2: list[Tensor]
    opened: Tensor


def begin(given: Inputs) -> tuple[Stores, Steady]:
    """The steady state as the start of a course; rows without one have no values."""
    with torch.no_grad():
        steady = steady_state(given)
        o2_a, co2_a = steady.arterial
        leaving = [o2_a + steady.of.o2_a] * len(TISSUES), [co2_a + steady.of.co2_a] * len(TISSUES)
        return Stores(steady.gas, *leaving, mechanics.equilibrium(given)), steady


def advance(given: Inputs, before: Stores, minutes: float) -> tuple[Stores, Steady]:
    """The state `minutes` later under `given`. `status` marks rows that fail to converge; they stay marked."""
    with torch.no_grad():
        goal = mechanics.equilibrium(given)
        tau = torch.where(goal > before.opened, OPENING_min, CLOSING_min)
        opened = goal + (before.opened - goal) * torch.exp(-minutes / tau)
        of = unsteady(given, before, opened, minutes)
        gas, converged = exchange.solve(of, before.gas)
        found = outputs(given, opened, of, gas, converged, torch.zeros_like(converged))
        o2_a, co2_a = found.arterial
        made = given.vo2_mL_per_min * given.rq
        o2 = [tissue(given, c, o2_a, -given.vo2_mL_per_min, i, O2, minutes) for i, c in enumerate(before.o2)]
        co2 = [tissue(given, c, co2_a, made, i, CO2, minutes) for i, c in enumerate(before.co2)]
        return Stores(gas, o2, co2, opened), found


def tissue(
    given: Inputs, before: Tensor, arriving: Tensor, made: Tensor, i: int, volume: int, minutes: float
) -> Tensor:
    """Content of tissue i after a step: volume (new - old) = minutes (flow (arriving - new) + made)."""
    share, held = TISSUES[i][0], 10 * TISSUES[i][volume] / minutes
    flow = 10 * share * given.cardiac_output_L_per_min
    return (held * before + flow * arriving + share * made) / (held + flow)


def unsteady(given: Inputs, before: Stores, opened: Tensor, minutes: float) -> System:
    """The equations of one step of `minutes`: `exchange.system` with stored gases."""
    of = exchange.system(given, total_shunt(given, opened), (given.gas_volume_mL / 1000 / minutes, before.gas))
    made = given.vo2_mL_per_min * given.rq
    zero = torch.zeros_like(given.fio2)

    def line(contents: list[Tensor], made: Tensor, volume: int) -> tuple[Tensor, Tensor]:
        """Venous content as a + b x arterial content."""
        a, b = zero, zero
        for i, (content, (share, *_)) in enumerate(zip(contents, TISSUES, strict=True)):
            a = a + share * tissue(given, content, zero, made, i, volume, minutes)
            b = b + share * tissue(given, zero, zero + 1, zero, i, volume, minutes)
        return a, b

    o2_a, o2_b = line(before.o2, -given.vo2_mL_per_min, O2)
    co2_a, co2_b = line(before.co2, made, CO2)
    return replace(of, o2_a=o2_a, o2_b=o2_b, co2_a=co2_a, co2_b=co2_b)


def course(
    given: Inputs, changes: Sequence[tuple[float, dict[str, Any]]], minutes: float, step_min: float = STEP_min
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """From the steady state of `given` through `changes` [(minute, {setting: value})], for `minutes`.

    Returns times [T] (0 is the steady state), {output: [N, T]} and status [N, T] (see steady.STATUS). A change takes
    effect at the first step that ends after its minute. Raises UsageError for a change that is no setting or has no
    time in the course, DataError for settings outside their range.
    """
    steps = round(minutes / step_min)
    for minute, settings in changes:
        if not 0 <= minute < minutes or not set(settings) <= set(SETTINGS):
            raise UsageError(
                f"the change at minute {minute:g} is not possible: {settings}",
                do=f"use a minute from 0 to {minutes:g} and settings among: {', '.join(SETTINGS)}",
            )
    check(given)
    stores, found = begin(given)
    rows = [found]
    waiting = sorted(changes, key=lambda change: change[0])
    for i in range(steps):
        while waiting and waiting[0][0] < (i + 1) * step_min - 1e-9:
            given = given.but(**waiting.pop(0)[1])
            check(given)
        stores, found = advance(given, stores, step_min)
        rows.append(found)
    times = torch.arange(steps + 1, dtype=torch.float64) * step_min
    status = torch.stack([row.status for row in rows], 1).cummax(1).values
    lost = torch.full_like(status, torch.nan, dtype=torch.float64)
    values = {
        name: torch.where(status == 0, torch.stack([row.values[name] for row in rows], 1), lost)
        for name in found.values
    }
    return times, values, status
