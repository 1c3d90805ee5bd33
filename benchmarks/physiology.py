"""How fast the lung model is: vectorised against a plain loop over patients in NumPy, and against a surrogate.

    .venv/bin/python -m benchmarks.physiology [RUN]      # RUN: a trained surrogate

Ratios of work done side by side in one process: the same equations, the same number of Newton steps, the same patients.
The loop takes one patient after the other with NumPy arrays over the 20 compartments; the model is timed on one thread
and on one for each core.
"""

import sys
import time
from typing import Any

import numpy as np
import torch

from raylab.physiology import exchange
from raylab.physiology.course import advance, begin
from raylab.physiology.designs import points
from raylab.physiology.exchange import Gas, System
from raylab.physiology.mechanics import equilibrium
from raylab.physiology.parameters import Inputs, inputs
from raylab.physiology.steady import steady_state, total_shunt
from raylab.physiology.sweep import RECIPES

ROUNDS = 3


def blood(x: Any, y: Any, h: Any, hb: float, base: float, t: float) -> tuple[Any, ...]:
    """`raylab.physiology.blood.state` in NumPy."""
    ln10 = np.log(10)
    bohr, hot = (x / 26.6) ** 0.184, (0.00243 * x) ** 3.88
    acid, fever = h - 7.4, t - 37
    v = x * np.exp((2.2 - bohr) * acid - (0.058 / (hot + 1) + 0.013) * fever)
    slope_x = 1 - 0.184 * bohr * acid + 0.058 * 3.88 * hot / (hot + 1) ** 2 * fever
    cube = v**3 + 150 * v
    s = cube / (cube + 23400)
    s_ln = 23400 * (3 * v**2 + 150) * v / (cube + 23400) ** 2
    s_x, s_h = s_ln * slope_x / x, s_ln * (2.2 - bohr)
    o2 = 1.34 * hb * s + 0.003 * x
    bicarbonate = 0.0304 * y * np.exp(ln10 * (h - 6.1))
    share, buffer = 1 - 0.0143 * hb, 9.5 + 1.63 * hb
    excess = share * (bicarbonate - 24.26 + buffer * (h - 7.4)) - 0.2 * hb * (1 - s) - base
    cold = 37 - t
    solubility = 0.0307 + 0.00057 * cold + 0.00002 * cold**2
    pk = 6.086 + 0.042 * (7.4 - h) + (38 - t) * (0.00472 + 0.00139 * (7.4 - h))
    ratio = np.exp(ln10 * (h - pk))
    plasma = 2.226 * solubility * y * (1 + ratio)
    plasma_h = 2.226 * solubility * y * ratio * ln10 * (1 + 0.042 + 0.00139 * (38 - t))
    low, high = 3.352 - 0.456 * s, np.maximum(8.142 - h, 0.3)
    cells = 0.0289 * hb / (low * high)
    co2 = plasma * (1 - cells)
    cells_s, cells_h = cells * 0.456 / low, cells / high * (h < 7.842)
    return (
        o2, co2, excess, 1.34 * hb * s_x + 0.003, 1.34 * hb * s_h, -plasma * cells_s * s_x, co2 / y,
        plasma_h * (1 - cells) - plasma * (cells_h + cells_s * s_h), 0.2 * hb * s_x, share * bicarbonate / y,
        share * (ln10 * bicarbonate + buffer) + 0.2 * hb * s_h,
    )  # fmt: skip


