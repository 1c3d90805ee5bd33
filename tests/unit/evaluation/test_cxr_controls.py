"""Controls of image scores: what the border alone gives away, and what is left within one source."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raylab.data.images.dataset import load_images
from raylab.data.images.prepare import prepare_images
from raylab.errors import DataError
from raylab.evaluation.cxr_controls import border_probe, within_source
from raylab.evaluation.metrics import confusion_by

CLASSES = ("normal", "pneumonia", "COVID-19")


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose frame alone tells the class: dark, grey, bright. Source x has the first two, y the last."""
    root = tmp_path_factory.mktemp("framed")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for n in range(120):
        k = n % 3
        pixels = rng.integers(0, 256, (128, 128)).astype(np.uint8)
        framed = np.full((150, 150), (30, 128, 220)[k], np.uint8)
        framed[11:139, 11:139] = pixels
        Image.fromarray(framed).save(root / "images" / f"{n}.png")
        lists[("train", "val", "test")[n // 3 % 3]].append(f"p{n} {n}.png {CLASSES[k]} {'xxy'[k]}")
    for name, rows in lists.items():
        (root / f"{name}.txt").write_text("\n".join(rows))
    paths = (root / f"{name}.txt" for name in ("train", "val", "test"))
    prepare_images("covidnet", root / "out", root / "images", *paths, size=64)
    return root


def test_the_border_probe_finds_what_the_frame_gives_away(framed: Path, tmp_path: Path) -> None:
    probe = border_probe(framed / "out", tmp_path)
    test = load_images(framed / "out", "test")
    p = probe(test)
    assert p.shape == (len(test), 3) and p.sum(axis=1) == pytest.approx(1)
    assert (p.argmax(axis=1) == test.y).mean() > 0.95 and probe.val_macro_recall > 0.95
    assert len(list(tmp_path.iterdir())) == 1
    again = border_probe(framed / "out", tmp_path)  # read from its file
    assert np.array_equal(again(test), p)
    masked = load_images(framed / "out", "test", mask="centre")
    assert np.array_equal(probe(masked), p)


def test_the_border_probe_sees_no_centre(framed: Path, tmp_path: Path) -> None:
    probe = border_probe(framed / "out", tmp_path)
    test = load_images(framed / "out", "test")
    p = probe(test)
    test.images = test.images[np.arange(len(test.images))]
    test.images[:, 10:54, 10:54] = 99
    assert np.array_equal(probe(test), p)
    test.images[:, :3] = 0
    assert not np.array_equal(probe(test), p)


def test_other_classes_are_refused(framed: Path, tmp_path: Path) -> None:
    probe = border_probe(framed / "out", tmp_path)
    test = load_images(framed / "out", "test")
    test.spec = {**test.spec, "classes": ["a", "b", "c"]}
    with pytest.raises(DataError, match="the border probe has the classes"):
        probe(test)


def test_contrasts_are_of_one_source(framed: Path) -> None:
    test = load_images(framed / "out", "test")
    perfect = np.eye(3)[test.y] * 0.9 + 0.1 / 3
    found = list(within_source(test, perfect, 50))
    assert [(s, a, b) for s, a, b, _ in found] == [("x", "pneumonia", "normal")]  # y has one class
    assert found[0][3].value == 1.0 and sum(found[0][3].n) == (test.source == "x").sum()
    blind = np.full((len(test), 3), 1 / 3)
    assert next(within_source(test, blind, 50))[3].value == 0.5


def test_confusions_by_stratum_add_up(framed: Path) -> None:
    test = load_images(framed / "out", "test")
    p = np.eye(3)[np.roll(test.y, 1)]
    by = confusion_by(test.source, test.y, p)
    assert set(by) == {"x", "y"}
    total = np.sum([by["x"], by["y"]], axis=0)
    assert total.sum() == len(test) and total[0].sum() == (test.y == 0).sum()
