"""Arrays in, matplotlib figures out. No global state: `figure.savefig(path)` draws with Agg.

Colours are Okabe and Ito's, which the colour-blind can tell apart. `synthetic=True` says so in the
title: a picture is often all that is left of a run.
"""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from raylab.score import NetBenefit, Score

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
STYLES = ("-", "--", "-.", ":")
GREY = "#6B7280"
NAME_WIDTH = 34  # characters in a line of a run's name beside a plot
LOG_RANGE = 50  # a parameter spread wider than this factor gets a logarithmic axis

Curve = tuple[Sequence[float], Sequence[float]]  # steps, values
Style = tuple[str, str]  # colour, line style
T = TypeVar("T")


class CalibrationBin(NamedTuple):
    """Rows of similar predicted probability: their mean, the observed frequency with its 95% CI, and their number."""

    predicted: float
    observed: float
    low: float
    high: float
    n: int


def style(index: int) -> Style:
    """The look of the line number `index` of a plot."""
    return COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]


def roc(labels: ArrayLike, scores: ArrayLike, title: str = "ROC", synthetic: bool = False) -> Figure:
    """Receiver operating characteristic of one binary label; scores grow with the label."""
    from sklearn.metrics import roc_auc_score, roc_curve

    false, true, _ = roc_curve(labels, scores)
    figure, axes = _figure(title, synthetic)
    axes.plot(false, true, color=COLOURS[0], linewidth=2, label=f"AUROC {roc_auc_score(labels, scores):.3f}")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="chance 0.500")
    _unit(axes, "False positive rate (1 - specificity)", "True positive rate (sensitivity)")
    axes.legend(loc="lower right", frameon=False)
    return figure


def precision_recall(
    labels: ArrayLike, scores: ArrayLike, title: str = "Precision and recall", synthetic: bool = False
) -> Figure:
    """Precision over recall, with the prevalence, which an uninformed classifier reaches."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    truth = np.asarray(labels)
    precision, recall, _ = precision_recall_curve(truth, scores)
    figure, axes = _figure(title, synthetic)
    axes.step(
        recall,
        precision,
        where="post",
        color=COLOURS[0],
        linewidth=2,
        label=f"AUPRC {average_precision_score(truth, scores):.3f}",
    )
    axes.axhline(truth.mean(), color=GREY, linewidth=1, linestyle="--", label=f"prevalence {truth.mean():.3f}")
    _unit(axes, "Recall (sensitivity)", "Precision (positive predictive value)")
    axes.legend(loc="best", frameon=False)
    return figure


def calibration(
    labels: ArrayLike,
    probabilities: ArrayLike,
    bins: int = 10,
    title: str = "Calibration",
    synthetic: bool = False,
) -> Figure:
    """Observed frequency over predicted probability in bins of equal size, with Wilson's 95% CIs."""
    found = calibration_bins(labels, probabilities, bins)
    size = sum(one.n for one in found) // max(len(found), 1)
    return calibrations({f"{len(found)} bins of about {size}, 95% CI": found}, title, synthetic)


