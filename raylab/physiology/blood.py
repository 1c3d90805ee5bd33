"""Gases in blood: O2 saturation and content, CO2 content and pH from tensions, and the inverse.

All functions are elementwise over float64 tensors: mmHg, g/dL, mmol/L, mL(STPD)/dL, degC. `state` returns values and
derivatives, which the solvers need; each derivative stands next to its formula.

Sources (abstracts and coefficients looked up, papers not read in full unless stated):
  O2 saturation, its Bohr and temperature shifts: Severinghaus, J Appl Physiol 1979;46:599, Eq. 1, 3, 4
  O2 content: 1.34 mL/g (Huefner) and 0.003 mL/dL/mmHg dissolved
  pH at a base excess: Van Slyke equation as in Lang and Zander, Clin Chem Lab Med 2002;40:404
  CO2 content: Douglas, Jones and Reed, J Appl Physiol 1988;65:473, with Kelman's solubility and pK'
               (Respir Physiol 1967;3:111)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

HUEFNER_mL_per_g = 1.34
O2_SOLUBILITY_mL_per_dL_mmHg = 0.003
LN10 = math.log(10)
LN_26_6, LN_0_00243 = math.log(26.6), math.log(0.00243)
STEPS = 80  # maximum number of Newton steps of `tensions`; 6 to 12 are usual
LARGEST = 0.6  # maximum length of a step, in ln(mmHg)
TOLERANCE = 1e-11  # relative length of the last step


class State(NamedTuple):
    """Blood at a given PO2, PCO2 and pH, with partial derivatives with respect to ln PO2 (x), ln PCO2 (y) and pH (h):
    `o2_h` is d o2 / d pH. The derivative of CO2 content with respect to ln PCO2 is the content itself."""

    po2_mmHg: Tensor
    pco2_mmHg: Tensor
    s: Tensor
    o2: Tensor
    co2: Tensor
    excess: Tensor  # base excess at this point minus that of the blood: 0 at the right pH
    o2_x: Tensor
    o2_h: Tensor
    co2_x: Tensor
    co2_h: Tensor
    excess_x: Tensor
    excess_y: Tensor
    excess_h: Tensor


def saturation(po2_mmHg: Tensor, ph: Tensor | float = 7.4, temperature_C: Tensor | float = 37.0) -> Tensor:
    """Fraction (0 to 1) of haemoglobin that holds O2. Severinghaus 1979, Eq. 1, at PO2 converted to pH 7.4 and 37 degC.

    Eq. 3 and 4 give d ln PO2 / dT and d ln PO2 / dpH at constant saturation as functions of PO2; they are
    evaluated at the given PO2 and kept constant over the shift, which is exact at the standard point.
    """
    virtual, _, _ = _virtual(po2_mmHg.log(), torch.as_tensor(ph) - 7.4, torch.as_tensor(temperature_C) - 37)
    return 1 / (23400 / (virtual**3 + 150 * virtual) + 1)


def _virtual(x: Tensor, acid: Tensor, fever: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PO2 at pH 7.4 and 37 degC of the same saturation, and d ln(virtual) / d x, d ln(virtual) / d pH.

    x = ln PO2, acid = pH - 7.4, fever = T - 37: with bohr = (PO2 / 26.6)^.184 and cool = 1 / (1 + (.00243 PO2)^3.88),
    ln(virtual) = x + (2.2 - bohr) acid - (.058 cool + .013) fever.
    """
    bohr = torch.exp(0.184 * x - 0.184 * LN_26_6)
    cool = 1 / (torch.exp(3.88 * x + 3.88 * LN_0_00243) + 1)
    slope_h = 2.2 - bohr
    virtual = torch.exp(x + slope_h * acid - (0.058 * cool + 0.013) * fever)
    slope_x = 1 - 0.184 * (bohr * acid) + (cool - cool * cool) * (0.058 * 3.88 * fever)
    return virtual, slope_x, slope_h


