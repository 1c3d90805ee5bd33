"""Views of one patient: the effect of each parameter on gases and pressures (a tornado plot), and the time course."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from raylab.physiology.course import course
from raylab.physiology.parameters import LIVING, QUANTITIES, Inputs, impossible
from raylab.physiology.steady import STATUS, steady_state

STEP = 0.1  # of the range of living patients, up and down
SHOWN = {"pf_mmHg": "P/F, mmHg", "paco2_mmHg": "PaCO2, mmHg", "driving_cmH2O": "driving, cmH2O"}
TRACES = {
    "pao2_mmHg": "PaO2, mmHg",
    "paco2_mmHg": "PaCO2, mmHg",
    "ph": "pH",
    "plateau_cmH2O": "plateau pressure, cmH2O",
}
BARS = 10
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6B7280"


def one_at_a_time(patient: Inputs) -> list[dict[str, Any]]:
    """For each input: its value down and up by STEP of its range in LIVING, and each output of SHOWN at these values
    and at the patient's.

    `patient` has one row. A step that leaves what the model takes is cut at the limit; an output is None where there is
    no steady state. `why` then says so.
    """
    steps = []
    for name, (low, high) in LIVING.items():
        value, reach, limits = getattr(patient, name).item(), STEP * (high - low), QUANTITIES[name]
        steps += [(name, max(limits.low, value - reach)), (name, min(limits.high, value + reach))]
    rows = {name: getattr(patient, name).repeat(len(steps) + 1) for name in QUANTITIES}
    for i, (name, value) in enumerate(steps):
        rows[name][i + 1] = value
    every = Inputs(**rows)
    refused = torch.zeros(len(every), dtype=torch.bool)
    for wrong in impossible(every).values():
        refused |= wrong
    with torch.no_grad():
        found = steady_state(every)
    effects = []
    for i in range(0, len(steps), 2):
        name = steps[i][0]
        row: dict[str, Any] = {"input": name, "unit": QUANTITIES[name].unit, "down": steps[i][1], "up": steps[i + 1][1]}
        for output in SHOWN:
            value = found.values[output]
            for side, at in (("here", 0), ("down", i + 1), ("up", i + 2)):
                fine = not refused[at] and found.status[at] == 0
                row[f"{output}/{side}"] = value[at].item() if fine else None
        lost = [STATUS[int(found.status[at])] for at in (i + 1, i + 2) if found.status[at] != 0]
        effects.append(row | {"why": lost[0] if lost else ""})
    return effects


def tornado(table: list[dict[str, Any]], title: str) -> Figure:
    """Bars of the inputs that move each output of SHOWN most; blue where the input is lower, orange where higher."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(f"{title}\nblue: input lower | orange: input higher", fontsize=11)
    for axes, (output, label) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items(), strict=True):
        here = table[0][f"{output}/here"]

        def width(row: dict[str, Any], output: str = output, here: float = here) -> float:
            ends = [row[f"{output}/{side}"] for side in ("down", "up")]
            return max((abs(end - here) for end in ends if end is not None), default=0.0)

        largest = [row for row in sorted(table, key=width)[-BARS:] if width(row) > 0]
        for place, row in enumerate(largest):
            for side, colour in (("down", BLUE), ("up", ORANGE)):
                end = row[f"{output}/{side}"]
                if end is not None:
                    axes.barh(place, end - here, left=here, color=colour, height=0.7)
        axes.set_yticks(range(len(largest)), [f"{r['input']}  {r['down']:.3g} | {r['up']:.3g}" for r in largest])
        axes.tick_params(axis="y", labelsize=7)
        axes.axvline(here, color="black", linewidth=1)
        axes.set_xlabel(f"{label} (here {here:.3g})")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def traces(patient: Inputs, changes: Sequence[tuple[float, dict[str, Any]]], minutes: float, title: str) -> Figure:
    """The time course of `patient` [1 row or a few] through `changes`, each marked."""
    times, values, status = course(patient, changes, minutes)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(title)
    for axes, (output, label) in zip(figure.subplots(1, len(TRACES)), TRACES.items(), strict=True):
        for row in values[output]:
            axes.plot(times, row, color=BLUE, linewidth=1.8)
        for minute, settings in changes:
            axes.axvline(minute, color=GREY, linewidth=1, linestyle="--")
            words = ", ".join(f"{name.split('_')[0]} {value:g}" for name, value in settings.items())
            axes.annotate(words, (minute, 1), (2, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                          rotation=90, va="top", fontsize=7, color=GREY)  # fmt: skip
        axes.set_xlabel("min")
        axes.set_title(label, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        low, high = np.nanmin(values[output]), np.nanmax(values[output])
        if high - low < 0.004 * abs(high):  # draw a nearly constant line as flat
            axes.set_ylim(low - 0.01 * abs(high), high + 0.01 * abs(high))
    if bool((status > 0).any()):
        figure.text(0.01, 0.01, STATUS[int(status.max())], color=ORANGE)
    return figure