def calibration_bins(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> list[CalibrationBin]:
    """Bins of equal size by predicted probability [N] of the binary label [N], with Wilson's 95% CIs."""
    truth, predicted = np.asarray(labels, float), np.asarray(probabilities, float)
    order = np.argsort(predicted, kind="stable")
    groups = [group for group in np.array_split(order, bins) if len(group)]
    rate = np.array([truth[group].mean() for group in groups])
    low, high = wilson(rate, np.array([len(group) for group in groups]))
    return [
        CalibrationBin(float(predicted[group].mean()), float(rate[k]), float(low[k]), float(high[k]), len(group))
        for k, group in enumerate(groups)
    ]


def calibrations(
    curves: Mapping[str, Sequence[CalibrationBin]],
    title: str = "Calibration",
    synthetic: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Observed frequency over predicted probability of several models, with 95% CIs where there is one."""
    figure, axes = _figure(title, synthetic)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    for name, (colour, line), bins in _styled(curves, styles):
        x, y = [one.predicted for one in bins], [one.observed for one in bins]
        axes.plot(x, y, color=colour, linestyle=line, marker="o", markersize=5, label=name)
        if len(curves) == 1:
            low, high = (
                [max(one.observed - one.low, 0) for one in bins],
                [max(one.high - one.observed, 0) for one in bins],
            )
            axes.errorbar(x, y, yerr=[low, high], color=colour, linestyle="", capsize=3)
    _unit(axes, "Predicted probability", "Observed frequency")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def decision(curve: Sequence[NetBenefit], title: str = "Decision curve", synthetic: bool = False) -> Figure:
    """Net benefit over the threshold, with 95% CIs, next to acting on everybody and on nobody."""
    banded = all(row.model.low is not None for row in curve)
    return decisions({"model" if banded else "model (too few patients for intervals)": curve}, title, synthetic)


def decisions(
    curves: Mapping[str, Sequence[NetBenefit]],
    title: str = "Decision curves",
    synthetic: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """Net benefit of several models on the same rows over the threshold, with 95% CIs where there is one model, next to
    acting on everybody and on nobody."""
    figure, axes = _figure(title, synthetic)
    top = 0.0
    for name, (colour, line), curve in _styled(curves, styles):
        at, benefit = [row.threshold for row in curve], np.array([row.model.value for row in curve], dtype=np.float64)
        axes.plot(at, benefit, color=colour, linestyle=line, linewidth=2, marker="o", markersize=5, label=name)
        if len(curves) == 1 and all(row.model.low is not None for row in curve):
            low, high = ([getattr(row.model, end) for row in curve] for end in ("low", "high"))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        top = max(top, float(benefit.max()))
    for first in list(curves.values())[:1]:
        at, everybody = [row.threshold for row in first], [row.everybody for row in first]
        axes.plot(at, everybody, color=GREY, linestyle="--", label="act on everybody")
    axes.axhline(0, color=GREY, linewidth=1, label="act on nobody")
    axes.set_ylim(-0.05, max(0.05, 1.2 * top))
    axes.set_xlabel("Threshold probability")
    axes.set_ylabel("Net benefit a row")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
    return figure


def confusion(matrix: ArrayLike, classes: Sequence[str], title: str = "Confusion", synthetic: bool = False) -> Figure:
    """Counts, and fractions of each true class; `matrix[true, predicted]`."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(4.5, 1.1 * len(classes) + 2)
    figure, axes = _figure(title, synthetic, (size + 2.2, size))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        axes.text(
            column,
            row,
            f"{shares[row, column]:.0%}\n{count:,}",
            ha="center",
            va="center",
            color="white" if shares[row, column] > 0.55 else "black",
        )
    axes.set_xticks(range(len(classes)), classes, rotation=30 if len(classes) > 3 else 0)
    axes.set_yticks(range(len(classes)), [f"{c}\n(n={n:,})" for c, n in zip(classes, counts.sum(axis=1), strict=True)])
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.046, label="Share of the true class")
    return figure


def agreement(
    truth: ArrayLike, predicted: ArrayLike, quantity: str, title: str = "", synthetic: bool = False
) -> Figure:
    """Predicted against true values [N] of a quantity, with the line where they agree."""
    figure, axes = _figure(title, synthetic)
    x, y = np.asarray(truth), np.asarray(predicted)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1)
    axes.scatter(x, y, color=COLOURS[0], s=18)
    _label(axes, f"true {quantity}", f"predicted {quantity}")
    return figure


def attribution(
    matrix: ArrayLike, names: Sequence[str], title: str = "Attribution", signed: bool = True, synthetic: bool = False
) -> Figure:
    """Features by hours, matrix[feature, hour], the largest at the top; `signed`: blue lowers, red raises."""
    values = np.asarray(matrix)
    order = np.argsort(-np.abs(values).sum(axis=1))[:20]
    shown, top = values[order], float(np.abs(values[order]).max()) or 1.0
    figure, axes = _figure(title, synthetic, (7.5, 6.5))
    image = axes.imshow(shown, aspect="auto", cmap="RdBu_r" if signed else "Reds", vmin=-top if signed else 0, vmax=top)
    axes.set_yticks(range(len(order)), [names[k] for k in order])
    axes.set_xlabel("Hour of the window")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.046, label="Share of the logit" if signed else "Mean share, either way")
    return figure


def error_maps(
    x: ArrayLike, y: ArrayLike, error: ArrayLike, names: Sequence[str], axes_names: tuple[str, str], title: str
) -> Figure:
    """Mean of `error` [N, outputs] over a 12 x 12 grid of the plane of x and y [N], one panel per output in `names`."""
    x, y, error = np.asarray(x), np.asarray(y), np.asarray(error)
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.3 * rows + 0.5), layout="constrained")
    figure.suptitle(f"Mean absolute error in standard deviations, {title} (synthetic)")
    edges = [np.linspace(v.min(), v.max(), 13) for v in (x, y)]
    count = np.histogram2d(x, y, bins=edges)[0]
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, name, values in zip(grid.flat, names, error.T, strict=False):
        with np.errstate(invalid="ignore"):
            mean = np.histogram2d(x, y, bins=edges, weights=values)[0] / count
        image = panel.pcolormesh(*edges, mean.T, cmap="viridis", vmin=0)
        panel.set_title(name, fontsize=8)
        figure.colorbar(image, ax=panel).ax.tick_params(labelsize=6)
    for panel in list(grid.flat)[len(names) :]:
        panel.set_visible(False)
    figure.supxlabel(axes_names[0], fontsize=9)
    figure.supylabel(axes_names[1], fontsize=9)
    return figure


