"""Scores over gathered predictions, each with a 95% interval clustered by patient.

Every score is weighted: `w[R, N]` holds the weights of N rows in R resamples (intervals.py), and the score is a
value[R], NaN where undefined. Weights are integers, so that their sums and ties are exact in float64. Suffixes of names
give shapes: R resamples, N rows, K classes, U distinct probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylab.errors import DataError, unknown
from raylab.evaluation.intervals import (
    Bools,
    Floats,
    Part,
    WeightedScores,
    clustered,
    clustered_difference,
    clustered_parts,
    proportion,
    wilson,
)
from raylab.score import Score

__all__ = [
    "binary_differences",
    "binary_point",
    "binary_scores",
    "binary_scores_by",
    "calibration_fit",
    "confusion",
    "confusion_by",
    "macro_recall_gain",
    "multiclass_differences",
    "multiclass_point",
    "multiclass_scores",
    "paired_difference",
    "rank_rows",
    "regression_differences",
    "regression_point",
    "regression_scores",
    "wilson",
]

Ints = NDArray[np.int64]

LOGIT_CLIP = 1e-6  # probabilities of 0 and 1 have no logit: the calibration fits use 1e-6 and 1 - 1e-6
ECE_BINS = 15
MANY = 20_000  # minimum rows for which calibration fits of resamples use nodes
ORDER, STRETCH = 6, 0.08  # nodes per stretch, and the length of a stretch at slope 1
PEEK = 100  # rows
ONE_CLASS = "only one class in the data"


def binary_scores(
    y: ArrayLike, p: ArrayLike, group: ArrayLike, bootstraps: int = 1000, seed: int = 0, unit: str = "patient"
) -> dict[str, Score]:
    """Return discrimination and calibration scores of the probabilities p[N] of y[N] in {0, 1}, for patients group[N].

    auroc                        ties count half (midranks)
    auprc                        average precision, ties grouped: the sum over thresholds of precision x gained recall
    prevalence                   the auprc of random guessing; with a Wilson interval
    brier, brier_scaled          mean (p - y)^2; 1 - brier / (prevalence (1 - prevalence))
    calibration_slope            b of the fit y ~ a + b logit(p); 1 is calibrated, below 1 overconfident
    calibration_intercept        a of y ~ a + logit(p), calibration in the large; 0 is calibrated
    sensitivity_at_specificity_90  the largest over thresholds with a specificity of at least 0.9
    ppv_at_sensitivity_80        at the highest threshold with a sensitivity of at least 0.8

    (Steyerberg 2010, Epidemiology 21:128; calibration: Cox 1958, Biometrika 45:562.)
    """
    everybody = {"all": np.ones(np.shape(y), dtype=bool)}
    return binary_scores_by(y, p, group, everybody, bootstraps, seed, unit)["all"]


def binary_scores_by(
    y: ArrayLike,
    p: ArrayLike,
    group: ArrayLike,
    members: Mapping[str, Bools],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, dict[str, Score]]:
    """Return `binary_scores` of each part of the rows, members[name][N], in one pass over resamples of all patients; no
    part is empty."""
    y_N, p_N = _binary_inputs(y, p)
    group_N = _rows("group", group, len(y_N))
    order = _from_highest(y_N, p_N)  # sort once; the parts and the weights of each resample then follow this order
    rows = {name: order[inside[order]] for name, inside in members.items()}
    parts = {name: _binary_part(y_N[of], p_N[of], of) for name, of in rows.items()}
    found = clustered_parts(parts, group_N, bootstraps, seed, unit)
    return {
        name: {**found[name], "prevalence": proportion(y_N[of], np.ones(len(of)), group_N[of], "", unit)}
        for name, of in rows.items()
    }


def _binary_part(y_N: Ints, p_N: Floats, rows: NDArray[np.intp]) -> Part:
    ranking, calibration = _Ranking(y_N, p_N), _Calibration(y_N, _logit(p_N))

    def scores(w: Floats) -> dict[str, Floats]:
        slope, intercept = calibration.fits(w)
        by_name = ranking.scores(w) | _brier(y_N, p_N, w)
        del by_name["prevalence"]  # a proportion, computed apart
        return by_name | {"calibration_slope": slope, "calibration_intercept": intercept}

    if 0 < y_N.sum() < len(y_N):
        why = {"calibration_slope": "no finite slope: p separates the classes, or nearly, or is constant"}
    else:
        why = dict.fromkeys(scores(np.ones((1, len(y_N)))), ONE_CLASS)
    return Part(rows, scores, why, outcomes(y_N))


def outcomes(y: NDArray[Any]) -> dict[str, Bools]:
    """Return the strata of a binary outcome, for `clustered`."""
    return {"with the outcome": y == 1, "without it": y == 0}


def multiclass_scores(
    y: ArrayLike,
    p: ArrayLike,
    group: ArrayLike,
    classes: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return scores of the probabilities p[N, K] of y[N] in 0..K-1, named by classes[K]; the largest p is the
    prediction.

    macro_recall, accuracy, sensitivity/<class>, ppv/<class>; the last three are proportions, with Wilson intervals
    macro_f1 mean over classes of 2 x right / (rows of the class + rows called so)
    auroc    one class against the rest, averaged over classes
    brier    mean over rows of the sum over classes of (p - truth)^2 (Brier 1950: 0 to 2)
    ece      |accuracy - confidence| over 15 bins of confidence, (low, high] (Guo 2017, arXiv 1706.04599)

    The sensitivity of a class without rows is undefined, and averages are over the other classes (with a `note`).
    """
    y_N, p_NK = _multiclass_inputs(y, p)
    N, K = p_NK.shape
    if len(classes) != K or len(set(classes)) != K:
        raise DataError(f"classes = {list(classes)}", f"p has {K} columns", "give one distinct name a column")
    group_N = _rows("group", group, N)

    called_N = p_NK.argmax(axis=1)
    hit_N = called_N == y_N
    present = np.unique(y_N).tolist()
    strata = _strata_of_classes(y_N, classes)
    found = clustered(_weigh_multiclass(y_N, p_NK), group_N, bootstraps, seed, {"auroc": ONE_CLASS}, strata, unit)
    out = {"macro_recall": found.pop("macro_recall")}
    out |= {"accuracy": proportion(hit_N, np.ones(N), group_N, "", unit), **found}
    for k, name in enumerate(classes):
        right_N = hit_N & (y_N == k)
        no_row, no_call = f"no row of class {name}", f"class {name} was never predicted"
        out[f"sensitivity/{name}"] = proportion(right_N, y_N == k, group_N, no_row, unit)
        out[f"ppv/{name}"] = proportion(right_N, called_N == k, group_N, no_call, unit)
    if len(present) < K:
        absent = ", ".join(name for k, name in enumerate(classes) if k not in present)
        note = f"over {', '.join(classes[k] for k in present)}; no rows of {absent}"
        out |= {name: out[name].model_copy(update={"note": note}) for name in ("macro_recall", "macro_f1", "auroc")}
    return out


