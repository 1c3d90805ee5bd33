"""Measure the speed of the lung model: vectorised, as a plain NumPy loop over patients, on Ray workers, and as a
surrogate.

    .venv/bin/python -m benchmarks.physiology [RUN]      # RUN: a trained surrogate

All variants solve the same equations for the same patients to the same tolerance, in one run. The loop solves one
patient after the other with NumPy arrays over the 20 compartments; the model is timed in one process and in one
process per core in parallel, each on one thread, as the Ray tasks of a sweep run.
"""

import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raylab.distributed.map import run_chunks
from raylab.physiology import exchange
from raylab.physiology.course import advance, begin
from raylab.physiology.designs import points
from raylab.physiology.exchange import Gas, System
from raylab.physiology.mechanics import equilibrium
from raylab.physiology.parameters import Inputs, inputs
from raylab.physiology.steady import steady_state, total_shunt
from raylab.physiology.sweep import RECIPES, recipe, write_chunk
from raylab.physiology.sweep import begin as begin_sweep

ROUNDS, TIMES, PATIENTS, FEW = 3, 8, 16384, 400
SWEPT = 2**19


def blood(x: Any, y: Any, h: Any, hb: float, base: float, t: float) -> tuple[Any, ...]:
    """`raylab.physiology.blood.state` in NumPy."""
    ln10, acid, fever = np.log(10), h - 7.4, t - 37
    po2, pco2 = np.exp(x), np.exp(y)
    bohr = np.exp(0.184 * x - 0.184 * np.log(26.6))
    cool = 1 / (np.exp(3.88 * x + 3.88 * np.log(0.00243)) + 1)
    slope_h = 2.2 - bohr
    v = np.exp(x + slope_h * acid - (0.058 * cool + 0.013) * fever)
    slope_x = 1 - 0.184 * bohr * acid + (cool - cool * cool) * (0.058 * 3.88 * fever)
    cube = v * (v * v + 150)
    inverse = 1 / (cube + 23400)
    empty = 23400 * inverse
    s = 1 - empty
    s_ln = empty * (3 * s - 300 * v * inverse)
    s_x, s_h = s_ln * slope_x, s_ln * slope_h
    bound, dissolved, share, haldane = 1.34 * hb, 0.003 * po2, 1 - 0.0143 * hb, 0.2 * hb
    buffer = share * (9.5 + 1.63 * hb)
    bicarbonate = share * np.exp(ln10 * h + y + (np.log(0.0304) - 6.1 * ln10))
    excess = bicarbonate + buffer * acid - haldane * empty - (24.26 * share + base)
    cold = 37 - t
    pk, ph_pk = 6.086 + 0.042 * 7.4 + (38 - t) * (0.00472 + 0.00139 * 7.4), 1.042 + 0.00139 * (38 - t)
    gas = 2.226 * (0.0307 + 0.00057 * cold + 0.00002 * cold**2) * pco2
    ionised = gas * np.exp(ln10 * ph_pk * h - ln10 * pk)
    plasma, far = gas + ionised, 8.142 - h
    high, low = 1 / np.maximum(far, 0.3), 1 / (3.352 - 0.456 * s)
    cells = 0.0289 * hb * low * high
    carried = plasma * cells
    carried_s = 0.456 * carried * low
    return (
        po2, pco2, bound * s + dissolved, plasma - carried, excess, bound * s_x + dissolved, bound * s_h,
        -carried_s * s_x, ln10 * ph_pk * ionised * (1 - cells) - carried * high * (far > 0.3) - carried_s * s_h,
        haldane * s_x, bicarbonate, ln10 * bicarbonate + buffer + haldane * s_h,
    )  # fmt: skip


def one_patient(of: dict[str, Any], at: dict[str, Any], share: Any) -> Any:
    """The PO2 of the compartments: `exchange.step` for one patient in NumPy, iterated to the same tolerance."""
    lx, ly, h, o2_v, co2_v = (at[name] for name in ("ln_x", "ln_y", "h", "o2_v", "co2_v"))
    f, shunt, o2_b, co2_b = (of[name] for name in ("fio2", "shunt", "o2_b", "co2_b"))
    rest, through = 1 - f, 1 - shunt
    for _ in range(40):
        po2, pco2, o2, co2, excess, o2_x, o2_h, co2_x, co2_h, e_x, e_y, e_h = blood(
            lx, ly, h, of["hb"], of["base_excess"], of["temperature_C"]
        )
        inverse = 1 / e_h
        lag, up_x, up_y = excess * inverse, e_x * inverse, e_y * inverse
        o2_x, o2_y, co2_x, co2_y = o2_x - o2_h * up_x, -o2_h * up_y, co2_x - co2_h * up_x, co2 - co2_h * up_y
        o2, co2 = o2 - o2_h * lag, co2 - co2_h * lag
        x, y = of["ratio"] * po2, of["ratio"] * pco2
        miss_o2 = of["source_o2"] - x - f * y - rest * (o2 - o2_v)
        miss_co2 = of["source_co2"] - y - co2 + co2_v
        xx, xy, yx, yy = x + rest * o2_x, f * y + rest * o2_y, co2_x, y + co2_y
        inverse = 1 / (xx * yy - xy * yx)
        xx, xy, yx, yy = xx * inverse, xy * inverse, yx * inverse, yy * inverse
        own_x, own_y = yy * miss_o2 - xy * miss_co2, xx * miss_co2 - yx * miss_o2
        o2_c, co2_c = share @ (o2 + o2_x * own_x + o2_y * own_y), share @ (co2 + co2_x * own_x + co2_y * own_y)
        rest_o2 = o2_v - of["o2_a"] - o2_b * (through * o2_c + shunt * o2_v)
        rest_co2 = co2_v - of["co2_a"] - co2_b * (through * co2_c + shunt * co2_v)
        oo = 1 - o2_b * (shunt + through * rest * (share @ (o2_x * yy - o2_y * yx)))
        oc = -o2_b * through * (share @ (o2_y * xx - o2_x * xy))
        co = -co2_b * through * rest * (share @ (co2_x * yy - co2_y * yx))
        cc = 1 - co2_b * (shunt + through * (share @ (co2_y * xx - co2_x * xy)))
        outer = oo * cc - oc * co
        d_o2 = min(max((-rest_o2 * cc + oc * rest_co2) / outer, -6), 6)
        d_co2 = min(max((-oo * rest_co2 + co * rest_o2) / outer, -25), 25)
        dx, dy = own_x + yy * (rest * d_o2) - xy * d_co2, own_y + xx * d_co2 - yx * (rest * d_o2)
        dh = -lag - up_x * dx - up_y * dy
        dx, dy = np.minimum(np.maximum(dx, -0.7), 0.7), np.minimum(np.maximum(dy, -0.7), 0.7)
        lx, ly, h = lx + dx, ly + dy, np.minimum(np.maximum(h + np.minimum(np.maximum(dh, -0.2), 0.2), 5.5), 9)
        o2_v, co2_v = o2_v + d_o2, co2_v + d_co2
        moved = max(abs(dx).max(), abs(dy).max(), abs(dh).max(), abs(d_o2) / 10, abs(d_co2) / 50)
        if moved < exchange.TOLERANCE:
            return np.exp(lx)
    raise RuntimeError("a patient without a steady state")


