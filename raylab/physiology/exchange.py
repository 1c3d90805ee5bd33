"""Gas exchange of K compartments, a shunt and the body, as one system of equations, and its solver.

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
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from raylab.physiology import blood
from raylab.physiology.parameters import Inputs

COMPARTMENTS = 20
SPREAD = 3.0  # compartments are spaced evenly over this many standard deviations to each side
# Newton steps: 5 to 12 are usual, and a row that needs more than about 40 has no solution. Single precision suffices
# for the first steps and halves the work; rows that have not converged continue together.
ROUGH_STEPS, FINE_STEPS, NEARBY_STEPS, MORE_STEPS = 7, 2, 4, (8, 29)
NEAR = 0.1  # length of the last single-precision step below which double precision continues from it
BLOCK = 2048  # rows solved at a time, so that their arrays stay in the cache
SMALL_BLOCK = 256  # the same for the remaining rows, if steps are compiled
LARGEST = 0.7  # maximum length of a step, in ln(mmHg)
TOLERANCE = 1e-10  # relative length of the last step


@dataclass(frozen=True)
class System:
    """Coefficients of the equations above; [N, K] for compartments, [N] for the rest. Compartments' balances are
    divided by their k q_i."""

    ventilation: Tensor
    ratio: Tensor  # (V + g) / (k q)
    source_o2: Tensor  # (V F P + g (x' + F y')) / (k q): F times the CO2 line is taken from the O2 line
    source_co2: Tensor  # g y' / (k q)
    flow: Tensor  # of all compartments
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

    def to(self, dtype: torch.dtype) -> "System":
        return System(**{field.name: getattr(self, field.name).to(dtype) for field in fields(self)})


class Gas(NamedTuple):
    """A point of the iteration: [N, K] ln PO2, ln PCO2 and h (pH) of compartments, [N] venous contents in mL/dL."""

    ln_x: Tensor
    ln_y: Tensor
    h: Tensor
    o2_v: Tensor
    co2_v: Tensor

    @property
    def x(self) -> Tensor:
        """PO2 in mmHg."""
        return torch.exp(self.ln_x)

    @property
    def y(self) -> Tensor:
        """PCO2 in mmHg."""
        return torch.exp(self.ln_y)

    def take(self, rows: Tensor | slice) -> "Gas":
        return Gas(*(value[rows] for value in self))

    def to(self, dtype: torch.dtype) -> "Gas":
        return Gas(*(value.to(dtype) for value in self))


def water_vapour_mmHg(temperature_C: Tensor) -> Tensor:
    """Saturated. Buck, J Appl Meteorol 1981;20:1527 (from memory; 47.1 mmHg at 37 degC)."""
    t = temperature_C
    return 6.1121 * torch.exp((18.678 - t / 234.5) * t / (257.14 + t)) * 0.750062


def conversion(temperature_C: Tensor) -> Tensor:
    """k: 760 mmHg (273.15 + T) / 273.15 / 100."""
    return 7.6 * (273.15 + temperature_C) / 273.15


def _deviations(like: Tensor) -> Tensor:
    """Deviations of the compartments' ln(V/Q) from its mean, in standard deviations, [K]."""
    return torch.linspace(-SPREAD, SPREAD, COMPARTMENTS, dtype=like.dtype, device=like.device)


def shares(like: Tensor) -> Tensor:
    """Fractions of the blood flow through the compartments, [K]: the same in every lung."""
    weight = torch.exp(-(_deviations(like) ** 2) / 2)
    return weight / weight.sum()


