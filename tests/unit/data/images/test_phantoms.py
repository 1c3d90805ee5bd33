import numpy as np
import pytest

from raylab.data.images.phantoms import draw
from raylab.errors import UsageError


def test_deterministic_and_complete() -> None:
    images, labels, patients = draw(70, 48, seed=3)
    again, *_ = draw(70, 48, seed=3)
    other, *_ = draw(70, 48, seed=4)
    assert np.array_equal(images, again) and not np.array_equal(images[:50], other[:50])
    assert images.dtype == np.uint8 and images.shape == (len(labels), 48, 48)
    assert set(labels) == {0, 1, 2}
    counts = np.bincount(patients)
    assert len(counts) == 70 and counts.min() >= 1 and counts.max() <= 3
    by_patient = {p: {label for label, q in zip(labels, patients, strict=True) if p == q} for p in range(70)}
    assert all(len(found) == 1 for found in by_patient.values())


def test_disease_is_denser_inside_the_lungs() -> None:
    images, labels, _ = draw(300, 64, seed=0)
    y = np.array(labels)
    lungs = images[:, 18:40, 8:56].mean(axis=(1, 2))
    assert lungs[y == 0].mean() < lungs[y == 1].mean()
    assert lungs[y == 0].mean() < lungs[y == 2].mean()


def test_sites_differ() -> None:
    a, b = draw(40, 48, 0, "A")[0], draw(40, 48, 0, "B")[0]
    assert abs(a.mean() - b.mean()) > 10
    with pytest.raises(UsageError, match="unknown domain"):
        draw(40, 48, 0, "C")
