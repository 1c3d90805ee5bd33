import numpy as np
import pytest

from raylab.errors import DataError
from raylab.evaluation import temperature


def drawn(sharpness: float, rows: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from calibrated probabilities, and those probabilities made `sharpness` times as sure."""
    rng = np.random.default_rng(0)
    p = temperature.scaled(rng.dirichlet((1, 1, 1), rows), 1.0)
    y = np.array([rng.choice(3, p=row) for row in p])
    return y, temperature.scaled(p, 1 / sharpness)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_was_too_sure(sharpness: float) -> None:
    y, p = drawn(sharpness)
    assert temperature.fit(y, p) == pytest.approx(sharpness, rel=0.1)


def test_scaling_changes_no_prediction_and_sums_to_one() -> None:
    _, p = drawn(3.0, 200)
    for t in (0.2, 1.0, 7.0):
        scaled = temperature.scaled(p, t)
        assert scaled.sum(axis=1) == pytest.approx(1) and (scaled.argmax(1) == p.argmax(1)).all()
    assert temperature.scaled(p, 1.0) == pytest.approx(p)
    assert np.isfinite(temperature.scaled(np.array([[1.0, 0.0, 0.0]]), 2.0)).all()


def test_rows_must_match() -> None:
    with pytest.raises(DataError, match="2 labels for 3 rows"):
        temperature.fit([0, 1], np.full((3, 3), 1 / 3))