def system(given: Inputs, shunt: Tensor, stored: "tuple[Tensor, Gas] | None" = None) -> System:
    """The equations of the steady state, or of a time step if gas is `stored`: gas volume of the lung / time step [N]
    in L/min (the sum of g_i), and the gas at the start of the step."""
    z, share = _deviations(given.fio2), shares(given.fio2)
    flow = given.cardiac_output_L_per_min * (1 - shunt)
    spread = share * torch.exp(given.vq_log_sd[:, None] * z)
    ventilation = given.alveolar_ventilation_L_per_min()[:, None] * (spread / spread.sum(1, keepdim=True))
    k = conversion(given.temperature_C)
    dry = given.barometric_mmHg - water_vapour_mmHg(given.temperature_C)
    flux = (k * flow)[:, None] * share
    held, o2, co2 = ventilation, ventilation * (given.fio2 * dry)[:, None], torch.zeros_like(ventilation)
    if stored is not None:
        g, before = stored[0][:, None] * share, stored[1]
        co2 = g * before.y
        held, o2 = held + g, o2 + g * before.x + given.fio2[:, None] * co2
    output = 10 * given.cardiac_output_L_per_min  # dL/min
    one = torch.ones_like(shunt)
    return System(
        ventilation=ventilation,
        ratio=held / flux,
        source_o2=o2 / flux,
        source_co2=co2 / flux,
        flow=flow,
        fio2=given.fio2,
        dry_mmHg=dry,
        k=k,
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
    """The start of Newton's method: the gas of the ideal lung in every compartment."""
    total = of.ventilation.sum(1)
    produced = of.co2_a * of.flow / (1 - of.shunt)
    y = (of.k * produced / total).clamp(10, 150)
    x = (of.fio2 * of.dry_mmHg - 1.1 * y).clamp(min=40)
    h = 6.1 + torch.log10((24.26 + of.base_excess).clamp(min=3) / (0.0304 * y))  # Henderson and Hasselbalch
    ln_x, ln_y, h = (value[:, None].expand_as(of.ventilation).contiguous() for value in (x.log(), y.log(), h))
    return Gas(ln_x, ln_y, h, blood.HUEFNER_mL_per_g * of.hb * 0.7, y * 1.2)


def blood_of(of: System) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `blood.state` that belong to a patient, each [N, 1]."""
    return of.hb[:, None], of.base_excess[:, None], of.temperature_C[:, None]


def step(of: System, at: Gas) -> tuple[Gas, Tensor]:
    """One Newton step from `at`, and its length [N]: the largest relative change of any unknown."""
    now = blood.state(at.ln_x, at.ln_y, at.h, *blood_of(of))
    inverse = 1 / now.excess_h
    lag, up_x, up_y = now.excess * inverse, now.excess_x * inverse, now.excess_y * inverse
    # contents and slopes (with respect to ln x, ln y) at the pH of these tensions
    o2, o2_x, o2_y = now.o2 - now.o2_h * lag, now.o2_x - now.o2_h * up_x, -now.o2_h * up_y
    co2, co2_x, co2_y = now.co2 - now.co2_h * lag, now.co2_x - now.co2_h * up_x, now.co2 - now.co2_h * up_y

    # Each compartment's balances divided by k q; F times that of CO2 is taken from that of O2, which leaves it without
    # CO2 contents. ratio = (V + g) / (k q).
    f, rest = of.fio2[:, None], (1 - of.fio2)[:, None]
    x, y = of.ratio * now.po2_mmHg, of.ratio * now.pco2_mmHg
    miss_o2 = of.source_o2 - x - f * y - rest * (o2 - at.o2_v[:, None])
    miss_co2 = of.source_co2 - y - co2 + at.co2_v[:, None]
    # [xx xy; yx yy] (dx, dy) = (miss_o2 + rest dO2(v), miss_co2 + dCO2(v))
    xx, xy = x + rest * o2_x, f * y + rest * o2_y
    yx, yy = co2_x, y + co2_y
    inverse = 1 / (xx * yy - xy * yx)
    xx, xy, yx, yy = xx * inverse, xy * inverse, yx * inverse, yy * inverse
    own_x, own_y = yy * miss_o2 - xy * miss_co2, xx * miss_co2 - yx * miss_o2

    share, through = shares(x), 1 - of.shunt

    def mixed(value: Tensor) -> Tensor:
        return (share * value).sum(1)

    o2_c, co2_c = mixed(o2 + o2_x * own_x + o2_y * own_y), mixed(co2 + co2_x * own_x + co2_y * own_y)
    rest_o2 = at.o2_v - of.o2_a - of.o2_b * (through * o2_c + of.shunt * at.o2_v)
    rest_co2 = at.co2_v - of.co2_a - of.co2_b * (through * co2_c + of.shunt * at.co2_v)
    oo = 1 - of.o2_b * (of.shunt + through * rest[:, 0] * mixed(o2_x * yy - o2_y * yx))
    oc = -of.o2_b * through * mixed(o2_y * xx - o2_x * xy)
    co = -of.co2_b * through * rest[:, 0] * mixed(co2_x * yy - co2_y * yx)
    cc = 1 - of.co2_b * (of.shunt + through * mixed(co2_y * xx - co2_x * xy))
    outer = oo * cc - oc * co
    d_o2 = ((-rest_o2 * cc + oc * rest_co2) / outer).clamp(-6, 6)
    d_co2 = ((-oo * rest_co2 + co * rest_o2) / outer).clamp(-25, 25)

    arrived, gone = (rest[:, 0] * d_o2)[:, None], d_co2[:, None]
    dx, dy = own_x + yy * arrived - xy * gone, own_y + xx * gone - yx * arrived
    dh = -lag - up_x * dx - up_y * dy
    step_x, step_y = dx.clamp(-LARGEST, LARGEST), dy.clamp(-LARGEST, LARGEST)
    with torch.no_grad():
        moved = torch.maximum(torch.maximum(step_x.abs(), step_y.abs()), dh.abs()).amax(1)
        moved = torch.maximum(moved, torch.maximum(d_o2.abs() / 10, d_co2.abs() / 50))
    to = Gas(
        at.ln_x + step_x,
        at.ln_y + step_y,
        (at.h + dh.clamp(-0.2, 0.2)).clamp(5.5, 9),
        at.o2_v + d_o2,
        at.co2_v + d_co2,
    )
    return to, moved


def solve(of: System, start: Gas | None = None, compiled: bool = False) -> tuple[Gas, Tensor]:
    """The solution and which rows converged, bool [N]. Rows without a solution do not affect the others.

    `start` is a near solution, where one is known. `compiled`: by torch.compile, which needs a C++ compiler and, the
    first time, some ten seconds; the last bits differ. Gradients flow through the coefficients of `of`.
    """
    with torch.no_grad():
        at = guess(of) if start is None else start
        done, moved = by_block(partial(begun, rough=start is None, compiled=compiled), of, at, compiled)
        for steps in MORE_STEPS:
            left = (~(moved < TOLERANCE)).nonzero()[:, 0]
            if len(left) == 0:
                break
            further = partial(newton, steps=steps, compiled=compiled)
            gas, moved[left] = by_block(further, of.take(left), done.take(left), compiled)
            for whole, value in zip(done, gas, strict=True):
                whole[left] = value
    if torch.is_grad_enabled():
        done, _ = step(of, done)
    return done, moved < TOLERANCE


def begun(of: System, at: Gas, rough: bool, compiled: bool) -> tuple[Gas, Tensor]:
    """The first steps of a block, which suffice for most rows."""
    if not rough:
        return newton(of, at, NEARBY_STEPS, compiled)
    gas, moved = newton(of.to(torch.float32), at.to(torch.float32), ROUGH_STEPS, compiled)
    near = moved < NEAR  # rows whose steps did not approach a solution restart
    kept = (torch.where(near[:, None] if a.dim() > 1 else near, g.to(a.dtype), a) for g, a in zip(gas, at, strict=True))
    return newton(of, Gas(*kept), FINE_STEPS, compiled)


def newton(of: System, at: Gas, steps: int, compiled: bool) -> tuple[Gas, Tensor]:
    """At most `steps` Newton steps from `at`, until all rows have converged, and the length [N] of the last."""
    one_step = compiled_step() if compiled else step
    moved = torch.full_like(of.fio2, torch.inf)
    for _ in range(steps):
        at, moved = one_step(of, at)
        if bool((moved < TOLERANCE).all()):
            break
    return at, moved


def by_block(
    work: Callable[[System, Gas], tuple[Gas, Tensor]], of: System, at: Gas, compiled: bool
) -> tuple[Gas, Tensor]:
    """work(of, at) of every block of rows, without gradients.

    Arrays of a block are too small for torch to share one among its threads, so each of these takes blocks of its own.
    A step is compiled for blocks of two sizes; the last of them is filled up.
    """
    n = len(of.fio2)
    if n == 0:
        return at, torch.zeros_like(of.fio2)
    blocks = [(start, BLOCK) for start in range(0, n - BLOCK + 1, BLOCK)]
    rest = len(blocks) * BLOCK
    size = SMALL_BLOCK if compiled else n - rest
    blocks += [(start, size) for start in range(rest, n, max(1, size))]

    def one(block: tuple[int, int]) -> tuple[Gas, Tensor]:
        start, size = block
        rows: Tensor | slice = slice(start, start + size)
        if start + size > n:
            rows = torch.arange(start, start + size, device=of.fio2.device).clamp(max=n - 1)
        with torch.no_grad():  # per thread
            gas, moved = work(of.take(rows), at.take(rows))
        return gas.take(slice(0, n - start)), moved[: n - start]

    threads = min(torch.get_num_threads(), len(blocks))
    if threads == 1:
        found = [one(block) for block in blocks]
    else:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(one, blocks))
    gas = Gas(*(torch.cat(parts) for parts in zip(*(gas for gas, _ in found), strict=True)))
    return gas, torch.cat([moved for _, moved in found])


@cache
def compiled_step() -> Callable[[System, Gas], tuple[Gas, Tensor]]:
    return torch.compile(step, dynamic=False)
