"""Scores over gathered predictions, each with a 95 % interval clustered by patient.

Everything is a weighted computation: `w[R, N]` holds the weight of N rows in R resamples (intervals.py), and a
score is a value[R], NaN where it is undefined. Weights are whole numbers, so sums of them are exact in float64
and ties are exact. Names carry shapes: R resamples, N rows, K classes, U distinct probabilities.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylab.errors import DataError, unknown
from raylab.evaluation.intervals import Bools, Floats, clustered, proportion, wilson
from raylab.score import Score

__all__ = [
    "binary_point",
    "binary_scores",
    "calibration_fit",
    "confusion",
    "confusion_by",
    "multiclass_point",
    "multiclass_scores",
    "paired_difference",
    "regression_point",
    "regression_scores",
    "wilson",
]

Ints = NDArray[np.int64]

LOGIT_CLIP = 1e-6  # probabilities of 0 and 1 have no logit: the calibration fits see 1e-6 and 1 - 1e-6
ECE_BINS = 15
ONE_CLASS = "only one class in the data"


def binary_scores(
    y: ArrayLike, p: ArrayLike, group: ArrayLike, bootstraps: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Discrimination and calibration of the probabilities p[N] of y[N] in {0, 1}, for the patients group[N].

    auroc                        ties count half (midranks)
    auprc                        average precision, ties grouped: the sum over thresholds of precision x gained recall
    prevalence                   what auprc is of a guess; its interval is Wilson's
    brier, brier_scaled          mean (p - y)^2; 1 - brier / (prevalence (1 - prevalence))
    calibration_slope            b of the fit y ~ a + b logit(p); 1 is calibrated, below 1 overconfident
    calibration_intercept        a of y ~ a + logit(p), calibration in the large; 0 is calibrated
    sensitivity_at_specificity_90  the largest over thresholds with a specificity of at least .9
    ppv_at_sensitivity_80        at the highest threshold with a sensitivity of at least .8

    (Steyerberg 2010, Epidemiology 21:128; calibration: Cox 1958, Biometrika 45:562.)
    """
    y_N, p_N = _binary_inputs(y, p)
    group_N = _rows("group", group, len(y_N))
    order = _from_highest(y_N, p_N)  # once, here: the weights of each resample are then gathered in this order
    y_N, p_N, group_N = y_N[order], p_N[order], group_N[order]
    logit_N = _logit(p_N)
    # fits of resamples start at the fit of the data, two or three Newton steps away
    whole = np.ones((1, len(y_N)))
    start = {free: _calibration(y_N, logit_N, whole, free_slope=free)[0] for free in (True, False)}

    def scores(w: Floats) -> dict[str, Floats]:
        slope = _calibration(y_N, logit_N, w, free_slope=True, start=start[True])[:, 1]
        intercept = _calibration(y_N, logit_N, w, free_slope=False, start=start[False])[:, 0]
        found = _ranking(y_N, p_N, w) | _brier(y_N, p_N, w)
        del found["prevalence"]  # a proportion, below
        return found | {"calibration_slope": slope, "calibration_intercept": intercept}

    if 0 < y_N.sum() < len(y_N):
        why = {"calibration_slope": "no finite slope: p separates the classes, or nearly, or is constant"}
    else:
        why = dict.fromkeys(scores(whole), ONE_CLASS)
    found = clustered(scores, group_N, bootstraps, seed, why, outcomes(y_N))
    return {**found, "prevalence": proportion(y_N, np.ones(len(y_N)), group_N, "")}


def outcomes(y: NDArray[Any]) -> dict[str, Bools]:
    """The strata of a binary outcome, for `clustered`."""
    return {"with the outcome": y == 1, "without it": y == 0}


