"""Statlog Landsat (UCI): neighbourhoods of 3 x 3 Landsat MSS pixels in four bands, labelled by the central pixel.

A parquet or CSV file with the columns x1 to x36 (pixel by pixel, from the top left, its four bands together) and
`classes`, in the original order: rows 0 to 4434 are train, the other 2,000 test. Where a neighbourhood lies is not
recorded. The neighbourhoods of train and test are of one image and overlap: `prepare` counts how often.
"""

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.images.scenes.scene import Scene, SceneRequest, SceneSource
from raylab.errors import DataError, UsageError

BANDS = ("green", "red", "near infrared 1", "near infrared 2")
CLASSES = ("red soil", "cotton crop", "grey soil", "damp grey soil", "vegetation stubble", "very damp grey soil")
COLUMNS = [f"x{number}" for number in range(1, 37)]
ROWS, TRAIN = 6435, 4435
BLOCK = 25  # consecutive rows that stay together: every second row overlaps with the row before it


def read(request: SceneRequest) -> SceneSource:
    path = request.path
    if path is None:
        raise UsageError("the source statlog needs --path FILE", do="give its parquet or CSV file")
    try:
        table = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"cannot read {path}", why, "give the parquet or CSV file of Statlog Landsat") from error
    if missing := [name for name in (*COLUMNS, "classes") if name not in table.columns]:
        raise DataError(f"{path} has no column {', '.join(missing[:5])}", "Statlog has x1 to x36 and classes")
    if table.height != ROWS:
        raise DataError(f"{path} has {table.height:,} rows", f"the original split is of {ROWS:,}", "give the whole set")
    names = table["classes"].cast(pl.String).to_list()
    if strange := sorted(set(names) - set(CLASSES)):
        raise DataError(f"{path}: class '{strange[0]}'", f"known: {', '.join(CLASSES)}", "correct the file")
    values = table.select(COLUMNS).to_numpy()
    if not ((values >= 0) & (values <= 255) & (values == np.rint(values))).all():
        raise DataError(f"{path} has values that are not integers of 0 to 255", do="give the file as distributed")
    pixels = values.astype(np.uint8).reshape(-1, 3, 3, 4).transpose(0, 3, 1, 2)
    scenes = [
        Scene(f"row-{row}", (CLASSES.index(name),), None, block_of(row), "train" if row < TRAIN else "test")
        for row, name in enumerate(names)
    ]
    shared = overlapping(pixels[TRAIN:], pixels[:TRAIN])
    warning = (
        f"the original split is not one by place: {shared:,} of {ROWS - TRAIN:,} test neighbourhoods share six of "
        "their nine pixels with a train neighbourhood, so scores are higher than they would be elsewhere"
    )
    return SceneSource(
        "statlog", BANDS, CLASSES, 3, 8, scenes, lambda at: pixels[at], unit="block", warnings=(warning,)
    )


def block_of(row: int) -> str:
    """The block of consecutive rows that a row belongs to; none has rows of both parts of the original split."""
    return f"train-{row // BLOCK:03d}" if row < TRAIN else f"test-{(row - TRAIN) // BLOCK:03d}"


def overlapping(some: NDArray[np.uint8], others: NDArray[np.uint8]) -> int:
    """How many of the neighbourhoods `some` uint8 [N, bands, 3, 3] equal one of `others` where the two would overlap
    if it were moved by one pixel up, down, left or right."""
    found: NDArray[np.bool_] = np.zeros(len(some), dtype=bool)
    first, last, all_three = slice(0, 2), slice(1, 3), slice(0, 3)
    for mine, theirs in ((first, last), (last, first)):
        for ours, others_part in (
            (some[:, :, mine, all_three], others[:, :, theirs, all_three]),
            (some[:, :, all_three, mine], others[:, :, all_three, theirs]),
        ):
            there = {part.tobytes() for part in others_part}
            found |= np.array([part.tobytes() in there for part in ours])
    return int(found.sum())
