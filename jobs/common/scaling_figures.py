"""The figures of a scaling benchmark. What is modelled is dashed and says so."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from tracking.plots import COLOURS, GREY

SCALINGS = {"strong": COLOURS[0], "weak": COLOURS[1]}
LABELS = {"strong": "strong (batch constant)", "weak": "weak (batch per worker constant)"}
PARTS = {"compute": COLOURS[0], "communication": COLOURS[1], "waiting": COLOURS[4], "input": COLOURS[2]}
TEXTS = {
    "throughput": "Samples per second. Solid: measured, with 95% CI; dashed: the model; dotted: ideal.",
    "efficiency": "Efficiency: samples per second and worker, relative to the smallest number of workers.",
    "parts": "Where the time of a step goes, as means over steps and workers.",
    "sums": "Sums between workers: measured, and as the alpha-beta model has them (dashed).",
}


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """The figures by name; that of the sums only where there were any."""
    figures = {"throughput": throughput(result), "efficiency": efficiency(result), "parts": parts(result)}
    return figures | ({"sums": sums(result)} if result["network"] else {})


def throughput(result: dict[str, Any]) -> Figure:
    figure, axes = _open(result, "Throughput")
    for scaling, colour in SCALINGS.items():
        rows = points_of(result, scaling)
        at, rates = [row["workers"] for row in rows], [row["samples_per_s"] for row in rows]
        low = [row["samples_per_s"] - row["samples_per_s_low"] for row in rows]
        high = [row["samples_per_s_high"] - row["samples_per_s"] for row in rows]
        axes.errorbar(
            at, rates, yerr=[low, high], color=colour, marker="o", capsize=3, linewidth=1.8, label=LABELS[scaling]
        )
        modelled = [row for row in result["modelled"] if row["scaling"] == scaling]
        if modelled:
            axes.plot(
                [row["workers"] for row in modelled],
                [row["samples_per_s"] for row in modelled],
                color=colour,
                linestyle="--",
                linewidth=1.3,
                label=f"model, {scaling}",
            )
    first = points_of(result, "strong")[0]
    ends = [1, max([row["workers"] for row in (*result["modelled"], *result["points"])])]
    ideal = [first["samples_per_s"] / first["workers"] * workers for workers in ends]
    axes.plot(ends, ideal, color=GREY, linestyle=":", linewidth=1.2, label="ideal")
    alone = next(row for row in result["points"] if row["scaling"] == "process")
    axes.axhline(alone["samples_per_s"], color=GREY, linewidth=0.8, label="one process without Ray")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("samples/s")
    _over_workers(axes, result)
    return figure


def efficiency(result: dict[str, Any]) -> Figure:
    figure, axes = _open(result, "Efficiency")
    for scaling, colour in SCALINGS.items():
        rows = points_of(result, scaling)
        at = [row["workers"] for row in rows]
        axes.plot(at, [row["efficiency"] for row in rows], color=colour, marker="o", label=LABELS[scaling])
        modelled = [row for row in result["modelled"] if row["scaling"] == scaling]
        if modelled:
            one = modelled[0]["samples_per_s"] / modelled[0]["workers"]
            values = [row["samples_per_s"] / row["workers"] / one for row in modelled]
            counts = [row["workers"] for row in modelled]
            axes.plot(counts, values, color=colour, linestyle="--", linewidth=1.3, label=f"model, {scaling}")
    axes.axhline(1, color=GREY, linestyle=":", linewidth=1.2, label="ideal")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("efficiency")
    _over_workers(axes, result)
    return figure


def parts(result: dict[str, Any]) -> Figure:
    """One bar for each point with the whole batch."""
    rows = [row for row in result["points"] if row["scaling"] != "process" or row["batch"] == result["batch"]]
    names = [
        "no Ray" if row["scaling"] == "process" else f"{row['scaling']}\n{row['workers']}" for row in rows
    ]  # fmt: skip
    figure, axes = _open(result, "Time of a step")
    bottom = [0.0] * len(rows)
    for part, colour in PARTS.items():
        heights = [1000 * row[part] for row in rows]
        axes.bar(names, heights, bottom=bottom, color=colour, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("ms per step")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    return figure


def sums(result: dict[str, Any]) -> Figure:
    figure, axes = _open(result, "Sums between workers")
    network = result["network"]
    for index, workers in enumerate(sorted({one["workers"] for one in result["sums"]})):
        own = sorted((one["size"], one["seconds"]) for one in result["sums"] if one["workers"] == workers)
        sizes, colour = [size for size, _ in own], COLOURS[index % len(COLOURS)]
        axes.plot(sizes, [1000 * s for _, s in own], "o", color=colour, label=f"{workers} workers")
        fitted = [2 * (workers - 1) * (network["alpha"] + network["beta"] * size / workers) for size in sizes]
        axes.plot(
            sizes, [1000 * s for s in fitted], "--", color=colour, linewidth=1.3, label=f"model, {workers} workers"
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms")
    low, high = (math.log10(end) for end in axes.get_ylim())
    axes.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))  # whole decades, because their ends are the labels
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    return figure


def points_of(result: dict[str, Any], scaling: str) -> list[dict[str, Any]]:
    """The measured points of one kind of scaling; one worker is the first of both."""
    return [row for row in result["points"] if row["workers"] == 1 or (row["workers"] and row["scaling"] == scaling)]


def _open(result: dict[str, Any], title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    synthetic = " - SYNTHETIC DATA" if result["synthetic"] else ""
    axes.set_title(f"{title}: {result['task']}{synthetic}", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _over_workers(axes: Axes, result: dict[str, Any]) -> None:
    counts = sorted({row["workers"] for row in (*result["modelled"], *result["points"])} - {0})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("workers")
    axes.grid(alpha=0.25)
    assert isinstance(axes.figure, Figure)
    axes.figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)  # it would cover lines