def multiclass_scores(
    y: ArrayLike,
    p: ArrayLike,
    group: ArrayLike,
    classes: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
) -> dict[str, Score]:
    """Scores of the probabilities p[N, K] of y[N] in 0..K-1, named by classes[K]; the largest p is the prediction.

    macro_recall, accuracy, sensitivity/<class>, ppv/<class>; the last three are proportions, with Wilson's interval
    auroc    one class against the rest, averaged over classes
    brier    mean over rows of the sum over classes of (p - truth)^2 (Brier 1950: 0 to 2)
    ece      |accuracy - confidence| over 15 bins of confidence, (low, high] (Guo 2017, arXiv 1706.04599)

    A class without rows has no sensitivity, and averages are over the others (with a `note`).
    """
    y_N, p_NK = _multiclass_inputs(y, p)
    N, K = p_NK.shape
    if len(classes) != K or len(set(classes)) != K:
        raise DataError(f"classes = {list(classes)}", f"p has {K} columns", "give one distinct name a column")
    group_N = _rows("group", group, N)

    called_N = p_NK.argmax(axis=1)
    confidence_N = p_NK.max(axis=1)
    hit_N = called_N == y_N
    bin_N = np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps_NB = np.eye(ECE_BINS)[bin_N] * (hit_N - confidence_N)[:, None]
    square_N = ((p_NK - np.eye(K)[y_N]) ** 2).sum(axis=1)
    present = np.unique(y_N).tolist()
    rankings = [(k, _from_highest(y_N == k, p_NK[:, k])) for k in present]

    def scores(w: Floats) -> dict[str, Floats]:
        total = w.sum(axis=1)
        aurocs = [_auroc((y_N == k)[order], p_NK[order, k], w[:, order]) for k, order in rankings]
        return {
            "macro_recall": _macro_recall(y_N, p_NK, w),
            "auroc": np.mean(aurocs, axis=0),
            "brier": _weighted_sum(w, square_N) / total,
            "ece": np.abs(w @ gaps_NB).sum(axis=1) / total,
        }

    strata = {f"of class {classes[k]}": y_N == k for k in present}
    found = clustered(scores, group_N, bootstraps, seed, {"auroc": ONE_CLASS}, strata)
    out = {"macro_recall": found.pop("macro_recall")}
    out |= {"accuracy": proportion(hit_N, np.ones(N), group_N, ""), **found}
    for k, name in enumerate(classes):
        right_N = hit_N & (y_N == k)
        out[f"sensitivity/{name}"] = proportion(right_N, y_N == k, group_N, f"no row of class {name}")
        out[f"ppv/{name}"] = proportion(right_N, called_N == k, group_N, f"class {name} was never predicted")
    if len(present) < K:
        absent = ", ".join(name for k, name in enumerate(classes) if k not in present)
        note = f"over {', '.join(classes[k] for k in present)}; no rows of {absent}"
        out |= {name: out[name].model_copy(update={"note": note}) for name in ("macro_recall", "auroc")}
    return out


def confusion(y: ArrayLike, p: ArrayLike) -> list[list[int]]:
    """[K, K] counts, truth in rows and the largest p[N, K] in columns."""
    y_N, p_NK = _multiclass_inputs(y, p)
    K = p_NK.shape[1]
    return np.bincount(y_N * K + p_NK.argmax(axis=1), minlength=K * K).reshape(K, K).tolist()


def confusion_by(strata: ArrayLike, y: ArrayLike, p: ArrayLike) -> dict[str, list[list[int]]]:
    """The confusion of the rows of each value of strata[N]."""
    y_N, p_NK, strata_N = np.asarray(y), np.asarray(p), _rows("strata", strata, len(np.asarray(y)))
    return {str(one): confusion(y_N[strata_N == one], p_NK[strata_N == one]) for one in np.unique(strata_N)}


