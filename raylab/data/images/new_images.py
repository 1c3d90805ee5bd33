"""New chest X-rays: files, without labels, become the rows and inputs of a trained model.

They are read, cropped and resized as in `prepare`, and standardised with the model's own statistics. Arrays are not
taken: which value is black, and which window shows the lung, is in the file.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from raylab.data.images.dataset import ImageInputs
from raylab.data.images.decode import frame, read_picture
from raylab.data.images.grey import Grey
from raylab.data.images.prepare import is_dull
from raylab.data.samples import NewRows
from raylab.errors import DataError


def read_new_images(files: Any, spec: dict[str, Any]) -> NewRows:
    """Read image files, or all files of a folder and those below it. Rows: file; view (PA, AP, ..., as the file says);
    reason (null, or why the file cannot be used). Raises DataError for anything but existing paths."""
    paths = list_files(files)
    size = int(spec.get("prepared_size", spec["size"]))
    images: list[Grey] = []
    views: list[str] = []
    reasons: list[str | None] = []
    for path in paths:
        try:
            picture = read_picture(path, size)
        except DataError as error:
            views.append("")
            reasons.append(f"{error.what.removeprefix(f'{path} ')}{f': {error.why}' if error.why else ''}")
        else:
            images.append(frame(picture.grey, size))
            views.append(picture.view)
            reasons.append(None)
    rows = pl.DataFrame(
        {"file": [str(path) for path in paths], "view": views, "reason": reasons},
        schema_overrides={"reason": pl.String},
    )
    notes = [f"files that cannot be used: {n:,}"] if (n := len(paths) - len(images)) else []
    if dull := sum(map(is_dull, images)):
        notes.append(f"images that use few grey levels: {dull:,}")
    inputs = ImageInputs(np.stack(images), np.arange(len(images)), spec, {}) if images else None
    return NewRows(rows, inputs, notes)


def list_files(files: Any) -> list[Path]:
    """Return the files that a path, or several, stand for, in the order of their names; hidden ones are left out."""
    given = [files] if isinstance(files, str | os.PathLike) else list(files) if isinstance(files, Iterable) else [files]
    if not all(isinstance(one, str | os.PathLike) for one in given):
        kind = type(files).__name__
        raise DataError(f"images cannot be read from a {kind}", do="give the path of a folder, or paths of image files")
    paths: list[Path] = []
    for one in map(Path, given):
        if one.is_dir():
            below = sorted(path for path in one.rglob("*") if path.is_file())
            paths += [path for path in below if not any(part.startswith(".") for part in path.relative_to(one).parts)]
        elif one.is_file():
            paths.append(one)
        else:
            raise DataError(f"there is no file or folder {one}", do="give the path of a folder or of image files")
    if not paths:
        raise DataError("there are no image files to predict", do="give a folder that has some")
    return paths
