"""Clinical evaluation: calibration error, decision curves, subgroups and recalibration.

Scores are weighted over rows, as in metrics.py, so that they use the same bootstrap over patients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raylab.documents import to_plain
from raylab.errors import DataError
from raylab.evaluation.intervals import Floats, clustered
from raylab.evaluation.metrics import LOGIT_CLIP, ONE_CLASS, binary_scores_by, calibration_fit, outcomes
from raylab.score import NetBenefit, Score

BINS = 50
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
FEW = 20  # a subgroup with fewer rows is counted but not scored


@dataclass(frozen=True)
class Subgroup:
    """Rows, positive rows and scores of a part of the data, or `why` it has no scores."""

    n: int
    positive: int
    scores: Mapping[str, Score] = field(default_factory=dict)
    why: str | None = None

    def to_json(self) -> dict[str, Any]:
        counts = {"n": self.n, "positive": self.positive}
        return {**counts, **to_plain(dict(self.scores))} if self.why is None else {**counts, "why": self.why}


def ici(y: ArrayLike, p: ArrayLike, group: ArrayLike, bootstraps: int = 1000, seed: int = 0) -> Score:
    """Return the integrated calibration index, the mean |observed - predicted| over the rows (Austin & Steyerberg 2019,
    Stat Med 38:4051), with its interval.

    The paper smooths with loess. Here a Gaussian kernel over logit(p), with Silverman's bandwidth, between 50 bins of
    equal size smooths both observed and predicted values, which is a matrix product over all resamples.
    """
    y_N, p_N, group_N = _rows(y, p, group)
    logit_N = np.log(np.clip(p_N, LOGIT_CLIP, 1 - LOGIT_CLIP))
    logit_N = logit_N - np.log1p(-np.clip(p_N, LOGIT_CLIP, 1 - LOGIT_CLIP))
    order = np.argsort(logit_N, kind="stable")
    y_N, p_N, logit_N, group_N = y_N[order], p_N[order], logit_N[order], group_N[order]
    bins = min(BINS, len(y_N))
    first_B = -(np.arange(bins) * -len(y_N) // bins)  # the first row of each bin
    rows_B = np.diff(first_B, append=len(y_N))
    centre_B = np.add.reduceat(logit_N, first_B) / rows_B
    width = max(1.06 * float(logit_N.std()) * len(y_N) ** -0.2, 1e-3)
    kernel_BB = np.exp(-0.5 * ((centre_B[:, None] - centre_B) / width) ** 2)
    gap_N = y_N - p_N

    def score(w: Floats) -> dict[str, Floats]:
        rows_RB = np.add.reduceat(w, first_B, axis=1)
        near_RB = np.maximum(rows_RB @ kernel_BB, 1e-12)
        gap_RB = np.abs(np.add.reduceat(w * gap_N, first_B, axis=1) @ kernel_BB) / near_RB
        return {"ici": (rows_RB * gap_RB).sum(1) / rows_RB.sum(1)}

    return clustered(score, group_N, bootstraps, seed, {}, outcomes(y_N))["ici"]


def decision_curve(
    y: ArrayLike, p: ArrayLike, group: ArrayLike, bootstraps: int = 1000, seed: int = 0
) -> list[NetBenefit]:
    """Return the net benefit per row at THRESHOLDS t: true positives - false positives * t / (1 - t).

    For treating patients with p >= t, and for treating everybody; treating nobody has a net benefit of 0 (Vickers &
    Elkin 2006, Med Decis Making 26:565).
    """
    y_N, p_N, group_N = _rows(y, p, group)
    odds = np.array(THRESHOLDS) / (1 - np.array(THRESHOLDS))
    act_NT = p_N[:, None] >= np.array(THRESHOLDS)
    gain_NT = np.where(y_N[:, None] == 1, 1.0, -odds)
    acted_NT = act_NT * gain_NT

    def score(w: Floats) -> dict[str, Floats]:
        benefit_RT = (w @ acted_NT) / w.sum(1, keepdims=True)
        return {str(k): benefit_RT[:, k] for k in range(len(THRESHOLDS))}

    model = clustered(score, group_N, bootstraps, seed, {}, outcomes(y_N))
    everybody = gain_NT.mean(0)
    return [
        NetBenefit(threshold=t, model=model[str(k)], everybody=float(everybody[k])) for k, t in enumerate(THRESHOLDS)
    ]


def subgroups(
    y: ArrayLike,
    p: ArrayLike,
    group: ArrayLike,
    members: Mapping[str, NDArray[np.bool_]],
    bootstraps: int = 1000,
    seed: int = 0,
    names: Sequence[str] = ("auroc", "auprc", "prevalence", "calibration_intercept"),
) -> dict[str, Subgroup]:
    """Return the scores `names` of each subgroup; a subgroup with few rows or a single class is only counted."""
    y_N, p_N, group_N = _rows(y, p, group)
    results, scored = {}, {}
    for name, inside in members.items():
        n, positive = int(inside.sum()), int(y_N[inside].sum())
        if n < FEW or positive in (0, n):
            why = ONE_CLASS if n >= FEW else f"fewer than {FEW} rows"
            results[name] = Subgroup(n=n, positive=positive, why=why)
        else:
            results[name], scored[name] = Subgroup(n=n, positive=positive), inside
    for name, scores in binary_scores_by(y_N, p_N, group_N, scored, bootstraps, seed).items():
        results[name] = replace(results[name], scores={score: scores[score] for score in names})
    return results


def recalibrate(p: ArrayLike, y_few: ArrayLike, p_few: ArrayLike) -> tuple[Floats, dict[str, float]]:
    """Return p recalibrated to a new site by the fit y ~ a + b logit(p) on a few of its rows, and {"intercept",
    "slope"} (Steyerberg 2004, Stat Med 23:2567).

    Raises DataError if the few rows do not determine a slope (one class, or separated by the model).
    """
    intercept, slope = calibration_fit(y_few, p_few)
    if not np.isfinite([intercept, slope]).all():
        raise DataError(
            f"{len(np.asarray(y_few))} rows are too few to recalibrate on",
            "they have only one class, or the model separates them",
            "give --recalibrate a larger number",
        )
    clipped = np.clip(np.asarray(p, dtype=np.float64), LOGIT_CLIP, 1 - LOGIT_CLIP)
    z = intercept + slope * (np.log(clipped) - np.log1p(-clipped))
    return 1 / (1 + np.exp(-z)), {"intercept": intercept, "slope": slope}


def _rows(y: ArrayLike, p: ArrayLike, group: ArrayLike) -> tuple[NDArray[np.int64], Floats, NDArray[Any]]:
    return np.asarray(y, dtype=np.int64), np.asarray(p, dtype=np.float64), np.asarray(group)
