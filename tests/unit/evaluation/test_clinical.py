import numpy as np
import pytest

from raylab.errors import DataError
from raylab.evaluation.clinical import THRESHOLDS, decision_curve, ici, recalibrate, subgroups


def draw(n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(-1, 1.2, n)))
    return (rng.random(n) < p).astype(np.int64), p, np.arange(n)


def test_ici_is_small_where_calibrated_and_the_error_where_not():
    y, p, group = draw()
    right = ici(y, p, group, bootstraps=50)
    assert right.value < 0.02 and right.low <= right.value <= right.high + 0.02
    rng = np.random.default_rng(1)
    off = 0.3 + 0.4 * rng.random(3000)
    constant = (rng.random(3000) < off - 0.2).astype(np.int64)
    assert ici(constant, off, group, bootstraps=20).value == pytest.approx(0.2, abs=0.02)
    order = rng.permutation(3000)
    assert ici(y[order], p[order], group[order], bootstraps=1).value == pytest.approx(right.value, abs=1e-9)


def test_net_benefit_by_hand():
    y, p = np.array([1, 1, 0, 0]), np.array([0.9, 0.15, 0.35, 0.01])
    rows = {row.threshold: row for row in decision_curve(y, p, np.arange(4), bootstraps=10)}
    assert list(rows) == list(THRESHOLDS)
    assert rows[0.2].model.value == pytest.approx((1 - 1 * 0.25) / 4)  # one true, one false positive
    assert rows[0.1].model.value == pytest.approx((2 - 1 / 9) / 4)
    assert rows[0.5].model.value == pytest.approx(1 / 4)
    assert rows[0.2].everybody == pytest.approx((2 - 2 * 0.25) / 4)


def test_subgroups_are_scored_or_only_counted():
    y, p, group = draw(400)
    members = {"half": np.arange(400) < 200, "few": np.arange(400) < 10, "no onset": (y == 0)}
    found = subgroups(y, p, group, members, bootstraps=50)
    assert found["half"].n == 200 and found["half"].scores["auroc"].low < found["half"].scores["auroc"].value
    assert "fewer than 20" in found["few"].why and "one class" in found["no onset"].why


def test_recalibration_mends_a_shift():
    y, p, group = draw(6000)
    wrong = 1 / (1 + np.exp(-(2 * np.log(p / (1 - p)) + 1)))
    mended, fit = recalibrate(wrong[1000:], y[:1000], wrong[:1000])
    assert fit["slope"] == pytest.approx(0.5, abs=0.1) and fit["intercept"] == pytest.approx(-0.5, abs=0.2)
    before, after = (ici(y[1000:], q, group[1000:], bootstraps=1).value for q in (wrong[1000:], mended))
    assert after < 0.03 < before
    assert (np.argsort(mended) == np.argsort(wrong[1000:])).all()
    with pytest.raises(DataError, match="too few to recalibrate"):
        recalibrate(wrong, y[:3] * 0, wrong[:3])