def one_patient(of: dict[str, Any], at: dict[str, Any], steps: int) -> tuple[Any, ...]:
    """`steps` of `exchange.step` for one patient in NumPy; PO2 and PCO2 of the compartments, venous contents."""
    x, y, h, o2_v, co2_v = (at[name] for name in ("x", "y", "h", "o2_v", "co2_v"))
    f, p, k, shunt = of["fio2"], of["dry_mmHg"], of["k"], of["shunt"]
    v, q, g = of["ventilation"], of["flow"], of["stored"]
    mix = q / q.sum()
    for _ in range(steps):
        o2, co2, excess, o2_x, o2_h, co2_x, co2_y, co2_h, e_x, e_y, e_h = blood(
            x, y, h, of["hb"], of["base_excess"], of["temperature_C"]
        )
        lag, up_x, up_y = excess / e_h, e_x / e_h, e_y / e_h
        o2, o2_x, o2_y = o2 - o2_h * lag, o2_x - o2_h * up_x, -o2_h * up_y
        co2, co2_x, co2_y = co2 - co2_h * lag, co2_x - co2_h * up_x, co2_y - co2_h * up_y
        flux = k * q
        taken, given = (1 - f) * flux, f * flux
        lost, held = co2_v - co2, v + g
        rest_x = v * (f * p - x) - taken * (o2 - o2_v) - given * lost - g * (x - of["x_before"])
        rest_y = v * y - flux * lost + g * (y - of["y_before"])
        xx, xy, yx, yy = (
            -held - taken * o2_x + given * co2_x,
            -taken * o2_y + given * co2_y,
            flux * co2_x,
            held + flux * co2_y,
        )
        det = xx * yy - xy * yx
        own_x, own_y = (-rest_x * yy + xy * rest_y) / det, (-xx * rest_y + yx * rest_x) / det
        po_x, po_y = -taken * yy / det, taken * yx / det
        pc_x, pc_y = (given * yy - flux * xy) / det, (xx * flux - yx * given) / det
        o2_c, co2_c = mix @ (o2 + o2_x * own_x + o2_y * own_y), mix @ (co2 + co2_x * own_x + co2_y * own_y)
        rest_o2 = o2_v - of["o2_a"] - of["o2_b"] * ((1 - shunt) * o2_c + shunt * o2_v)
        rest_co2 = co2_v - of["co2_a"] - of["co2_b"] * ((1 - shunt) * co2_c + shunt * co2_v)
        oo = 1 - of["o2_b"] * (shunt + (1 - shunt) * (mix @ (o2_x * po_x + o2_y * po_y)))
        oc = -of["o2_b"] * (1 - shunt) * (mix @ (o2_x * pc_x + o2_y * pc_y))
        co = -of["co2_b"] * (1 - shunt) * (mix @ (co2_x * po_x + co2_y * po_y))
        cc = 1 - of["co2_b"] * (shunt + (1 - shunt) * (mix @ (co2_x * pc_x + co2_y * pc_y)))
        outer = oo * cc - oc * co
        d_o2 = np.clip((-rest_o2 * cc + oc * rest_co2) / outer, -6, 6)
        d_co2 = np.clip((-oo * rest_co2 + co * rest_o2) / outer, -25, 25)
        dx, dy = own_x + po_x * d_o2 + pc_x * d_co2, own_y + po_y * d_o2 + pc_y * d_co2
        dh = -lag - up_x * dx - up_y * dy
        x, y = x * np.exp(np.clip(dx / x, -0.7, 0.7)), y * np.exp(np.clip(dy / y, -0.7, 0.7))
        h, o2_v, co2_v = np.clip(h + np.clip(dh, -0.2, 0.2), 5.5, 9), o2_v + d_o2, co2_v + d_co2
    return x, y, o2_v, co2_v


def patients(n: int) -> Inputs:
    """`n` patients of the `living` sweep that have a steady state."""
    drawn = inputs(points(RECIPES["living"], "sobol", 2 * n, 0, 0, 2 * n))
    return drawn.take((steady_state(drawn).status == 0).nonzero()[:, 0][:n])


def row(of: System | Gas, i: int) -> dict[str, Any]:
    fields = of._asdict() if isinstance(of, Gas) else vars(of)
    return {name: value[i].numpy() for name, value in fields.items()}


def vectorised(given: Inputs, steps: int) -> tuple[float, Gas, System, Gas]:
    """Seconds for `steps` Newton steps of all patients, as `exchange.solve` makes them; where all end, and began."""
    of = exchange.system(given, total_shunt(given, equilibrium(given)))
    start = exchange.guess(of)

    def some(part: System, at: Gas) -> Gas:
        for _ in range(steps):
            at, _ = exchange.step(part, at)
        return at

    began = time.perf_counter()
    parts = exchange.by_block(some, of, start)
    seconds = time.perf_counter() - began
    return seconds, Gas(*(torch.cat(values) for values in zip(*parts, strict=True))), of, start


def main() -> None:
    torch.set_grad_enabled(False)
    cores = torch.get_num_threads()
    many, few, steps = patients(16384), patients(200), 12
    for r in range(ROUNDS):
        fast = {}
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            fast[threads], at, of, start = vectorised(many, steps)
        began = time.perf_counter()
        for i in range(len(few)):
            x, *_ = one_patient(row(of, i), row(start, i), steps)
        slow = time.perf_counter() - began
        assert np.allclose(x, at.x[len(few) - 1].numpy(), rtol=1e-9), "the loop solves something else"
        loop = len(few) / slow
        for threads, seconds in fast.items():
            rates = f"vectorised {len(many) / seconds:,.0f}, loop {loop:,.0f}, ratio {len(many) / seconds / loop:.0f}"
            print(f"round {r}: steady states a second, {threads} thread(s): {rates}", flush=True)
    torch.set_num_threads(1)
    given = many
    stores, _ = begin(given)
    began = time.perf_counter()
    for _ in range(5):
        stores, _ = advance(given, stores, 0.1)
    rate = len(given) * 0.5 / (time.perf_counter() - began)
    print(f"time course: {rate:,.0f} patients x simulated minutes a second, one thread, steps of .1 min", flush=True)
    if len(sys.argv) > 1:
        surrogate(sys.argv[1], many)


def surrogate(run: str, many: Inputs) -> None:
    from jobs import home
    from raylab.run import read_model

    _, _, spec, network = read_model(home.find(run))
    x = torch.stack([getattr(many, name) for name in spec["features"]], 1)
    x = ((x - torch.tensor(spec["mean"])) / torch.tensor(spec["std"])).float()
    network.eval()
    for r in range(ROUNDS):
        began = time.perf_counter()
        steady_state(many)
        model = time.perf_counter() - began
        began = time.perf_counter()
        network(x)
        net = time.perf_counter() - began
        times = f"model {model:.2f} s, surrogate {net * 1000:.1f} ms, ratio {model / net:.0f}"
        print(f"round {r}: {len(many):,} patients: {times}", flush=True)


if __name__ == "__main__":
    main()