def state(x: Tensor, y: Tensor, h: Tensor, hb: Tensor, base_excess: Tensor, t: Tensor) -> State:
    """Blood of haemoglobin `hb`, base excess and temperature `t` at `x` = ln PO2, `y` = ln PCO2 and pH `h`.

    Base excess (Lang and Zander): (1 - .0143 Hb)((.0304 PCO2 10^(pH - 6.1) - 24.26) + (9.5 + 1.63 Hb)(pH - 7.4))
    - .2 Hb (1 - S); its last term is the acid-base side of the Haldane effect.
    CO2 content (Douglas): plasma (1 - .0289 Hb / ((3.352 - .456 S)(8.142 - pH))),
    plasma = 2.226 s PCO2 (1 + 10^(pH - pK')), s = .0307 + .00057 (37 - T) + .00002 (37 - T)^2,
    pK' = 6.086 + .042 (7.4 - pH) + (38 - T)(.00472 + .00139 (7.4 - pH)).
    """
    # The solvers spend their time here. Values of a patient (hb, base_excess, t) are narrower than the rest and are
    # combined first; products and sums are shared; a reciprocal costs less than a division.
    acid = h - 7.4
    po2, pco2 = torch.exp(x), torch.exp(y)
    virtual, slope_x, slope_h = _virtual(x, acid, t - 37)
    cube = virtual * (virtual * virtual + 150)
    inverse = 1 / (cube + 23400)
    empty = 23400 * inverse  # 1 - s
    s = 1 - empty
    s_ln = empty * (3 * s - 300 * (virtual * inverse))  # d s / d ln(virtual)
    s_x, s_h = s_ln * slope_x, s_ln * slope_h

    bound, dissolved = HUEFNER_mL_per_g * hb, O2_SOLUBILITY_mL_per_dL_mmHg * po2

    share, haldane = 1 - 0.0143 * hb, 0.2 * hb
    buffer = share * (9.5 + 1.63 * hb)
    bicarbonate = share * torch.exp(LN10 * h + y + (math.log(0.0304) - 6.1 * LN10))
    excess = bicarbonate + buffer * acid - haldane * empty - (24.26 * share + base_excess)

    cold = 37 - t
    solubility = 2.226 * (0.0307 + 0.00057 * cold + 0.00002 * cold**2)
    pk = 6.086 + 0.042 * 7.4 + (38 - t) * (0.00472 + 0.00139 * 7.4)  # at pH 0
    ph_pk = 1 + 0.042 + 0.00139 * (38 - t)  # d (pH - pK') / d pH
    dissolved_co2 = solubility * pco2
    ionised = dissolved_co2 * torch.exp(LN10 * ph_pk * h - LN10 * pk)
    plasma = dissolved_co2 + ionised
    # Douglas's factor has a pole at pH 8.142: beyond 7.842, which no living blood has, it is held constant
    far = 8.142 - h
    high = 1 / far.clamp(min=0.3)
    high_h = 1 / threshold(far, 0.3, torch.inf)  # as `high`, and 0 where that is constant
    low = 1 / (3.352 - 0.456 * s)
    cells = 0.0289 * hb * (low * high)
    whole = 1 - cells
    carried = plasma * cells
    carried_s = 0.456 * (carried * low)
    return State(
        po2_mmHg=po2,
        pco2_mmHg=pco2,
        s=s,
        o2=bound * s + dissolved,
        co2=plasma - carried,
        excess=excess,
        o2_x=bound * s_x + dissolved,
        o2_h=bound * s_h,
        co2_x=-carried_s * s_x,
        co2_h=LN10 * ph_pk * (ionised * whole) - carried * high_h - carried_s * s_h,
        excess_x=haldane * s_x,
        excess_y=bicarbonate,
        excess_h=LN10 * bicarbonate + buffer + haldane * s_h,
    )


def ph_of(po2_mmHg: Tensor, pco2_mmHg: Tensor, hb: Tensor, base_excess: Tensor, temperature_C: Tensor) -> Tensor:
    """pH of blood at these tensions and base excess, by Newton's method on a function that increases with pH."""
    x, y = po2_mmHg.log(), pco2_mmHg.log()
    h = torch.full_like(x, 7.4)
    for _ in range(12):
        now = state(x, y, h, hb, base_excess, temperature_C)
        h = h - (now.excess / now.excess_h).clamp(-0.4, 0.4)
    return h


class Tensions(NamedTuple):
    po2_mmHg: Tensor
    pco2_mmHg: Tensor
    ph: Tensor
    s: Tensor
    converged: Tensor  # bool


def tensions(o2: Tensor, co2: Tensor, hb: Tensor, base_excess: Tensor, temperature_C: Tensor) -> Tensions:
    """PO2, PCO2, pH and saturation of blood with these contents (mL/dL): the inverse of `state`.

    Where no blood has such contents (a negative one, for instance) `converged` is False. The last step
    is taken with the graph, so that gradients are those of the implicit function.
    """
    given = (hb, base_excess, temperature_C)
    with torch.no_grad():
        full = (HUEFNER_mL_per_g * hb * 0.999).clamp(min=1e-6)
        s0 = (o2 / full).clamp(0.02, 0.97)
        po2 = 26.6 * (s0 / (1 - s0)) ** (1 / 2.7) + (o2 - full).clamp(min=0) / O2_SOLUBILITY_mL_per_dL_mmHg
        pco2 = (co2 * 0.9).clamp(8, 150)
        h = ph_of(po2, pco2, *given)
        x, y = po2.log(), pco2.log()
        moved = torch.full_like(x, torch.inf)
        for _ in range(STEPS):
            x, y, h, moved = _toward(x, y, h, o2, co2, given)
            if bool((moved < TOLERANCE).all()):
                break
    x, y, h, _ = _toward(x, y, h, o2, co2, given)
    po2 = torch.exp(x)
    at = saturation(po2, h, temperature_C)
    return Tensions(
        po2, torch.exp(y), h, at, (moved < TOLERANCE) & torch.isfinite(x.detach() + y.detach() + h.detach())
    )


def _toward(
    x: Tensor, y: Tensor, h: Tensor, o2: Tensor, co2: Tensor, given: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One Newton step in x = ln PO2, y = ln PCO2 and pH towards blood with these contents, and its length."""
    now = state(x, y, h, *given)
    # pH follows from the tensions: its row of the 3 x 3 system is eliminated first
    lag, up_x, up_y = now.excess / now.excess_h, now.excess_x / now.excess_h, now.excess_y / now.excess_h
    o2_x, o2_y = now.o2_x - now.o2_h * up_x, -now.o2_h * up_y
    co2_x, co2_y = now.co2_x - now.co2_h * up_x, now.co2 - now.co2_h * up_y
    miss_o2, miss_co2 = o2 - now.o2 + now.o2_h * lag, co2 - now.co2 + now.co2_h * lag
    det = o2_x * co2_y - o2_y * co2_x
    dx = (miss_o2 * co2_y - o2_y * miss_co2) / det
    dy = (o2_x * miss_co2 - miss_o2 * co2_x) / det
    dh = -lag - up_x * dx - up_y * dy
    step_x, step_y, step_h = dx.clamp(-LARGEST, LARGEST), dy.clamp(-LARGEST, LARGEST), dh.clamp(-0.2, 0.2)
    moved = torch.stack([step_x.detach().abs(), step_y.detach().abs(), step_h.detach().abs()]).amax(0)
    return x + step_x, y + step_y, (h + step_h).clamp(5.5, 9), moved
