"""Draw docs/physiology.png: the lung model and published curves and points. Run it in the repository's root:

.venv/bin/python -m scripts.physiology_plots
"""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylab.physiology import blood
from raylab.physiology.course import course
from raylab.physiology.parameters import inputs
from raylab.physiology.steady import steady_state

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
# Severinghaus, J Appl Physiol 1979;46:599, Table 1
PO2 = (4, 10, 16, 20, 26, 30, 36, 40, 46, 50, 60, 70, 80, 90, 100, 120)
S = (2.56, 9.58, 21.4, 32.12, 48.27, 57.54, 68.63, 74.69, 81.71, 85.08, 90.85, 94.06, 95.84, 96.88, 97.49, 98.21)


def line(low: float, high: float, n: int = 80) -> torch.Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def dissociation(axes: Axes) -> None:
    x = line(1, 130)
    for ph, colour in ((7.4, COLOURS[0]), (7.2, COLOURS[1]), (7.6, COLOURS[2])):
        axes.plot(x, 100 * blood.saturation(x, torch.tensor(ph)), color=colour, label=f"pH {ph}")
    axes.plot(PO2, S, "k.", markersize=5, label="standard curve (1979)")
    label(axes, "O2 saturation", "PO2, mmHg", "%")


def isoshunt(axes: Axes) -> None:
    x = line(0.21, 1)
    for shunt, colour in zip((0.05, 0.1, 0.2, 0.3, 0.5), COLOURS, strict=True):
        y = steady_state(inputs({"fio2": x, "shunt": shunt, "collapsed": 0.0, "vq_log_sd": 0.3}))
        axes.plot(x, y.values["pf_mmHg"], color=colour, label=f"shunt {shunt:g}")
    for severity in (100, 200, 300):
        axes.axhline(severity, color="#9CA3AF", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 780)
    label(axes, "P/F at one shunt", "FiO2", "mmHg")


def scatter(axes: Axes) -> None:
    x = line(0.21, 1)
    for sd, colour in zip((0.4, 1.0, 1.4, 1.8), COLOURS, strict=False):
        y = steady_state(inputs({"fio2": x, "shunt": 0.02, "collapsed": 0.0, "vq_log_sd": sd}))
        axes.plot(x, y.values["pao2_mmHg"], color=colour, label=f"log SD of V/Q {sd:g}")
    label(axes, "V/Q scatter yields to oxygen", "FiO2", "PaO2, mmHg")


def ventilation(axes: Axes) -> None:
    x = line(8, 35)
    for volume, colour in zip((300, 430, 600), COLOURS, strict=False):
        y = steady_state(inputs({"rate_per_min": x, "tidal_volume_mL": float(volume)}))
        axes.plot(x, y.values["paco2_mmHg"], color=colour, label=f"{volume} mL")
    axes.set_ylim(15, 140)
    label(axes, "Ventilation", "breaths a minute", "PaCO2, mmHg")


def washin(axes: Axes) -> None:
    times, values, _ = course(inputs({"fio2": 0.35}), [(0, {"fio2": 0.55}), (30, {"fio2": 0.35})], 60)
    pao2 = values["pao2_mmHg"][0]
    axes.plot(times, (pao2 - pao2[0]) / (pao2[299] - pao2[0]), color=COLOURS[0], label="model")
    t = np.linspace(0, 30, 200)
    axes.plot(t, 1 - np.exp(-1.01 * t), "k--", linewidth=1, label="Cakar 2001, mean rates")
    axes.plot(t + 30, np.exp(-0.69 * t), "k--", linewidth=1)
    label(axes, "FiO2 0.35 to 0.55 and back", "min", "PaO2, fraction of the change")


def recruitment(axes: Axes) -> None:
    changes = [(0.0, {"peep_cmH2O": 15.0}), (60.0, {"peep_cmH2O": 5.0})]
    for collapsed, colour in zip((0.0, 0.15, 0.3), COLOURS, strict=False):
        times, values, _ = course(inputs({"collapsed": collapsed, "peep_cmH2O": 10.0}), changes, 90, 0.5)
        axes.plot(times, values["pf_mmHg"][0], color=colour, label=f"recruitable {collapsed:g}")
    label(axes, "PEEP 10 to 15, then 5", "min", "P/F, mmHg")


def label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    torch.set_grad_enabled(False)
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = (dissociation, isoshunt, scatter, ventilation, washin, recruitment)
    for axes, draw in zip(figure.subplots(2, 3).flat, panels, strict=True):
        draw(axes)
    figure.savefig("docs/physiology.png", dpi=80)


if __name__ == "__main__":
    main()
