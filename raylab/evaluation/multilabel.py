"""Scores of multi-labels: each row has any number of K classes.

Weighted as in metrics.py: `w[R, N]` holds the weights of N rows in R resamples. A class counts if some row has it and
some row lacks it; in a resample without such rows the means are NaN.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.errors import DataError
from raylab.evaluation.intervals import Bools, Floats, WeightedScores, clustered, clustered_difference
from raylab.evaluation.metrics import rank_rows
from raylab.score import Score

THRESHOLD = 0.5  # probability from which a class is called
NO_CLASS = "no class is both in some rows and absent from others"


def scores(
    y: NDArray[Any],
    p: NDArray[Any],
    group: NDArray[Any],
    classes: Sequence[str],
    bootstraps: int,
    seed: int,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return scores of the probabilities p[N, K] of y[N, K] in {0, 1}, with intervals clustered by group[N].

    map          mean over classes of the average precision, ties grouped (as auprc in metrics.py)
    macro_f1     mean over classes of the F1 of what is called from THRESHOLD on
    micro_f1     F1 over all classes together
    ap/<class>   average precision of a class
    """
    y_NK, p_NK = _check(y, p, classes)
    weigh, strata = _weigh(y_NK, p_NK, classes), _strata(y_NK, classes)
    whole = clustered(weigh, group, bootstraps, seed, dict.fromkeys(("map", "macro_f1"), NO_CLASS), strata, unit)
    out = {name: whole[name] for name in ("map", "macro_f1", "micro_f1")}
    for k in _present(y_NK):  # a rare class does not take the others' intervals
        one = [classes[k]]
        own, of_one = _weigh_ap(y_NK[:, [k]], p_NK[:, [k]], one), _strata(y_NK[:, [k]], one)
        out |= clustered(own, group, bootstraps, seed, {}, of_one, unit)
    if absent := [name for k, name in enumerate(classes) if k not in _present(y_NK)]:
        note = f"over {len(classes) - len(absent)} classes; the others are in no row, or in all: {', '.join(absent)}"
        out |= {name: out[name].model_copy(update={"note": note}) for name in ("map", "macro_f1")}
    return out


def point(y: NDArray[Any], p: NDArray[Any]) -> dict[str, float]:
    """Return map, macro_f1 and micro_f1 without intervals, independent of the order of the rows."""
    y_NK, p_NK = _check(y, p, [str(k) for k in range(np.shape(y)[1])])
    found = _weigh(y_NK, p_NK, [str(k) for k in range(y_NK.shape[1])])(np.ones((1, len(y_NK))))
    means = {name: float(found[name][0]) for name in ("map", "macro_f1", "micro_f1")}
    return {name: value for name, value in means.items() if np.isfinite(value)}


def differences(
    y: NDArray[Any],
    p_a: NDArray[Any],
    p_b: NDArray[Any],
    group: NDArray[Any],
    classes: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return map, macro_f1 and micro_f1 of a minus those of b on the same rows, over shared resamples."""
    y_NK, a_NK = _check(y, p_a, classes)
    b_NK = _check(y, p_b, classes)[1]
    of_a, of_b = _weigh(y_NK, a_NK, classes), _weigh(y_NK, b_NK, classes)
    why = dict.fromkeys(("map", "macro_f1"), NO_CLASS)
    return clustered_difference(of_a, of_b, group, bootstraps, seed, why, _strata(y_NK, classes), unit)


def counts(y: NDArray[Any], p: NDArray[Any], classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return for each class how many rows have it, how many are called so, and how many of these have it."""
    y_NK, p_NK = _check(y, p, classes)
    called = p_NK >= THRESHOLD
    return {
        name: {
            "rows": int(y_NK[:, k].sum()),
            "called": int(called[:, k].sum()),
            "right": int((called[:, k] & (y_NK[:, k] == 1)).sum()),
        }
        for k, name in enumerate(classes)
    }


def _weigh(y_NK: Floats, p_NK: Floats, classes: Sequence[str]) -> WeightedScores:
    present = _present(y_NK)
    average_precision = _weigh_ap(y_NK[:, present], p_NK[:, present], [classes[k] for k in present])
    called_NK = (p_NK >= THRESHOLD).astype(np.float64)
    right_NK = called_NK * y_NK

    def weighted(w: Floats) -> dict[str, Floats]:
        rows, called, right = w @ y_NK, w @ called_NK, w @ right_NK
        undefined = np.full(len(w), np.nan)
        aps = list(average_precision(w).values())
        f1 = _f1(rows, called, right)[:, present]
        return {
            "map": np.mean(aps, axis=0) if aps else undefined,
            "macro_f1": np.where(rows[:, present] > 0, f1, np.nan).mean(axis=1) if present else undefined,
            "micro_f1": _f1(rows.sum(axis=1), called.sum(axis=1), right.sum(axis=1)),
        }

    return weighted


def _weigh_ap(y_NK: Floats, p_NK: Floats, classes: Sequence[str]) -> WeightedScores:
    ranked = [rank_rows(y_NK[:, k].astype(np.int64), p_NK[:, k]) for k in range(len(classes))]

    def weighted(w: Floats) -> dict[str, Floats]:
        return {f"ap/{name}": of(w)["auprc"] for name, of in zip(classes, ranked, strict=True)}

    return weighted


def _f1(rows: Floats, called: Floats, right: Floats) -> Floats:
    """Return 2 x right / (rows + called); 0 where nothing is there and nothing is called."""
    f1: Floats = 2 * right / np.maximum(rows + called, 1)
    return f1


def _present(y_NK: Floats) -> list[int]:
    means = y_NK.mean(axis=0)
    return np.flatnonzero((means > 0) & (means < 1)).tolist()


def _strata(y_NK: Floats, classes: Sequence[str]) -> dict[str, Bools]:
    return {f"with {classes[k]}": y_NK[:, k] == 1 for k in _present(y_NK)}


def _check(y: NDArray[Any], p: NDArray[Any], classes: Sequence[str]) -> tuple[Floats, Floats]:
    y_NK, p_NK = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if y_NK.ndim != 2 or y_NK.shape != p_NK.shape or y_NK.shape[1] != len(classes) or len(y_NK) == 0:
        raise DataError(f"y has the shape {y_NK.shape}, p {p_NK.shape}, for {len(classes)} classes")
    if not np.isin(y_NK, (0, 1)).all():
        raise DataError("y has values other than 0 and 1", "a row has a class or not")
    if not ((p_NK >= 0) & (p_NK <= 1)).all():  # false for NaN too
        raise DataError("p has values that are not probabilities", do="check how this prediction failed")
    return y_NK, p_NK
