"""Points of a sweep: a design over the unit cube, mapped through distributions. Any range of rows can be computed
alone.

    uniform(low,high)  loguniform(low,high)  normal(mean,sd,low,high)  lognormal(median,log_sd,low,high)

The last two are truncated to [low, high]. A plain number is that value in every row.
"""

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import UsageError, unknown

Floats = NDArray[np.float64]

ARGUMENTS = {"uniform": 2, "loguniform": 2, "normal": 4, "lognormal": 4}
DESIGNS = ("sobol", "lhs", "grid")
GRID_POINTS = 10**9


def distribution(name: str, text: str) -> tuple[str, tuple[float, ...]]:
    """`normal(.2,.1,0,.5)` as ("normal", (.2, .1, 0, .5)), a number as ("fixed", (number,)). Raises UsageError for
    anything else.

    `name` is the input that it is for; only the messages need it.
    """
    match = re.fullmatch(r"\s*(?:(\w+)\s*\((.*)\)|([^()]+))\s*", text)
    example = f"for example {name}=uniform(0.1,0.4), normal(0.2,0.1,0,0.5), or one number"
    if not match:
        raise UsageError(f"{name}={text} is neither a number nor a distribution", do=example)
    kind, inside, alone = match.groups()
    try:
        values = tuple(float(part) for part in (alone if kind is None else inside).split(","))
    except ValueError as error:
        raise UsageError(f"{name}={text} contains something that is not a number", do=example) from error
    if kind is None:
        kind = "fixed"
    elif kind not in ARGUMENTS:
        raise unknown("distribution", kind, ARGUMENTS)
    if len(values) != ARGUMENTS.get(kind, 1) or not all(map(math.isfinite, values)):
        raise UsageError(f"{name}={text}: {kind} takes {ARGUMENTS.get(kind, 1)} finite numbers", do=example)
    low, high = values[-2:] if kind != "fixed" else (values[0], values[0])
    if low > high or (kind != "fixed" and low == high):
        raise UsageError(f"{name}={text}: the lower bound must come first", do=example)
    if kind in {"normal", "lognormal"} and not values[1] > 0:
        raise UsageError(f"{name}={text}: the standard deviation must be above 0", do=example)
    if (kind == "loguniform" and low <= 0) or (kind == "lognormal" and (low <= 0 or values[0] <= 0)):
        raise UsageError(f"{name}={text}: {kind} needs values above 0", do=example)
    return kind, values


def bounds(kind: str, values: tuple[float, ...]) -> tuple[float, float]:
    return (values[0], values[0]) if kind == "fixed" else (values[-2], values[-1])


def bend(unit: Floats, kind: str, values: tuple[float, ...]) -> Floats:
    """Quantiles of the distribution at `unit` (0 to 1)."""
    if kind == "uniform":
        low, high = values
        return low + unit * (high - low)
    if kind == "loguniform":
        low, high = values
        return np.asarray(np.clip(low * (high / low) ** unit, low, high))
    middle, sd, low, high = values
    if kind == "lognormal":
        return np.asarray(np.exp(bend(unit, "normal", (math.log(middle), sd, math.log(low), math.log(high)))))
    from scipy.special import ndtr, ndtri

    inside = ndtr((np.array([low, high]) - middle) / sd)
    return np.asarray(np.clip(middle + sd * ndtri(inside[0] + unit * (inside[1] - inside[0])), low, high))


def count(design: str, size: int, varied: int) -> int:
    """Number of rows of a design: `size`; for a grid, `size` levels of each of the `varied` inputs."""
    if design not in DESIGNS:
        raise unknown("design", design, DESIGNS)
    rows = size**varied if design == "grid" else size
    if rows > GRID_POINTS:
        raise UsageError(
            f"the {design} has {rows:.3g} points", f"{size} levels of {varied} inputs", "vary fewer inputs"
        )
    return rows


def unit_points(design: str, size: int, dimensions: int, seed: int, start: int, stop: int) -> Floats:
    """Rows start to stop of the design in the unit cube, [stop - start, dimensions]: independent of the range.

    sobol  scrambled by `seed` (balanced when the size is a power of 2)
    lhs    Latin hypercube: every input has one point in each of `size` slices
    grid   `size` levels of each input, ends included; the last input changes fastest
    """
    if dimensions == 0 or start == stop:
        return np.zeros((stop - start, dimensions))
    if design == "sobol":
        from scipy.stats import qmc  # 0.7 s of CPU to import, which workers that train do without

        sobol = qmc.Sobol(dimensions, scramble=True, rng=np.random.default_rng([seed, 1]))
        if start:  # fast_forward(0) overflows
            sobol.fast_forward(start)
        with warnings.catch_warnings():  # about sizes that are not a power of 2, see above
            warnings.simplefilter("ignore", UserWarning)
            return np.asarray(sobol.random(stop - start), dtype=np.float64)
    if design == "lhs":
        points = np.empty((stop - start, dimensions))
        for i in range(dimensions):
            rng = np.random.default_rng([seed, 2, i])
            slices = rng.permutation(size)[start:stop]
            points[:, i] = (slices + rng.random(size)[start:stop]) / size
        return points
    index = np.arange(start, stop)
    levels = np.stack(np.unravel_index(index, (size,) * dimensions), axis=1)
    return np.asarray(levels / max(1, size - 1), dtype=np.float64)


def points(inputs: Mapping[str, str], design: str, size: int, seed: int, start: int, stop: int) -> dict[str, Any]:
    """{input: value, or float64 [stop - start] if it varies} of rows start to stop."""
    known = {name: distribution(name, text) for name, text in inputs.items()}
    varied = [name for name, (kind, _) in known.items() if kind != "fixed"]
    unit = unit_points(design, size, len(varied), seed, start, stop)
    found: dict[str, Any] = {name: values[0] for name, (kind, values) in known.items() if kind == "fixed"}
    return found | {name: bend(unit[:, i], *known[name]) for i, name in enumerate(varied)}
