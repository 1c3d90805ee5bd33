"""Measure the coverage of 95% CIs in small samples: how many patients with and without the outcome a bootstrap needs.

For each number of patients per class and each true AUROC (binormal scores, one row per patient): the percentage of
samples in which the interval contains the true value, and in which it has no width. Then the same for the errors of a
regression, and for Wilson intervals of proportions with clustered rows.

    python -m benchmarks.interval_coverage [--samples 1000] [--bootstraps 500]
"""

import argparse

import numpy as np
from scipy.stats import norm

from raylab.evaluation import intervals
from raylab.evaluation.intervals import Floats, resample_weights
from raylab.evaluation.metrics import _brier, _r2, _ranking

PATIENTS = (4, 6, 8, 10, 15, 20, 30)  # with the outcome
AUROCS = (0.7, 0.8, 0.9, 0.95)
SCORES = ("auroc", "auprc", "brier", "difference")
MANY = 2_000_000  # patients that represent the population


def draw(rng: np.random.Generator, positives: int, negatives: int, auroc: float) -> tuple[Floats, Floats, Floats]:
    """y and two predictions p and q of the same AUROC that share half of their noise, sorted by descending p."""
    y = np.repeat([1, 0], [positives, negatives])
    shared = rng.normal(size=len(y))
    shift = np.sqrt(2) * norm.ppf(auroc)
    p, q = (norm.cdf(shift * y + (shared + rng.normal(size=len(y))) / np.sqrt(2) - shift / 2) for _ in range(2))
    order = np.lexsort((y, -p))
    return y[order], p[order], q[order]


def scores(y: Floats, p: Floats, q: Floats, w: Floats) -> dict[str, Floats]:
    other = np.lexsort((y, -q))
    found = _ranking(y, p, w) | _brier(y, p, w)
    found["difference"] = found["auroc"] - _ranking(y[other], q[other], w[:, other])["auroc"]
    return {name: found[name] for name in SCORES}


def regression(rng: np.random.Generator, samples: int, bootstraps: int) -> None:
    """Print the coverage for n patients of the mean absolute error of normal errors, and of R2 = 0.75."""
    for n in PATIENTS:
        covered = dict.fromkeys(("mae", "r2"), 0)
        for sample in range(samples):
            y = rng.normal(size=(n, 1))
            p = y + 0.5 * rng.normal(size=(n, 1))
            weights = np.concatenate(list(resample_weights(np.arange(n), bootstraps, sample)))
            found = {"mae": weights @ np.abs(p - y)[:, 0] / n, "r2": _r2(y, p, weights)[:, 0]}
            for name, truth in (("mae", 0.5 * np.sqrt(2 / np.pi)), ("r2", 0.75)):
                low, high = np.nanpercentile(found[name], [2.5, 97.5])
                covered[name] += low <= truth <= high
        print(f"{n:4d} patients: MAE {100 * covered['mae'] / samples:.1f}%, R2 {100 * covered['r2'] / samples:.1f}%")


def proportions(rng: np.random.Generator, samples: int) -> None:
    """Print the coverage of Wilson intervals of a mean proportion of 0.5, for patients with 10 correlated rows each."""
    for n in PATIENTS:
        shown = []
        for spread in (0.5, 2.0, 50.0):  # Beta(spread, spread): from nearly equal rows to independent rows
            covered = 0
            for _ in range(samples):
                group = np.repeat(np.arange(n), 10)
                hits = rng.random(10 * n) < rng.beta(spread, spread, n)[group]
                score = intervals.proportion(hits, np.ones(10 * n), group, "")
                covered += score.low <= 0.5 <= score.high
            shown.append(f"{100 * covered / samples:.1f}%")
        print(f"{n:4d} patients, 10 rows each: {', '.join(shown)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--bootstraps", type=int, default=500)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    print("with without AUROC  " + "  ".join(f"{name:>16}" for name in SCORES) + "   (covered %, without width %)")
    for times in (1, 4):
        truths = {}
        for auroc in AUROCS:
            y, p, q = draw(rng, MANY // (1 + times), MANY * times // (1 + times), auroc)
            truths[auroc] = {name: float(v[0]) for name, v in scores(y, p, q, np.ones((1, len(y)))).items()}
            truths[auroc] |= {"auroc": auroc, "difference": 0.0}
        for positives in PATIENTS:
            for auroc in AUROCS:
                covered, flat = dict.fromkeys(SCORES, 0), dict.fromkeys(SCORES, 0)
                for sample in range(options.samples):
                    y, p, q = draw(rng, positives, times * positives, auroc)
                    weights = resample_weights(np.arange(len(y)), options.bootstraps, sample)
                    blocks = [scores(y, p, q, w) for w in weights]
                    for name in SCORES:
                        values = np.concatenate([block[name] for block in blocks])
                        low, high = np.nanpercentile(values, [2.5, 97.5])
                        covered[name] += low <= truths[auroc][name] <= high
                        flat[name] += high - low < intervals.FLAT
                shown = (
                    f"{100 * covered[n] / options.samples:9.1f} {100 * flat[n] / options.samples:6.1f}" for n in SCORES
                )
                print(f"{positives:4d} {times * positives:7d} {auroc:5.2f}  " + "  ".join(shown), flush=True)
    regression(rng, options.samples, options.bootstraps)
    proportions(rng, options.samples)


if __name__ == "__main__":
    main()