def learning(
    curves: Mapping[str, Curve],
    metric: str,
    title: str = "",
    synthetic: bool = False,
    styles: Mapping[str, Style] | None = None,
) -> Figure:
    """One metric of several runs over steps."""
    figure, axes = _figure(title or metric, synthetic, (7, 4.2))
    for name, (colour, line), (steps, values) in _styled(curves, styles):
        axes.plot(
            steps,
            values,
            color=colour,
            linestyle=line,
            linewidth=1.8,
            marker="o" if len(steps) < 3 else None,
            label=name,
        )
    _label(axes, "Step", metric)
    if len(curves) > 6 or any(len(name) > 32 for name in curves):  # no room next to the lines
        figure.legend(loc="outside lower left", ncols=1 if len(curves) <= 4 else 2, frameon=False, fontsize=8)
    elif curves:
        axes.legend(frameon=False, fontsize=9)
    return figure


def lines(curves: Mapping[str, Curve], x: str, y: str, title: str, synthetic: bool = False) -> Figure:
    """Named curves over a quantity `x`, each point marked."""
    figure, axes = _figure(title, synthetic, (6.4, 4.0))
    for index, (name, (places, values)) in enumerate(curves.items()):
        axes.plot(places, values, color=COLOURS[index % len(COLOURS)], linewidth=1.8, marker="o", label=name)
    _label(axes, x, y)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)
    return figure


def forest(
    names: Sequence[str],
    values: Sequence[float],
    lows: Sequence[float | None],
    highs: Sequence[float | None],
    score: str,
    title: str = "",
    synthetic: bool = False,
    splits: Sequence[str] | None = None,
    colours: Sequence[str] | None = None,
) -> Figure:
    """A score of several runs with its interval, one line each, the first on top.

    A run without an interval is an open mark: its place is known, its uncertainty is not. Scores of "val" in `splits`,
    which were used to choose, are diamonds; without `colours` of the runs they are orange.
    """
    labels = [fill(name, NAME_WIDTH) for name in names]
    lines = max((label.count("\n") for label in labels), default=0) + 1
    size = (8.6, 1.3 + (0.17 + 0.15 * lines) * len(names))
    figure, axes = _figure(title or score, synthetic, size)
    marked = splits or ["test"] * len(names)
    by_split = [COLOURS[1] if split == "val" else COLOURS[0] for split in marked]
    for row, (value, low, high, split) in enumerate(zip(values, lows, highs, marked, strict=True)):
        colour, marker = (colours or by_split)[row], "D" if split == "val" else "o"
        known = low is not None and high is not None
        if low is not None and high is not None:
            axes.plot([low, high], [row, row], color=colour, linewidth=1.8, marker="|", markersize=8)
        axes.plot(value, row, marker=marker, color=colour, markersize=6, markerfacecolor=colour if known else "white")
        text = str(Score(value=value, low=low, high=high, why=None if known else "no interval"))
        axes.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, min_n_ticks=3))
    axes.set_xlabel(f"{score}, 95% CI")
    axes.grid(axis="x", alpha=0.25)
    if "val" in marked:
        for label, colour, marker in (("test", COLOURS[0], "o"), ("val, used to choose", COLOURS[1], "D")):
            axes.plot([], [], marker=marker, color=GREY if colours else colour, linestyle="", label=label)
        figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def search(
    parameters: Mapping[str, Sequence[Any]],
    scores: Sequence[float],
    stopped: Sequence[bool],
    score: str,
    synthetic: bool = False,
) -> Figure:
    """The score of every trial over each parameter searched; stopped trials are crosses."""
    columns = min(4, max(1, len(parameters)))
    rows = max(1, -(-len(parameters) // columns))
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.5 * rows + 0.6), layout="constrained")
    figure.suptitle(_title(f"{len(scores)} trials", synthetic), fontsize=12)
    grid = np.asarray(figure.subplots(rows, columns, squeeze=False, sharey=True))
    result, early = np.asarray(scores, float), np.asarray(stopped, bool)
    for spare in grid.flat[len(parameters) :]:
        spare.set_visible(False)
    for index, (axes, (name, raw)) in enumerate(zip(grid.flat, parameters.items(), strict=False)):
        numbers = _numbers(raw)
        if numbers is None:
            kinds = sorted({str(value) for value in raw})
            places = np.array([kinds.index(str(value)) for value in raw], float)
            axes.set_xticks(range(len(kinds)), kinds, rotation=20 if len(kinds) > 3 else 0)
            axes.set_xlim(-0.5, len(kinds) - 0.5)
        else:
            places = numbers
            if places.min() > 0 and places.max() / places.min() >= LOG_RANGE:
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.scatter(places[~early], result[~early], color=COLOURS[0], s=28, alpha=0.8, label="finished")
        axes.scatter(places[early], result[early], color=COLOURS[1], s=28, alpha=0.8, marker="x", label="stopped early")
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
        _open(axes)
        if index % columns == 0:
            axes.set_ylabel(score)
    if early.any():
        grid.flat[0].legend(frameon=False, fontsize=8)
    return figure


