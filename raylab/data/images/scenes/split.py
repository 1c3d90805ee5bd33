"""Splits of scenes by place: what lies together stays together, and neighbours do not cross."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from raylab.data import splits
from raylab.data.images.scenes.scene import Place

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}
CARVED = 0.15  # fraction of the train blocks that becomes val where the source has no val split


def tile_of(place: Place, tile_m: float) -> str:
    """The square tile of `tile_m` metres a side that contains a place."""
    return f"{place.zone} {math.floor(place.x / tile_m)} {math.floor(place.y / tile_m)}"


def near_others(places: Sequence[Place], split: Sequence[str], distance: float) -> list[bool]:
    """Whether each scene is to be left out: one of train within `distance` metres (the larger of the differences in x
    and y, of centres) of one of val or test, and one of val that near one of test. Neighbours on the two sides of a
    border between zones are not recognised."""
    xy, zone, part = np.array([(p.x, p.y) for p in places]), np.array([p.zone for p in places]), np.array(split)
    near: NDArray[np.bool_] = np.zeros(len(places), dtype=bool)
    for leaves, stays in (("val", ("test",)), ("train", ("val", "test"))):
        for here in sorted(set(zone.tolist())):
            fixed = np.flatnonzero((zone == here) & np.isin(part, stays) & ~near)
            moving = np.flatnonzero((zone == here) & (part == leaves))
            if len(fixed) and len(moving):
                apart, _ = KDTree(xy[fixed]).query(xy[moving], p=np.inf)
                near[moving] = apart < distance
    return [bool(is_near) for is_near in near]


def carve_val(blocks: Sequence[str], split: Sequence[str], seed: int) -> list[str]:
    """The splits of a source with val carved from train by whole blocks."""
    train = [at for at, part in enumerate(split) if part == "train"]
    parts = splits.assign([blocks[at] for at in train], [0] * len(train), {"train": 1 - CARVED, "val": CARVED}, seed)
    out = list(split)
    for at, part in zip(train, parts, strict=True):
        out[at] = part
    return out