def regression_scores(
    y: ArrayLike, p: ArrayLike, group: ArrayLike, names: Sequence[str], bootstraps: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """r2/<output> (1 - squared error / variance), mae/<output> (mean absolute error, in the output's unit), r2_min and
    r2_mean over outputs, of values p[N, K] of y[N, K]."""
    y_NK, p_NK = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if y_NK.shape != p_NK.shape or y_NK.shape[1:] != (len(names),):
        raise DataError(f"y has the shape {y_NK.shape}, p {p_NK.shape}, for {len(names)} outputs")
    error_NK = np.abs(p_NK - y_NK)

    def scores(w: Floats) -> dict[str, Floats]:
        r2_RK = _r2(y_NK, p_NK, w)
        mae_RK = w @ error_NK / w.sum(axis=1)[:, None]
        found = {f"r2/{name}": r2_RK[:, k] for k, name in enumerate(names)}
        found |= {f"mae/{name}": mae_RK[:, k] for k, name in enumerate(names)}
        return {"r2_min": r2_RK.min(axis=1), "r2_mean": r2_RK.mean(axis=1), **found}

    group_N = _rows("group", group, len(y_NK))
    return clustered(scores, group_N, bootstraps, seed, {}, {})


def binary_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """auroc, auprc and brier of p[N] without intervals, for validation in training; what is undefined is left out.

    Like the next two, equal to the last bit whatever the order of the rows.
    """
    y_N, p_N = _binary_inputs(y, p)
    order = _from_highest(y_N, p_N)  # also what makes the sums independent of the order the rows came in
    y_N, p_N, w = y_N[order], p_N[order], np.ones((1, len(y_N)))
    found = _ranking(y_N, p_N, w) | _brier(y_N, p_N, w)
    return _finite({name: found[name] for name in ("auroc", "auprc", "brier")})


def multiclass_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """macro_recall over the classes present, and accuracy, of p[N, K]."""
    y_N, p_NK = _multiclass_inputs(y, p)
    right_N = p_NK.argmax(axis=1) == y_N
    w = np.ones((1, len(y_N)))
    return _finite({"macro_recall": _macro_recall(y_N, p_NK, w), "accuracy": right_N.mean(keepdims=True)})


def regression_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """r2_min and r2_mean over the outputs of y and p[N, K]."""
    y_NK, p_NK = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    order = np.lexsort(y_NK.T)
    r2_K = _r2(y_NK[order], p_NK[order], np.ones((1, len(y_NK))))[0]
    return _finite({"r2_min": r2_K.min(keepdims=True), "r2_mean": r2_K.mean(keepdims=True)})


def _finite(scores: dict[str, Floats]) -> dict[str, float]:
    return {name: float(value[0]) for name, value in scores.items() if np.isfinite(value[0])}


def paired_difference(
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    group: ArrayLike,
    score: Literal["auroc", "macro_recall"] = "auroc",
    bootstraps: int = 1000,
    seed: int = 0,
) -> Score:
    """Score of a minus score of b on the same rows, with the interval over the same resamples of patients.

    "auroc" takes p[N] of a binary task, "macro_recall" p[N, K]; both are the scores that the functions above give.
    """
    of: Callable[[Ints, Floats, Floats], Floats]
    if score == "auroc":
        (y_N, a), (_, b), of = _binary_inputs(y, p_a, "p_a"), _binary_inputs(y, p_b, "p_b"), _auroc_unsorted
    elif score == "macro_recall":
        (y_N, a), (_, b), of = _multiclass_inputs(y, p_a, "p_a"), _multiclass_inputs(y, p_b, "p_b"), _macro_recall
    else:
        raise unknown("score", score, ("auroc", "macro_recall"))
    if a.shape != b.shape:
        raise DataError(f"p_a has the shape {a.shape}, p_b {b.shape}", "a pair is scored on the same rows and classes")
    group_N = _rows("group", group, len(y_N))
    strata = outcomes(y_N) if score == "auroc" else {f"of class {k}": y_N == k for k in np.unique(y_N)}

    def difference(w: Floats) -> dict[str, Floats]:
        return {"difference": of(y_N, a, w) - of(y_N, b, w)}

    return clustered(difference, group_N, bootstraps, seed, {"difference": ONE_CLASS}, strata)["difference"]


def calibration_fit(y: ArrayLike, p: ArrayLike) -> tuple[float, float]:
    """(intercept, slope) of the logistic fit y ~ a + b logit(p); NaN where it does not exist."""
    y_N, p_N = _binary_inputs(y, p)
    order = _from_highest(y_N, p_N)
    intercept, slope = _calibration(y_N[order], _logit(p_N[order]), np.ones((1, len(y_N))), free_slope=True)[0]
    return float(intercept), float(slope)


# The scores


def _ranking(y: NDArray[Any], p: Floats, w: Floats) -> dict[str, Floats]:
    """What the order of p alone decides; rows from the highest p down, w[R, N]."""
    tp_RU, fp_RU = _called(y, p, w)
    positives, negatives = tp_RU[:, -1], fp_RU[:, -1]
    gained_RU = np.diff(tp_RU, prepend=0.0)
    called_RU = np.maximum(tp_RU + fp_RU, 1)  # no weight called: nothing gained, and no 0 / 0
    specific_RU = 10 * fp_RU <= negatives[:, None]  # in whole numbers: .1 has no exact float
    sensitive_R = np.argmax(5 * tp_RU >= 4 * positives[:, None], axis=1)[:, None]
    ppv = np.take_along_axis(tp_RU, sensitive_R, 1) / np.take_along_axis(called_RU, sensitive_R, 1)
    both = (positives > 0) & (negatives > 0)
    return {
        "auroc": _area(tp_RU, fp_RU),
        "auprc": np.where(both, _ratio((gained_RU * tp_RU / called_RU).sum(axis=1), positives), np.nan),
        "prevalence": positives / (positives + negatives),
        "sensitivity_at_specificity_90": np.where(
            both, _ratio(np.max(tp_RU, axis=1, where=specific_RU, initial=0.0), positives), np.nan
        ),
        "ppv_at_sensitivity_80": np.where(both, ppv[:, 0], np.nan),
    }


def _called(y: NDArray[Any], p: Floats, w: Floats) -> tuple[Floats, Floats]:
    """tp[R, U], fp[R, U]: weight of the positives and negatives at or above each distinct p, highest first."""
    all_RN = np.cumsum(w, axis=1)
    tp_RN = np.cumsum(w * y, axis=1)
    last_U = np.flatnonzero(np.append(p[1:] != p[:-1], True))  # equal probabilities are called together
    if len(last_U) < len(p):
        all_RN, tp_RN = all_RN[:, last_U], tp_RN[:, last_U]
    return tp_RN, all_RN - tp_RN


def _area(tp_RU: Floats, fp_RU: Floats) -> Floats:
    """Area under the ROC curve by trapezoids, which is the Mann-Whitney statistic with ties counted half."""
    steps_RU = np.diff(fp_RU, prepend=0.0)
    twice = 2 * (steps_RU * tp_RU).sum(axis=1) - (steps_RU * np.diff(tp_RU, prepend=0.0)).sum(axis=1)
    return _ratio(twice, 2 * tp_RU[:, -1] * fp_RU[:, -1])


def _auroc(y: NDArray[Any], p: Floats, w: Floats) -> Floats:
    return _area(*_called(y, p, w))


def _auroc_unsorted(y: Ints, p: Floats, w: Floats) -> Floats:
    order = _from_highest(y, p)
    return _auroc(y[order], p[order], w[:, order])


def _macro_recall(y: Ints, p_NK: Floats, w: Floats) -> Floats:
    """Mean recall over the classes in y; NaN in a resample that lacks one of them."""
    present = np.unique(y)
    truth_NK = np.equal.outer(y, present).astype(np.float64)
    right_NK = truth_NK * (p_NK.argmax(axis=1) == y)[:, None]
    recall: Floats = _ratio(w @ right_NK, w @ truth_NK).mean(axis=1)
    return recall


def _r2(y_NK: Floats, p_NK: Floats, w: Floats) -> Floats:
    """R2 of each output in each resample, [R, K]; values about their mean, so that the sums keep their digits."""
    y_NK, p_NK = y_NK - y_NK.mean(axis=0), p_NK - y_NK.mean(axis=0)
    n = w.sum(axis=1)[:, None]
    mean_RK = w @ y_NK / n
    variance_RK = w @ y_NK**2 / n - mean_RK**2
    return 1 - _ratio(w @ (p_NK - y_NK) ** 2 / n, variance_RK)


def _brier(y: Ints, p: Floats, w: Floats) -> dict[str, Floats]:
    total = w.sum(axis=1)
    brier = _weighted_sum(w, (p - y) ** 2) / total
    prevalence = _weighted_sum(w, y.astype(np.float64)) / total
    return {"brier": brier, "brier_scaled": 1 - _ratio(brier, prevalence * (1 - prevalence))}


def _calibration(y: Ints, x: Floats, w: Floats, free_slope: bool, start: Floats | None = None) -> Floats:
    """[R, 2]: a and b of the logistic fit y ~ a + b x of each resample (b = 1 unless free); NaN where there is none.

    Rows from the highest x down. The fit exists if both classes are there and, with a free slope, x does not separate
    them (Albert & Anderson 1984, Biometrika 71:1). Newton steps, all resamples at once: a step moves no row's a + b x
    by more than 1 (so near, the likelihood rises: Bach 2010, EJS 4:384, proposition 1), or than half of the largest
    one where that is more, so that steep fits take few steps. What has not settled after 100 is NaN.
    """
    high_1, low_1 = _ends(x[y == 1], w[:, y == 1])
    high_0, low_0 = _ends(x[y == 0], w[:, y == 0])
    exists = (low_1 < high_0) & (low_0 < high_1) if free_slope else ~np.isnan(low_1 + low_0)

    fit = np.full((len(w), 2), np.nan)
    todo = np.flatnonzero(exists)
    if len(todo) < len(w):
        w = w[todo]
    ab = np.tile((0.0, 1.0) if start is None or np.isnan(start).any() else start, (len(todo), 1))
    powers_N3 = np.stack([np.ones_like(x), x, x * x], axis=1)
    target = (w * y) @ powers_N3[:, :2]
    x_ends = x[[0, -1]]
    for _ in range(100):
        if len(todo) == 0:
            break
        mu = np.multiply.outer(ab[:, 1], x)
        mu += ab[:, :1]
        mu *= 0.5
        np.tanh(mu, out=mu)  # the logistic function is (1 + tanh(z / 2)) / 2, and cannot overflow
        mu += 1
        mu *= 0.5
        expected = w * mu
        gradient = target - expected @ powers_N3[:, :2]
        np.subtract(1, mu, out=mu)
        expected *= mu
        h_0, h_1, h_2 = (expected @ powers_N3).T
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            step_b = (gradient[:, 1] - h_1 / h_0 * gradient[:, 0]) / (h_2 - h_1 * h_1 / h_0)
            step_b = step_b if free_slope else np.zeros_like(step_b)
            step = np.stack([(gradient[:, 0] - h_1 * step_b) / h_0, step_b], axis=1)
            moved = np.abs(step[:, :1] + step[:, 1:] * x_ends).max(axis=1)
            reach = np.abs(ab[:, :1] + ab[:, 1:] * x_ends).max(axis=1)
            ab = ab + step / np.maximum(moved / np.maximum(reach / 2, 1), 1)[:, None]
        ab[~np.isfinite(ab).all(axis=1)] = (0.0, 0.0 if free_slope else 1.0)  # too steep to have curvature: from flat
        going = ~(moved < 1e-7)  # Newton is quadratic: what is left then is rounding
        fit[todo[~going]] = ab[~going]
        if not going.all():
            todo, w, ab, target = todo[going], w[going], ab[going], target[going]
    return fit


def _ends(x: Floats, w: Floats) -> tuple[Floats, Floats]:
    """First and last x[N] with a weight in w[R, N]; NaN where no row has one."""
    if len(x) == 0:
        return np.full(len(w), np.nan), np.full(len(w), np.nan)
    drawn = w > 0
    first, last = drawn.argmax(axis=1), len(x) - 1 - drawn[:, ::-1].argmax(axis=1)
    some = drawn.any(axis=1)
    return np.where(some, x[first], np.nan), np.where(some, x[last], np.nan)


# Small tools


def _from_highest(y: NDArray[Any], p: Floats) -> NDArray[np.intp]:
    return np.lexsort((y, -p))


def _logit(p: Floats) -> Floats:
    clipped = np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP)
    logit: Floats = np.log(clipped) - np.log1p(-clipped)
    return logit


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, NaN where bottom is 0."""
    ratio: Floats = np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)
    return ratio


def _weighted_sum(w: Floats, v: Floats) -> Floats:
    """sum over n of w[R, N] v[N] in one fixed order: unlike BLAS, the same whatever the number of threads."""
    total: Floats = np.einsum("rn,n->r", w, v)
    return total


# Checked inputs


def _binary_inputs(y: ArrayLike, p: ArrayLike, name: str = "p") -> tuple[Ints, Floats]:
    p_N = _probabilities(p, name, 1)
    return _labels(y, p_N, name, 2), p_N


def _multiclass_inputs(y: ArrayLike, p: ArrayLike, name: str = "p") -> tuple[Ints, Floats]:
    p_NK = _probabilities(p, name, 2)
    worst = float(np.abs(p_NK.sum(axis=1) - 1).max())
    if worst > 1e-2:  # wide enough for a softmax in half precision
        raise DataError(f"rows of {name} do not add up to 1", f"one is off by {worst:.3g}", "give softmax outputs")
    return _labels(y, p_NK, name, p_NK.shape[1]), p_NK


def _probabilities(p: ArrayLike, name: str, dimensions: int) -> Floats:
    out = np.asarray(p, dtype=np.float64)
    if out.ndim != dimensions or out.size == 0:
        form = "[N]" if dimensions == 1 else "[N, K]"
        raise DataError(f"{name} has the shape {out.shape}", f"the score takes {name}{form}, with at least one row")
    for bad, what in ((np.isnan(out), "NaN"), ((out < 0) | (out > 1), "outside 0..1")):
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            raise DataError(
                f"{name} is {what} in {int(bad.sum())} of {bad.size} places, first in row {row}",
                "scores are of probabilities",
                "give sigmoid or softmax outputs, and look for the prediction that failed",
            )
    return out


def _labels(y: ArrayLike, p: Floats, name: str, K: int) -> Ints:
    out = _rows("y", y, len(p), name)
    bad = ~np.isin(out, np.arange(K))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"y is {out[row]!s} in row {row}", f"labels are whole numbers 0 to {K - 1}")
    return out.astype(np.int64)


def _rows(name: str, values: ArrayLike, N: int, beside: str = "p") -> NDArray[Any]:
    out = np.asarray(values)
    if out.shape != (N,):
        raise DataError(f"{name} has the shape {out.shape}, {beside} has {N} rows", "they describe the same rows")
    if out.dtype.kind == "f" and np.isnan(out).any():
        raise DataError(f"{name} is NaN in row {int(np.argmax(np.isnan(out)))}", f"every row needs its {name}")
    return out
