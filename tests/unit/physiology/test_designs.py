import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylab.errors import UsageError
from raylab.physiology import designs


@pytest.mark.parametrize("design", designs.DESIGNS)
@given(cut=st.integers(0, 64))
def test_portions_make_the_whole(design, cut):
    size = 4 if design == "grid" else 64
    whole = designs.unit_points(design, size, 3, 7, 0, 64)
    parts = [designs.unit_points(design, size, 3, 7, a, b) for a, b in ((0, cut), (cut, 64))]
    assert np.array_equal(whole, np.concatenate(parts))
    assert ((whole >= 0) & (whole <= 1)).all()


def test_sobol_fills_space_better_than_chance():
    corner = (designs.unit_points("sobol", 1024, 3, 0, 0, 1024) < 0.5).all(axis=1).sum()
    assert abs(corner - 128) <= 4


def test_a_latin_hypercube_has_one_point_a_slice():
    points = designs.unit_points("lhs", 50, 4, 1, 0, 50)
    assert (np.sort((points * 50).astype(int), axis=0) == np.arange(50)[:, None]).all()


def test_a_grid_has_its_ends():
    points = designs.points({"a": "uniform(1,3)", "b": "5", "c": "uniform(0,1)"}, "grid", 3, 0, 0, 9)
    assert points["a"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert points["c"].tolist() == [0, 0.5, 1] * 3
    assert points["b"] == 5


def test_truncated_distributions_keep_their_bounds_and_shape():
    unit = (np.arange(100000) + 0.5) / 100000
    normal = designs.bend(unit, "normal", (0.2, 0.1, 0.0, 0.5))
    assert normal.min() >= 0
    assert normal.max() <= 0.5
    assert np.median(normal) == pytest.approx(0.2, abs=0.01)
    lognormal = designs.bend(unit, "lognormal", (10.0, 0.5, 2.0, 100.0))
    assert np.median(lognormal) == pytest.approx(10, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.5, rel=0.05)
    logs = np.log(designs.bend(unit, "loguniform", (1.0, 100.0)))
    assert logs.mean() == pytest.approx(np.log(10), rel=1e-3)


@pytest.mark.parametrize(
    "text, told",
    [
        ("uniform(1)", "takes 2 finite numbers"),
        ("uniform(2,1)", "lower bound"),
        ("beta(1,2)", "unknown distribution"),
        ("normal(1,0,0,2)", "above 0"),
        ("loguniform(0,1)", "above 0"),
        ("uniform(a,b)", "not a number"),
        ("uniform(1,2", "neither a number"),
        ("nan", "finite"),
    ],
)
def test_what_is_no_distribution_is_refused(text, told):
    with pytest.raises(UsageError, match=told):
        designs.distribution("shunt", text)


def test_a_grid_of_too_many_inputs_is_refused():
    with pytest.raises(UsageError, match="vary fewer"):
        designs.count("grid", 10, 12)