def _strata_of_classes(y_N: Ints, classes: Sequence[str] | None) -> dict[str, Bools]:
    return {f"of class {k if classes is None else classes[k]}": y_N == k for k in np.unique(y_N).tolist()}


def _weigh_multiclass(y_N: Ints, p_NK: Floats) -> WeightedScores:
    K = p_NK.shape[1]
    confidence_N = p_NK.max(axis=1)
    hit_N = p_NK.argmax(axis=1) == y_N
    bin_N = np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    gaps_NB = np.eye(ECE_BINS)[bin_N] * (hit_N - confidence_N)[:, None]
    square_N = ((p_NK - np.eye(K)[y_N]) ** 2).sum(axis=1)
    present = np.unique(y_N).tolist()
    orders = [_from_highest(y_N == k, p_NK[:, k]) for k in present]
    rankings = [_Ranking((y_N == k)[order], p_NK[order, k]) for k, order in zip(present, orders, strict=True)]

    def scores(w: Floats) -> dict[str, Floats]:
        total = w.sum(axis=1)
        aurocs = [ranking.areas(w[:, order])[0] for ranking, order in zip(rankings, orders, strict=True)]
        return {
            "macro_recall": _macro_recall(y_N, p_NK, w),
            "macro_f1": _macro_f1(y_N, p_NK, w),
            "auroc": np.mean(aurocs, axis=0),
            "brier": _weighted_sum(w, square_N) / total,
            "ece": np.abs(w @ gaps_NB).sum(axis=1) / total,
        }

    return scores


def confusion(y: ArrayLike, p: ArrayLike) -> list[list[int]]:
    """Return counts [K, K], with the true class in rows and the predicted class (largest p[N, K]) in columns."""
    y_N, p_NK = _multiclass_inputs(y, p)
    K = p_NK.shape[1]
    return np.bincount(y_N * K + p_NK.argmax(axis=1), minlength=K * K).reshape(K, K).tolist()


