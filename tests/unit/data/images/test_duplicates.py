import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from raylab.data.images.decode import frame
from raylab.data.images.duplicates import FINE, merged, pairs, thumbnails

N = 12


def texture(seed: int, side: int = 240) -> np.ndarray:
    """Smooth noise of several scales, uint8: no two seeds alike, and detail that survives a JPEG."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.random((n, n), np.float32)).resize((side, side), Image.Resampling.BICUBIC)) / n
        for n in (4, 8, 16)
    ]
    total = np.sum(layers, axis=0)
    return ((total - total.min()) / (total.max() - total.min()) * 255).astype(np.uint8)


def copy(image: np.ndarray, cut: float = 0.03, gamma: float = 1.2, scale: float = 0.7) -> np.ndarray:
    """Cropped on two sides, rescaled, brightened and recompressed."""
    edge = round(cut * len(image))
    pixels = Image.fromarray(image[edge:, : len(image) - edge])
    pixels = pixels.resize((round(pixels.width * scale), round(pixels.height * scale)))
    bright = (255 * (np.asarray(pixels) / 255) ** gamma).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(bright).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


@pytest.fixture(scope="module")
def originals() -> np.ndarray:
    return np.stack([frame(texture(seed), 96) for seed in range(N)])


def test_copies_are_found_and_nothing_else(originals: np.ndarray) -> None:
    assert pairs(originals) == []
    copies = np.stack([frame(copy(texture(seed)), 96) for seed in range(N)])
    found = pairs(np.concatenate([originals, copies]))
    assert {(i, j) for i, j, _ in found} == {(seed, N + seed) for seed in range(N)}
    assert all(FINE <= ncc <= 1.0001 for *_, ncc in found)


def test_across_two_sets(originals: np.ndarray) -> None:
    others = np.stack([frame(texture(90), 64), frame(copy(texture(3)), 64)])
    assert [(i, j) for i, j, _ in pairs(originals, others)] == [(3, 1)]
    assert pairs(originals[:3], others) == []
    assert pairs(others, originals) == [(j, i, ncc) for i, j, ncc in pairs(originals, others)], "whichever way round"


def test_thumbnails_are_small_and_in_order(originals: np.ndarray) -> None:
    large = np.stack([frame(texture(seed), 200) for seed in range(3)])
    small = thumbnails(large, [2, 0])
    assert small.shape == (2, 96, 96)
    assert np.abs(small[1].astype(float) - originals[0]).mean() < 4
    assert np.array_equal(thumbnails(originals), originals)


def test_rows_that_share_a_name_share_a_group() -> None:
    assert merged([["b"], ["c"], ["b", "a"], ["d", "e"], ["e"]]) == ["a", "c", "a", "d", "d"]
    assert merged([["p1", "~file x"], ["p2", "~file x"], ["p3"]]) == ["p1", "p1", "p3"]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=8))
def test_groups_are_the_connected_components(names: list[list[str]]) -> None:
    got = merged(names)
    reach = {name: {name} for row in names for name in row}
    for _ in range(len(reach)):
        for row in names:
            for one, other in pairwise(row):
                joined = reach[one] | reach[other]
                for name in joined:
                    reach[name] = reach[name] | joined
    assert got == [min(reach[row[0]]) for row in names]