def history(
    scores: Sequence[float], stopped: Sequence[bool], score: str, lower: bool, synthetic: bool = False
) -> Figure:
    """The score of every trial in the order in which they began, and the best so far; `lower`: less is better."""
    figure, axes = _figure(f"History of {len(scores)} trials", synthetic, (5.6, 3.6))
    numbers, values, early = np.arange(len(scores)), np.asarray(scores, float), np.asarray(stopped, bool)
    best = np.minimum.accumulate(values) if lower else np.maximum.accumulate(values)
    axes.step(numbers, best, where="post", color=GREY, linewidth=1.5, label="best so far")
    axes.scatter(numbers[~early], values[~early], color=COLOURS[0], s=28, alpha=0.8, label="finished")
    if early.any():
        axes.scatter(
            numbers[early], values[early], color=COLOURS[1], s=28, alpha=0.8, marker="x", label="stopped early"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes, "Trial", score)
    axes.legend(frameon=False, fontsize=9)
    return figure


def importance(shares: Mapping[str, float], score: str, synthetic: bool = False) -> Figure:
    """The share of each parameter in the variance of a score between trials, the largest on top."""
    figure, axes = _figure(f"Importance for {score}", synthetic, (5.6, 1.4 + 0.36 * len(shares)))
    names = sorted(shares, key=lambda name: -shares[name])
    axes.barh(names, [shares[name] for name in names], color=COLOURS[0], height=0.6)
    for row, name in enumerate(names):
        axes.annotate(f"{shares[name]:.2f}", (shares[name], row), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="Share of the variance (fANOVA)")
    return figure


def sheet(
    pictures: Sequence[ArrayLike] | np.ndarray,
    maps: Sequence[ArrayLike] | np.ndarray,
    captions: Sequence[str],
    box: tuple[int, int, int, int] | None,
    columns: int,
    title: str,
    synthetic: bool = False,
) -> Figure:
    """Grey `pictures` [N][H, W] (0 to 1) with heat `maps` [N][H, W] (0 to 1) over them, captioned, `columns` per row;
    `box` (left, top, right, bottom; px) is drawn on each if given."""
    from matplotlib.patches import Rectangle

    rows = max(1, -(-len(pictures) // columns))
    figure = Figure(figsize=(1.9 * columns + 0.2, 2.3 * rows + 0.6), layout="constrained")
    figure.suptitle(_title(title, synthetic), fontsize=11)
    grid = np.asarray(figure.subplots(rows, columns, squeeze=False))
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, heat, caption in zip(grid.flat, pictures, maps, captions, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.55 * np.asarray(heat))
        if box is not None:
            left, top, right, bottom = box
            frame = Rectangle((left, top), right - left, bottom - top, fill=False, color=COLOURS[5], linewidth=0.8)
            axes.add_patch(frame)
        axes.set_title(caption, fontsize=7)
    return figure


def wilson(rate: ArrayLike, count: ArrayLike, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a proportion `rate` seen in `count` cases; also accurate near 0 and 1."""
    p, n = np.asarray(rate, float), np.asarray(count, float)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def _styled(curves: Mapping[str, T], styles: Mapping[str, Style] | None) -> Iterator[tuple[str, Style, T]]:
    for index, (name, curve) in enumerate(curves.items()):
        yield name, (styles or {}).get(name) or style(index), curve


def _figure(title: str, synthetic: bool, size: tuple[float, float] = (5.2, 4.8)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_title(title, synthetic), fontsize=12)
    _open(axes)
    return figure, axes


def _title(title: str, synthetic: bool) -> str:
    return f"{title} - SYNTHETIC DATA" if synthetic else title


def _open(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)


def _unit(axes: Axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _label(axes, x, y)


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    try:
        return np.array([float(value) for value in values])
    except (TypeError, ValueError):
        return None
