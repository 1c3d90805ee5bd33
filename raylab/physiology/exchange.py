"""Gas exchange of K compartments, a shunt and the body behind them, as one system of equations, and its solver.

A compartment i has expired ventilation V_i (L/min BTPS), blood flow q_i (L/min), gas tensions x_i, y_i (PO2, PCO2,
mmHg) and end-capillary blood in equilibrium with them. ln(V/Q) is normally distributed over perfusion (West, Respir
Physiol 1969;7:88, used lognormal distributions so; from memory). With k the conversion of mL(STPD)/dL x L/min to
L(BTPS)/min x mmHg (8.63 at 37 degC: 863 mmHg is the same number in PaCO2 = 0.863 VCO2 / VA), P the dry barometric
pressure, F = FiO2, g_i = gas volume / time step (0 in steady state), and ' for the value at the start of the step:

  O2    g_i (x_i - x_i') = V_i (F P - x_i) - k q_i ((1 - F)(O2(c,i) - O2(v)) + F (CO2(v) - CO2(c,i)))
  CO2   g_i (y_i - y_i') = - V_i y_i + k q_i (CO2(v) - CO2(c,i))
  pH    base excess of end-capillary blood = the blood's
  body  O2(v) = a + b O2(a), and for CO2;  arterial (a) = mixture of end-capillary blood and the shunt's venous blood

The O2 line holds the inspired ventilation, which is the expired one plus the net uptake of gas; nitrogen is what is
left of P. In steady state with one compartment it is the alveolar gas equation. Expired ventilation is given, so a
poorly ventilated unit draws in what its blood takes up, and no unit collapses at FiO2 1.
In steady state b = 1 and a = -VO2 / Q (O2), VCO2 / Q (CO2); course.py puts the body's stores there.

Solved by Newton's method on everything at once: the compartments' 3 x 3 blocks are eliminated, two venous unknowns
remain. The last step is taken with the graph, which gives gradients by the implicit function theorem.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from raylab.physiology import blood
from raylab.physiology.parameters import Inputs

T = TypeVar("T")

COMPARTMENTS = 20
SPREAD = 3.0  # compartments lie evenly over so many standard deviations to each side
STEPS = 40  # 5 to 12 are usual; a row that needs more has no solution
BLOCK = 1024  # rows solved at a time: their arrays stay in the cache
LARGEST = 0.7  # of a step, in ln(mmHg)
TOLERANCE = 1e-10  # relative, of the last step


@dataclass(frozen=True)
class System:
    """Coefficients of the equations above; [N, K] for compartments, [N] for the rest. `start` holds x', y'."""

    ventilation: Tensor
    flow: Tensor
    stored: Tensor  # g
    x_before: Tensor
    y_before: Tensor
    fio2: Tensor
    dry_mmHg: Tensor
    k: Tensor
    shunt: Tensor
    hb: Tensor
    base_excess: Tensor
    temperature_C: Tensor
    o2_a: Tensor
    o2_b: Tensor
    co2_a: Tensor
    co2_b: Tensor

    def take(self, rows: Tensor | slice) -> "System":
        return System(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


class Gas(NamedTuple):
    """Where the equations stand: [N, K] x (PO2), y (PCO2), h (pH) of compartments, [N] venous contents in mL/dL."""

    x: Tensor
    y: Tensor
    h: Tensor
    o2_v: Tensor
    co2_v: Tensor

    def take(self, rows: Tensor | slice) -> "Gas":
        return Gas(*(value[rows] for value in self))


def water_vapour_mmHg(temperature_C: Tensor) -> Tensor:
    """Saturated. Buck, J Appl Meteorol 1981;20:1527 (from memory; 47.1 mmHg at 37 degC)."""
    t = temperature_C
    return 6.1121 * torch.exp((18.678 - t / 234.5) * t / (257.14 + t)) * 0.750062


def conversion(temperature_C: Tensor) -> Tensor:
    """k: 760 mmHg (273.15 + T) / 273.15 / 100."""
    return 7.6 * (273.15 + temperature_C) / 273.15


def distribution(given: Inputs, shunt: Tensor) -> tuple[Tensor, Tensor]:
    """Expired ventilation and blood flow of the compartments, each [N, K] in L/min."""
    z = torch.linspace(-SPREAD, SPREAD, COMPARTMENTS, dtype=torch.float64, device=given.fio2.device)
    weight = torch.exp(-(z**2) / 2)
    flow = (given.cardiac_output_L_per_min * (1 - shunt))[:, None] * (weight / weight.sum())
    ventilated = flow * torch.exp(given.vq_log_sd[:, None] * z)
    share = ventilated / ventilated.sum(1, keepdim=True)
    return given.alveolar_ventilation_L_per_min()[:, None] * share, flow


def system(given: Inputs, shunt: Tensor) -> System:
    """The equations of the steady state."""
    ventilation, flow = distribution(given, shunt)
    output = 10 * given.cardiac_output_L_per_min  # dL/min
    nothing, one = torch.zeros_like(flow), torch.ones_like(shunt)
    return System(
        ventilation=ventilation,
        flow=flow,
        stored=nothing,
        x_before=nothing,
        y_before=nothing,
        fio2=given.fio2,
        dry_mmHg=given.barometric_mmHg - water_vapour_mmHg(given.temperature_C),
        k=conversion(given.temperature_C),
        shunt=shunt,
        hb=given.hb_g_per_dL,
        base_excess=given.base_excess_mmol_per_L,
        temperature_C=given.temperature_C,
        o2_a=-given.vo2_mL_per_min / output,
        o2_b=one,
        co2_a=given.vo2_mL_per_min * given.rq / output,
        co2_b=one,
    )


@torch.no_grad()
def guess(of: System) -> Gas:
    """A start from which Newton's method finds the solution: the ideal lung's gas in every compartment."""
    total = of.ventilation.sum(1)
    produced = of.co2_a * of.flow.sum(1) / (1 - of.shunt)
    y = (of.k * produced / total).clamp(10, 150)
    x = (of.fio2 * of.dry_mmHg - 1.1 * y).clamp(min=40)
    wide = torch.ones_like(of.flow)
    x, y = x[:, None] * wide, y[:, None] * wide
    h = blood.ph_of(x, y, *_blood_of(of))
    return Gas(x, y, h, blood.HUEFNER_mL_per_g * of.hb * 0.7, y[:, 0] * 1.2)


def _blood_of(of: System) -> tuple[Tensor, Tensor, Tensor]:
    return of.hb[:, None], of.base_excess[:, None], of.temperature_C[:, None]


def step(of: System, at: Gas) -> tuple[Gas, Tensor]:
    """One Newton step from `at`, and its length [N]: the largest relative change of any unknown."""
    now = blood.state(at.x, at.y, at.h, *_blood_of(of))
    lag = now.excess / now.excess_h
    up_x, up_y = now.excess_x / now.excess_h, now.excess_y / now.excess_h
    # contents and slopes with the pH moved to where it belongs
    o2, o2_x, o2_y = now.o2 - now.o2_h * lag, now.o2_x - now.o2_h * up_x, -now.o2_h * up_y
    co2, co2_x, co2_y = now.co2 - now.co2_h * lag, now.co2_x - now.co2_h * up_x, now.co2_y - now.co2_h * up_y

    f, p = of.fio2[:, None], of.dry_mmHg[:, None]
    flux = of.k[:, None] * of.flow
    taken, given = (1 - f) * flux, f * flux
    lost = at.co2_v[:, None] - co2
    held = of.ventilation + of.stored
    rest_x = of.ventilation * (f * p - at.x) - taken * (o2 - at.o2_v[:, None]) - given * lost
    rest_x = rest_x - of.stored * (at.x - of.x_before)
    rest_y = of.ventilation * at.y - flux * lost + of.stored * (at.y - of.y_before)
    xx, xy = -held - taken * o2_x + given * co2_x, -taken * o2_y + given * co2_y
    yx, yy = flux * co2_x, held + flux * co2_y
    det = xx * yy - xy * yx
    # (dx, dy) = own + per_o2 dO2(v) + per_co2 dCO2(v)
    own_x, own_y = (-rest_x * yy + xy * rest_y) / det, (-xx * rest_y + yx * rest_x) / det
    per_o2_x, per_o2_y = -taken * yy / det, taken * yx / det
    per_co2_x, per_co2_y = (given * yy - flux * xy) / det, (xx * flux - yx * given) / det

    mix = of.flow / of.flow.sum(1, keepdim=True)
    through = 1 - of.shunt

    def mixed(value: Tensor) -> Tensor:
        return (mix * value).sum(1)

    o2_c, co2_c = mixed(o2 + o2_x * own_x + o2_y * own_y), mixed(co2 + co2_x * own_x + co2_y * own_y)
    rest_o2 = at.o2_v - of.o2_a - of.o2_b * (through * o2_c + of.shunt * at.o2_v)
    rest_co2 = at.co2_v - of.co2_a - of.co2_b * (through * co2_c + of.shunt * at.co2_v)
    oo = 1 - of.o2_b * (of.shunt + through * mixed(o2_x * per_o2_x + o2_y * per_o2_y))
    oc = -of.o2_b * through * mixed(o2_x * per_co2_x + o2_y * per_co2_y)
    co = -of.co2_b * through * mixed(co2_x * per_o2_x + co2_y * per_o2_y)
    cc = 1 - of.co2_b * (of.shunt + through * mixed(co2_x * per_co2_x + co2_y * per_co2_y))
    outer = oo * cc - oc * co
    d_o2 = ((-rest_o2 * cc + oc * rest_co2) / outer).clamp(-6, 6)
    d_co2 = ((-oo * rest_co2 + co * rest_o2) / outer).clamp(-25, 25)

    dx = own_x + per_o2_x * d_o2[:, None] + per_co2_x * d_co2[:, None]
    dy = own_y + per_o2_y * d_o2[:, None] + per_co2_y * d_co2[:, None]
    dh = -lag - up_x * dx - up_y * dy
    step_x, step_y = (dx / at.x).clamp(-LARGEST, LARGEST), (dy / at.y).clamp(-LARGEST, LARGEST)
    moved = torch.stack([step_x.detach().abs(), step_y.detach().abs(), dh.detach().abs()]).amax((0, 2))
    moved = torch.maximum(moved, torch.maximum(d_o2.detach().abs() / 10, d_co2.detach().abs() / 50))
    to = Gas(
        at.x * torch.exp(step_x),
        at.y * torch.exp(step_y),
        (at.h + dh.clamp(-0.2, 0.2)).clamp(5.5, 9),
        at.o2_v + d_o2,
        at.co2_v + d_co2,
    )
    return to, moved


def solve(of: System, start: Gas | None = None) -> tuple[Gas, Tensor]:
    """The solution and which rows converged, bool [N]. Rows without a solution do not disturb the others.

    `start` is a near solution, where one is known. Gradients flow through the coefficients of `of`.
    """
    with torch.no_grad():
        at = guess(of) if start is None else start
        solved = by_block(_newton, of, at)
        done = Gas(*(torch.cat(parts) for parts in zip(*(gas for gas, _ in solved), strict=True)))
        converged = torch.cat([ok for _, ok in solved])
    if torch.is_grad_enabled():
        done, _ = step(of, done)
    return done, converged


def by_block(work: Callable[[System, Gas], T], of: System, at: Gas) -> list[T]:
    """work(of, at) of every block of rows, in order, without gradients. Arrays of a block are too small for torch to
    share one among its threads, so each of these takes blocks of its own."""
    blocks = [slice(a, a + BLOCK) for a in range(0, len(of.fio2), BLOCK)] or [slice(0, 0)]

    def one(rows: slice) -> T:
        with torch.no_grad():  # holds for a thread
            return work(of.take(rows), at.take(rows))

    threads = min(torch.get_num_threads(), len(blocks))
    if threads == 1:
        return [one(rows) for rows in blocks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, blocks))


def _newton(of: System, at: Gas) -> tuple[Gas, Tensor]:
    """Newton steps until every row has settled or STEPS are over; rows that have settled are taken out."""
    moving = torch.arange(len(of.fio2), device=of.fio2.device)
    part, now = of, at
    done = Gas(*(value.clone() for value in at))
    converged = torch.zeros(len(of.fio2), dtype=torch.bool, device=of.fio2.device)
    for _ in range(STEPS):
        now, moved = step(part, now)
        still = ~(moved < TOLERANCE)
        if bool(still.all()):
            continue
        ended = moving[~still]
        converged[ended] = True
        for whole, value in zip(done, now, strict=True):
            whole[ended] = value[~still]
        moving, part, now = moving[still], part.take(still), now.take(still)
        if len(moving) == 0:
            break
    for whole, value in zip(done, now, strict=True):
        whole[moving] = value
    return done, converged