def patients(n: int) -> Inputs:
    """The first `n` patients of the `living` sweep that have a steady state."""
    drawn = inputs(points(RECIPES["living"], "sobol", 2 * n, 0, 0, 2 * n))
    return drawn.take((steady_state(drawn).status == 0).nonzero()[:, 0][:n])


def row(of: System | Gas, i: int) -> dict[str, Any]:
    """Row i as a dictionary with Python floats, which NumPy handles faster than tensors."""
    values = of._asdict() if isinstance(of, Gas) else vars(of)
    return {name: value[i].numpy() if value.dim() > 1 else value[i].item() for name, value in values.items()}


def time_model(given: Inputs, compiled: bool) -> tuple[float, System, Tensor]:
    """Solve the steady states of all patients; returns the seconds, the equations, and the PO2 of the compartments."""
    torch.set_num_threads(1)
    of = exchange.system(given, total_shunt(given, equilibrium(given)))
    began = time.perf_counter()
    for _ in range(TIMES):
        gas, converged = exchange.solve(of, compiled=compiled)
    seconds = (time.perf_counter() - began) / TIMES
    if not bool(converged.all()):
        raise RuntimeError("a patient without a steady state")
    return seconds, of, gas.x


def time_loop(of: System) -> tuple[float, Any]:
    """Solve the same in NumPy, one patient after the other; returns the seconds and the PO2 of the compartments."""
    start, share = exchange.guess(of), exchange.shares(of.ratio).numpy()
    rows = [(row(of, i), row(start, i)) for i in range(len(of.fio2))]
    began = time.perf_counter()
    found = [one_patient(*one, share) for one in rows]
    return time.perf_counter() - began, np.stack(found)


def seconds_alone(given: Inputs, compiled: bool) -> float:
    """The seconds of `time_model`, for use in another process."""
    return time_model(given, compiled)[0]


def sweeps(cores: int) -> None:
    """Print rows/s of one sweep, including writing, on Ray workers with one thread each, and a hash of its files."""
    import ray

    for compiled in (False, True):
        made = recipe("living", {}, size=SWEPT, compiled=compiled)
        for workers in range(1, cores + 1):
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="warning")
            with tempfile.TemporaryDirectory() as place:
                chunks = begin_sweep(made, Path(place))
                began = time.perf_counter()
                run_chunks(write_chunk, chunks)
                rate = SWEPT / (time.perf_counter() - began)
                digest = hashlib.sha256(b"".join(path.read_bytes() for path in chunks)).hexdigest()[:8]
            what = f"{', compiled' if compiled else ''}, start of the workers included"
            print(f"sweep{what}: {rate:,.0f} rows/s on {workers} Ray worker(s), files {digest}", flush=True)
            ray.shutdown()


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    many = patients(PATIENTS)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for r in range(-1, ROUNDS):  # the first round imports and compiles, and is not shown
            _, of, x = time_model(many, False)
            slow, check = time_loop(of.take(slice(0, FEW)))
            if not np.allclose(check, x[:FEW].numpy(), rtol=1e-8):
                raise RuntimeError("the loop and the model have different solutions")
            loop = FEW / slow
            for compiled in (False, True):
                one = PATIENTS / time_model(many, compiled)[0]
                together = cores * PATIENTS / max(pool.map(seconds_alone, [many] * cores, [compiled] * cores))
                if r >= 0:
                    print(
                        f"round {r}: steady states/s{', compiled' if compiled else ''}: loop {loop:,.0f}; "
                        f"one process {one:,.0f}, ratio {one / loop:.0f}; "
                        f"{cores} processes {together:,.0f}, ratio {together / loop:.0f}",
                        flush=True,
                    )
    stores, _ = begin(many)
    began = time.perf_counter()
    for _ in range(5):
        stores, _ = advance(many, stores, 0.1)
    rate = len(many) * 0.5 / (time.perf_counter() - began)
    print(f"time course: {rate:,.0f} patients x simulated min/s, one process, steps of 0.1 min", flush=True)
    sweeps(cores)
    if len(sys.argv) > 1:
        surrogate(sys.argv[1], many)


def surrogate(run: str, many: Inputs) -> None:
    from jobs.common import home
    from raylab.training.run import read_model

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
