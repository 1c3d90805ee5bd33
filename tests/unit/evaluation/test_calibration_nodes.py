"""Calibration fits of many rows: sums over nodes give what sums over rows give."""

import numpy as np
import pytest

from raylab.evaluation import metrics
from raylab.evaluation.intervals import resample_weights

N = 30_000


def rows(slope: float = 1.0, noise: float = 0.5, decimals: int = 16, positives: int = N, center: float = -2.0):
    """y, x from the highest x down; at most `positives` with the outcome."""
    rng = np.random.default_rng(7)
    x = rng.normal(center, 1.3, N)
    y = (rng.random(N) < 1 / (1 + np.exp(-slope * x))).astype(np.int64)
    y[np.flatnonzero(y)[positives:]] = 0
    p = (1 / (1 + np.exp(-(x + rng.normal(0, noise, N))))).round(decimals)
    order = metrics._from_highest(y, p)
    return y[order], metrics._logit(p[order])


def compare(y: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    calibration = metrics._Calibration(y, x)
    assert calibration.nodes is not None
    slope, intercept = calibration.fits(w)
    expected = metrics._calibration(y, x, w, free_slope=True)[:, 1]
    assert slope == pytest.approx(expected, rel=1e-9, abs=1e-10, nan_ok=True)
    expected = metrics._calibration(y, x, w, free_slope=False)[:, 0]
    assert intercept == pytest.approx(expected, rel=1e-9, abs=1e-10, nan_ok=True)


def resamples(count: int) -> np.ndarray:
    return np.concatenate([*resample_weights(np.arange(N), count, seed=1)])


@pytest.mark.parametrize(
    "data",
    [{}, {"slope": 3.0, "noise": 0.2}, {"slope": 0.2}, {"decimals": 2}, {"decimals": 1}, {"positives": 12}],
    ids=str,
)
def test_fits_of_resamples_are_those_of_their_rows(data):
    compare(*rows(**data), resamples(3))


def test_a_resample_much_steeper_than_the_data_is_fitted_on_its_rows():
    y, x = rows()
    steep = (np.random.default_rng(0).random(N) < 1 / (1 + np.exp(-9 * (x + 2)))) == (y == 1)
    w = steep.astype(np.float64)[None]
    assert metrics._calibration(y, x, w, free_slope=True)[0, 1] > 4
    compare(y, x, w)


def test_a_resample_that_is_separated_or_lacks_a_class_has_no_fit():
    y, x = rows()
    middle = np.median(x)
    separated = ((y == 1) == (x > middle)).astype(np.float64)
    slope, intercept = metrics._Calibration(y, x).fits(np.stack([separated, (y == 0).astype(np.float64)]))
    assert np.isnan(slope).all() and np.isnan(intercept).tolist() == [False, True]


def test_few_rows_have_no_nodes():
    _, x = rows()
    assert metrics._Nodes.of(x[: metrics.MANY - 1], 1.0) is None
    assert metrics._Nodes.of(x, 300.0) is None