def confusion_by(strata: ArrayLike, y: ArrayLike, p: ArrayLike) -> dict[str, list[list[int]]]:
    """Return the confusion matrix of each value of strata[N]."""
    y_N, p_NK, strata_N = np.asarray(y), np.asarray(p), _rows("strata", strata, len(np.asarray(y)))
    return {str(value): confusion(y_N[strata_N == value], p_NK[strata_N == value]) for value in np.unique(strata_N)}


def regression_scores(
    y: ArrayLike,
    p: ArrayLike,
    group: ArrayLike,
    names: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return scores of predictions p[N, K] of y[N, K]: r2/<output> (1 - squared error / variance), mae/<output> (mean
    absolute error, in the output's unit), and r2_min and r2_mean over the outputs."""
    y_NK, p_NK = np.asarray(y, dtype=np.float64), np.asarray(p, dtype=np.float64)
    if y_NK.shape != p_NK.shape or y_NK.shape[1:] != (len(names),):
        raise DataError(f"y has the shape {y_NK.shape}, p {p_NK.shape}, for {len(names)} outputs")
    group_N = _rows("group", group, len(y_NK))
    return clustered(_weigh_regression(y_NK, p_NK, names), group_N, bootstraps, seed, {}, {}, unit)


def _weigh_regression(y_NK: Floats, p_NK: Floats, names: Sequence[str]) -> WeightedScores:
    error_NK = np.abs(p_NK - y_NK)

    def scores(w: Floats) -> dict[str, Floats]:
        r2_RK = _r2(y_NK, p_NK, w)
        mae_RK = w @ error_NK / w.sum(axis=1)[:, None]
        found = {f"r2/{name}": r2_RK[:, k] for k, name in enumerate(names)}
        found |= {f"mae/{name}": mae_RK[:, k] for k, name in enumerate(names)}
        return {"r2_min": r2_RK.min(axis=1), "r2_mean": r2_RK.mean(axis=1), **found}

    return scores


def binary_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """Return auroc, auprc and brier of p[N] without intervals, for validation in training; without undefined scores.

    Like the next two functions, bitwise independent of the order of the rows.
    """
    y_N, p_N = _binary_inputs(y, p)
    order = _from_highest(y_N, p_N)  # also makes the sums independent of the original row order
    y_N, p_N, w = y_N[order], p_N[order], np.ones((1, len(y_N)))
    found = _ranking(y_N, p_N, w) | _brier(y_N, p_N, w)
    return _finite({name: found[name] for name in ("auroc", "auprc", "brier")})


def multiclass_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """Return macro_recall and macro_f1 over the classes present, and accuracy, of p[N, K]."""
    y_N, p_NK = _multiclass_inputs(y, p)
    right_N = p_NK.argmax(axis=1) == y_N
    w = np.ones((1, len(y_N)))
    return _finite(
        {
            "macro_recall": _macro_recall(y_N, p_NK, w),
            "accuracy": right_N.mean(keepdims=True),
            "macro_f1": _macro_f1(y_N, p_NK, w),
        }
    )


def regression_point(y: ArrayLike, p: ArrayLike) -> dict[str, float]:
    """Return r2_min and r2_mean over the outputs of y[N, K] and p[N, K]."""
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
    classes: Sequence[str] | None = None,
) -> Score:
    """Return the score of a minus the score of b on the same rows, with an interval over shared resamples of patients.

    "auroc" takes p[N] of a binary task, "macro_recall" p[N, K]; both are computed as by the functions above. `classes`
    [K] are the names in the reason for a missing interval; without them it has the numbers.
    """
    if score == "macro_recall":
        return macro_recall_gain(y, [p_a], [p_b], group, classes, bootstraps, seed)
    if score != "auroc":
        raise unknown("score", score, ("auroc", "macro_recall"))
    (y_N, a), (_, b) = _binary_inputs(y, p_a, "p_a"), _binary_inputs(y, p_b, "p_b")

    def of(p_N: Floats) -> WeightedScores:
        return lambda w: {"difference": _auroc_unsorted(y_N, p_N, w)}

    group_N, why = _rows("group", group, len(y_N)), {"difference": ONE_CLASS}
    return clustered_difference(of(a), of(b), group_N, bootstraps, seed, why, outcomes(y_N))["difference"]


def macro_recall_gain(
    y: ArrayLike,
    p_a: Sequence[ArrayLike],
    p_b: Sequence[ArrayLike],
    group: ArrayLike,
    classes: Sequence[str] | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
) -> Score:
    """Return the mean macro recall of the runs a minus that of the runs b, each p[N, K] of the same rows, with an
    interval over shared resamples of patients. How much runs of other seeds would differ is not in the interval."""
    y_N = _multiclass_inputs(y, p_a[0], "p_a")[0]
    a, b = ([_multiclass_inputs(y, p, name)[1] for p in runs] for name, runs in (("p_a", p_a), ("p_b", p_b)))
    for p in (*a, *b):
        if p.shape != a[0].shape:
            raise DataError(
                f"p_a has the shape {a[0].shape}, p_b {p.shape}", "paired predictions need the same rows and classes"
            )

    def of(runs: list[Floats]) -> WeightedScores:
        return lambda w: {"difference": np.mean([_macro_recall(y_N, p, w) for p in runs], axis=0)}

    group_N, why = _rows("group", group, len(y_N)), {"difference": ONE_CLASS}
    strata = _strata_of_classes(y_N, classes)
    return clustered_difference(of(a), of(b), group_N, bootstraps, seed, why, strata)["difference"]


def binary_differences(
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    group: ArrayLike,
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return the scores of a minus those of b on the same rows, as `paired_difference` does: auroc, auprc, brier,
    sensitivity_at_specificity_90, ppv_at_sensitivity_80."""
    (y_N, a), (_, b) = _binary_inputs(y, p_a, "p_a"), _binary_inputs(y, p_b, "p_b")
    why = dict.fromkeys(("auroc", "auprc", "sensitivity_at_specificity_90", "ppv_at_sensitivity_80"), ONE_CLASS)
    both = _weigh_binary(y_N, a), _weigh_binary(y_N, b)
    return clustered_difference(*both, _rows("group", group, len(y_N)), bootstraps, seed, why, outcomes(y_N), unit)


def rank_rows(y_N: Ints, p_N: Floats) -> WeightedScores:
    """Return the scores of rows y, p[N] that depend on their order alone (auroc, auprc, ...), as a function of w."""
    order = _from_highest(y_N, p_N)
    ranking = _Ranking(y_N[order], p_N[order])
    return lambda w: ranking.scores(w[:, order])


def _weigh_binary(y_N: Ints, p_N: Floats) -> WeightedScores:
    order = _from_highest(y_N, p_N)
    y_N, p_N = y_N[order], p_N[order]
    ranking = _Ranking(y_N, p_N)

    def scores(w: Floats) -> dict[str, Floats]:
        w = w[:, order]
        found = ranking.scores(w)
        del found["prevalence"]  # it is the same for all models
        return found | {"brier": _brier(y_N, p_N, w)["brier"]}

    return scores


def multiclass_differences(
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    group: ArrayLike,
    classes: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return the scores of a minus those of b on the same rows, as `paired_difference` does: macro_recall, macro_f1,
    accuracy, auroc, brier, ece, sensitivity/<class>."""
    (y_N, a), (_, b) = _multiclass_inputs(y, p_a, "p_a"), _multiclass_inputs(y, p_b, "p_b")
    strata = _strata_of_classes(y_N, classes)

    def weigh(p_NK: Floats) -> WeightedScores:
        hit_N, others = (p_NK.argmax(axis=1) == y_N).astype(np.float64), _weigh_multiclass(y_N, p_NK)

        def scores(w: Floats) -> dict[str, Floats]:
            found = others(w) | {"accuracy": _ratio(_weighted_sum(w, hit_N), w.sum(axis=1))}
            for k in np.unique(y_N):
                of_N = (y_N == k).astype(np.float64)
                found[f"sensitivity/{classes[k]}"] = _ratio(_weighted_sum(w, hit_N * of_N), _weighted_sum(w, of_N))
            return found

        return scores

    group_N = _rows("group", group, len(y_N))
    return clustered_difference(weigh(a), weigh(b), group_N, bootstraps, seed, {"auroc": ONE_CLASS}, strata, unit)


def regression_differences(
    y: ArrayLike,
    p_a: ArrayLike,
    p_b: ArrayLike,
    group: ArrayLike,
    names: Sequence[str],
    bootstraps: int = 1000,
    seed: int = 0,
    unit: str = "patient",
) -> dict[str, Score]:
    """Return the scores of `regression_scores` of a minus those of b on the same rows, as `paired_difference` does."""
    y_NK, a, b = (np.asarray(values, dtype=np.float64) for values in (y, p_a, p_b))
    if not y_NK.shape == a.shape == b.shape:
        raise DataError(f"y has the shape {y_NK.shape}, p_a {a.shape}, p_b {b.shape}")
    both = _weigh_regression(y_NK, a, names), _weigh_regression(y_NK, b, names)
    return clustered_difference(*both, _rows("group", group, len(y_NK)), bootstraps, seed, {}, {}, unit)


def calibration_fit(y: ArrayLike, p: ArrayLike) -> tuple[float, float]:
    """Return (intercept, slope) of the logistic fit y ~ a + b logit(p); NaN if it does not exist."""
    y_N, p_N = _binary_inputs(y, p)
    order = _from_highest(y_N, p_N)
    intercept, slope = _calibration(y_N[order], _logit(p_N[order]), np.ones((1, len(y_N))), free_slope=True)[0]
    return float(intercept), float(slope)


# The scores


def _ranking(y: NDArray[Any], p: Floats, w: Floats) -> dict[str, Floats]:
    """Return the scores that depend only on the order of p; rows are sorted from the highest p down, w[R, N]."""
    return _Ranking(y, p).scores(w)


class _Ranking:
    """The ROC curve of many resamples of the rows y, p[N], from the highest p down, at the thresholds where it rises.

    Those are the distinct p of positive rows (suffix T); rows between them count as sums only. With few positives a
    resample then costs little more than one pass over the weights.
    """

    def __init__(self, y: NDArray[Any], p: Floats) -> None:
        self.positive = np.flatnonzero(y == 1)
        p_positive = p[self.positive]
        self.last_T = np.flatnonzero(np.append(p_positive[1:] != p_positive[:-1], len(p_positive) > 0))
        first_U = np.flatnonzero(np.append(True, p[1:] != p[:-1]))  # equal probabilities are called together
        place_T = np.searchsorted(first_U, self.positive[self.last_T], "right")
        start_T, end_T = first_U[place_T - 1], np.append(first_U, len(p))[place_T]
        edges = np.unique(np.concatenate([[0], start_T, end_T]))
        self.edges = edges[edges < len(p)]
        self.start_T, self.end_T = np.searchsorted(edges, start_T), np.searchsorted(edges, end_T)

    def areas(self, w: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Return auroc [R], and at each threshold tp, called and the tp gained [R, T], and the negatives [R]."""
        called = np.cumsum(np.add.reduceat(w, self.edges, axis=1), axis=1)
        called = np.concatenate([np.zeros((len(w), 1)), called], axis=1)
        total = called[:, -1]
        before_RT, called_RT = called[:, self.start_T], called[:, self.end_T]
        tp_RT = np.cumsum(w[:, self.positive], axis=1)[:, self.last_T]
        gained_RT = np.diff(tp_RT, prepend=0.0, axis=1)
        positives = tp_RT[:, -1] if tp_RT.shape[1] else np.zeros(len(w))
        negatives = total - positives
        # Mann-Whitney, with ties counted half: of the negatives, those called before and with each positive lose
        lost_RT = (called_RT - tp_RT) + (before_RT - (tp_RT - gained_RT))
        twice = 2 * positives * negatives - np.einsum("rt,rt->r", gained_RT, lost_RT)
        return _ratio(twice, 2 * positives * negatives), tp_RT, called_RT, gained_RT, negatives

    def scores(self, w: Floats) -> dict[str, Floats]:
        auroc, tp_RT, called_RT, gained_RT, negatives = self.areas(w)
        undefined = np.full(len(w), np.nan)
        if tp_RT.shape[1] == 0:
            names = ("auroc", "auprc", "sensitivity_at_specificity_90", "ppv_at_sensitivity_80")
            return {"prevalence": np.zeros(len(w)) / negatives, **dict.fromkeys(names, undefined)}
        positives = tp_RT[:, -1]
        # the last place with few enough false positives, the first with enough true ones; 0.1 has no exact float, but
        # a tenth of an integer compares correctly with every integer
        specific_R = _places(called_RT - tp_RT, negatives / 10, "right") - 1
        sensitive_R = _places(tp_RT, 4 * positives / 5, "left")
        rows = np.arange(len(w))
        found = np.where(specific_R < 0, 0.0, tp_RT[rows, specific_R])
        called_RT = np.maximum(called_RT, 1)  # avoids 0 / 0 where no weight is called; the gain is 0 there
        ppv = tp_RT[rows, sensitive_R] / called_RT[rows, sensitive_R]
        both = (positives > 0) & (negatives > 0)
        gained_RT *= tp_RT
        gained_RT /= called_RT
        return {
            "auroc": auroc,
            "auprc": np.where(both, _ratio(gained_RT.sum(axis=1), positives), np.nan),
            "prevalence": positives / (positives + negatives),
            "sensitivity_at_specificity_90": np.where(both, _ratio(found, positives), np.nan),
            "ppv_at_sensitivity_80": np.where(both, ppv, np.nan),
        }


def _places(rising_RU: Floats, limit_R: Floats, side: Literal["left", "right"]) -> NDArray[np.intp]:
    """Return np.searchsorted of each row."""
    pairs = zip(rising_RU, limit_R, strict=True)
    return np.array([np.searchsorted(row, limit, side) for row, limit in pairs], dtype=np.intp)


def _auroc(y: NDArray[Any], p: Floats, w: Floats) -> Floats:
    return _Ranking(y, p).areas(w)[0]


def _auroc_unsorted(y: Ints, p: Floats, w: Floats) -> Floats:
    order = _from_highest(y, p)
    return _auroc(y[order], p[order], w[:, order])


def _macro_recall(y: Ints, p_NK: Floats, w: Floats) -> Floats:
    """Return the mean recall over the classes in y; NaN in a resample that lacks one of them."""
    present = np.unique(y)
    truth_NK = np.equal.outer(y, present).astype(np.float64)
    right_NK = truth_NK * (p_NK.argmax(axis=1) == y)[:, None]
    recall: Floats = _ratio(w @ right_NK, w @ truth_NK).mean(axis=1)
    return recall


def _macro_f1(y: Ints, p_NK: Floats, w: Floats) -> Floats:
    """Return the mean F1 over the classes in y; NaN in a resample that lacks one of them."""
    present = np.unique(y)
    truth_NK = np.equal.outer(y, present).astype(np.float64)
    called_NK = np.equal.outer(p_NK.argmax(axis=1), present).astype(np.float64)
    rows_RK = w @ truth_NK
    f1_RK = _ratio(2 * (w @ (truth_NK * called_NK)), rows_RK + w @ called_NK)
    f1: Floats = np.where(rows_RK > 0, f1_RK, np.nan).mean(axis=1)
    return f1


def _r2(y_NK: Floats, p_NK: Floats, w: Floats) -> Floats:
    """Return R2 of each output in each resample, [R, K]; values are centred first, for numerical precision."""
    y_NK, p_NK = y_NK - y_NK.mean(axis=0), p_NK - y_NK.mean(axis=0)
    n = w.sum(axis=1)[:, None]
    mean_RK = w @ y_NK / n
    variance_RK = w @ y_NK**2 / n - mean_RK**2
    return 1 - _ratio(w @ (p_NK - y_NK) ** 2 / n, variance_RK)


def _brier(y: Ints, p: Floats, w: Floats) -> dict[str, Floats]:
    total = w.sum(axis=1)
    brier = _ratio(_weighted_sum(w, (p - y) ** 2), total)
    prevalence = _ratio(_weighted_sum(w, y.astype(np.float64)), total)
    return {"brier": brier, "brier_scaled": 1 - _ratio(brier, prevalence * (1 - prevalence))}


@dataclass(frozen=True)
class _Nodes:
    """Sums of a logistic function over many sorted rows, computed as sums over few nodes.

    Within a stretch of x, a logistic function of a + b x is a polynomial of degree ORDER - 1 to 13 digits. The sum of
    its values at the rows is therefore a sum of its values at ORDER Chebyshev nodes, with weights that do not depend on
    a and b (barycentric interpolation: Berrut & Trefethen 2004, SIAM Rev 46:501). A resample then takes one pass over
    the rows, and the Newton steps cost almost nothing.
    """

    x: Floats  # [nodes]
    shares: Floats  # [ORDER, N]: how each row is distributed over the nodes of its stretch
    first: NDArray[np.intp]  # row of each stretch

    @classmethod
    def of(cls, x: Floats, slope: float) -> "_Nodes | None":
        """Return nodes for x[N], sorted from high to low, and slopes near this one; None if there are few rows, hardly
        more rows than nodes, or no finite slope."""
        if len(x) < MANY or not np.isfinite(slope):
            return None
        width = STRETCH / max(1.0, abs(slope))
        stretches = int((x[0] - x[-1]) / width) + 1
        if stretches * ORDER > len(x) / 4:
            return None
        stretch_N = np.minimum(((x[0] - x) / width).astype(np.int64), stretches - 1)
        used, first = np.unique(stretch_N, return_index=True)
        angle = (np.arange(ORDER) + 0.5) * np.pi / ORDER
        x_UO = (x[0] - (used + 0.5) * width)[:, None] + width / 2 * np.cos(angle)
        shares = np.empty((ORDER, len(x)))
        for nodes, a, b in zip(x_UO, first, np.append(first[1:], len(x)), strict=True):
            gap = x[a:b] - nodes[:, None]
            on_node = gap == 0
            inverse = ((-1.0) ** np.arange(ORDER) * np.sin(angle))[:, None] / np.where(on_node, 1.0, gap)
            inverse = np.where(on_node.any(axis=0), on_node, inverse)
            shares[:, a:b] = inverse / inverse.sum(axis=0)
        return cls(x_UO.T.ravel(), shares, first)

    def weights(self, w: Floats) -> Floats:
        """Return w[R, N] as weights [R, nodes], which may be negative."""
        return np.concatenate([np.add.reduceat(w * share, self.first, axis=1) for share in self.shares], axis=1)


class _Calibration:
    """Slope and intercept of many resamples of the rows y, x[N], from the highest x down."""

    def __init__(self, y: Ints, x: Floats) -> None:
        self.y, self.x = y, x
        ones = np.ones((1, len(y)))
        # fits of resamples start at the fit of the data, from which they take two or three Newton steps
        self.start = {free: _calibration(y, x, ones, free_slope=free)[0] for free in (True, False)}
        self.nodes = _Nodes.of(x, self.start[True][1])
        self.positive, self.negative = np.flatnonzero(y == 1), np.flatnonzero(y == 0)

    def fits(self, w: Floats) -> tuple[Floats, Floats]:
        """Return (slope [R] of y ~ a + b x, intercept [R] of y ~ a + x) for w[R, N]."""
        if self.nodes is None:
            with_slope, alone = (_calibration(self.y, self.x, w, free, self.start[free]) for free in (True, False))
            return with_slope[:, 1], alone[:, 0]
        ends_1, ends_0 = (_ends(self.x, w, rows) for rows in (self.positive, self.negative))
        w_positive = w[:, self.positive]
        target = np.stack([w_positive.sum(axis=1), w_positive @ self.x[self.positive]], axis=1)
        on_nodes, x_ends = self.nodes.weights(w), self.x[[0, -1]]
        with_slope, alone = (
            _newton(self.nodes.x, on_nodes, target, x_ends, _fit_exists(ends_1, ends_0, free), free, self.start[free])
            for free in (True, False)
        )
        # the nodes are too far apart for slopes much steeper than that of the data: refit these, and NaN, on the rows
        steep = ~(np.abs(with_slope[:, 1]) <= 2 * max(1.0, abs(self.start[True][1])))
        if steep.any():
            with_slope[steep] = _calibration(self.y, self.x, w[steep], True, self.start[True])
        return with_slope[:, 1], alone[:, 0]


def _calibration(y: Ints, x: Floats, w: Floats, free_slope: bool, start: Floats | None = None) -> Floats:
    """Return a and b [R, 2] of the logistic fit y ~ a + b x of each resample (b = 1 unless free); NaN if there is none.

    Rows are sorted from the highest x down.
    """
    ends_1, ends_0 = (_ends(x, w, np.flatnonzero(y == k)) for k in (1, 0))
    target = (w * y) @ np.stack([np.ones_like(x), x, x * x], axis=1)[:, :2]
    return _newton(x, w, target, x[[0, -1]], _fit_exists(ends_1, ends_0, free_slope), free_slope, start)


def _fit_exists(ends_1: tuple[Floats, Floats], ends_0: tuple[Floats, Floats], free_slope: bool) -> Bools:
    """Whether a fit exists [R], from the `_ends` of both classes: both are present and, with a free slope, x does not
    separate them (Albert & Anderson 1984, Biometrika 71:1)."""
    (high_1, low_1), (high_0, low_0) = ends_1, ends_0
    exists: Bools = (low_1 < high_0) & (low_0 < high_1) if free_slope else ~np.isnan(low_1 + low_0)
    return exists


def _newton(
    x: Floats, w: Floats, target: Floats, x_ends: Floats, exists: Bools, free_slope: bool, start: Floats | None
) -> Floats:
    """Return the fits of `_calibration` for the resamples that have one, from target[R, 2], the sums of w y and w y x.

    Newton steps, for all resamples at once. A step changes no row's a + b x by more than 1 (within which the likelihood
    increases: Bach 2010, EJS 4:384, proposition 1), or by more than half of the largest |a + b x| if that is greater,
    so that steep fits take few steps. A fit that has not converged after 100 steps is NaN.
    """
    fit = np.full((len(w), 2), np.nan)
    todo = np.flatnonzero(exists)
    if len(todo) < len(w):
        w, target = w[todo], target[todo]
    ab = np.tile((0.0, 1.0) if start is None or np.isnan(start).any() else start, (len(todo), 1))
    powers_N3 = np.stack([np.ones_like(x), x, x * x], axis=1)
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
        ab[~np.isfinite(ab).all(axis=1)] = (
            0.0,
            0.0 if free_slope else 1.0,
        )  # too steep to have curvature: restart from flat
        going = ~(moved < 1e-7)  # Newton converges quadratically: the remaining error is rounding
        fit[todo[~going]] = ab[~going]
        if not going.all():
            todo, w, ab, target = todo[going], w[going], ab[going], target[going]
    return fit


def _ends(x: Floats, w: Floats, rows: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Return the first and last x of `rows` with positive weight in w[R, N]; NaN if no row has any."""

    def first(rows: NDArray[np.intp]) -> Floats:
        for some in (rows[:PEEK], rows):  # it is nearly always among the first few
            drawn = w[:, some] > 0
            if len(some) and drawn.any(axis=1).all():
                break
        if len(rows) == 0:
            return np.full(len(w), np.nan)
        return np.where(drawn.any(axis=1), x[some[drawn.argmax(axis=1)]], np.nan)

    return first(rows), first(rows[::-1])


# Small tools


def _from_highest(y: NDArray[Any], p: Floats) -> NDArray[np.intp]:
    return np.lexsort((y, -p))


def _logit(p: Floats) -> Floats:
    clipped = np.clip(p, LOGIT_CLIP, 1 - LOGIT_CLIP)
    logit: Floats = np.log(clipped) - np.log1p(-clipped)
    return logit


def _ratio(top: Floats, bottom: Floats) -> Floats:
    """Return top / bottom, NaN where bottom is 0."""
    ratio: Floats = np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)
    return ratio


def _weighted_sum(w: Floats, v: Floats) -> Floats:
    """Return the sum over n of w[R, N] v[N] in a fixed order: unlike BLAS, independent of the number of threads."""
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
        raise DataError(f"rows of {name} do not sum to 1", f"one is off by {worst:.3g}", "give softmax outputs")
    return _labels(y, p_NK, name, p_NK.shape[1]), p_NK


def _probabilities(p: ArrayLike, name: str, dimensions: int) -> Floats:
    out = np.asarray(p, dtype=np.float64)
    if out.ndim != dimensions or out.size == 0:
        form = "[N]" if dimensions == 1 else "[N, K]"
        raise DataError(f"{name} has the shape {out.shape}", f"the score needs {name}{form}, with at least one row")
    for bad, what in ((np.isnan(out), "NaN"), ((out < 0) | (out > 1), "outside 0..1")):
        if bad.any():
            row = int(np.argwhere(bad)[0, 0])
            raise DataError(
                f"{name} is {what} in {int(bad.sum())} of {bad.size} places, first in row {row}",
                "scores need probabilities",
                "give sigmoid or softmax outputs, and check how this prediction failed",
            )
    return out


def _labels(y: ArrayLike, p: Floats, name: str, K: int) -> Ints:
    out = _rows("y", y, len(p), name)
    bad = ~np.isin(out, np.arange(K))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"y is {out[row]!s} in row {row}", f"labels are integers from 0 to {K - 1}")
    return out.astype(np.int64)


def _rows(name: str, values: ArrayLike, N: int, beside: str = "p") -> NDArray[Any]:
    out = np.asarray(values)
    if out.shape != (N,):
        raise DataError(f"{name} has the shape {out.shape}, {beside} has {N} rows", "they describe the same rows")
    if out.dtype.kind == "f" and np.isnan(out).any():
        raise DataError(f"{name} is NaN in row {int(np.argmax(np.isnan(out)))}", f"every row needs its {name}")
    return out
