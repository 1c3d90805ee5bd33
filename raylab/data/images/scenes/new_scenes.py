"""New scenes: files and patches, without labels, become the rows and inputs of a trained model.

They are read and checked as in `prepare`, and standardised with the model's own statistics.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from raylab.data.images.new_images import list_files
from raylab.data.images.scenes.dataset import SceneInputs
from raylab.data.images.scenes.prepare import find_defect
from raylab.data.images.scenes.sources import bigearthnet, eurosat
from raylab.data.images.scenes.tiff import read_header, read_pixels
from raylab.data.samples import NewRows
from raylab.errors import DataError


def read_new_scenes(files: Any, spec: dict[str, Any]) -> NewRows:
    """Read files with all bands of a scene (GeoTIFF, JPEG, PNG) and folders of BigEarthNet's patches, or all of them in
    a folder and those below it. Rows: file; reason (null, or why it cannot be used). Raises DataError for anything but
    existing paths."""
    paths = list(dict.fromkeys(path.parent if bigearthnet.is_in_patch(path) else path for path in list_files(files)))
    scenes: list[NDArray[np.unsignedinteger]] = []
    reasons: list[str | None] = []
    for path in paths:
        try:
            scenes.append(read_scene(path, spec))
        except DataError as error:
            reasons.append(f"{error.what.removeprefix(f'{path} ')}{f': {error.why}' if error.why else ''}")
        else:
            reasons.append(None)
    rows = pl.DataFrame(
        {"file": [str(path) for path in paths], "reason": reasons}, schema_overrides={"reason": pl.String}
    )
    notes = [f"scenes that cannot be used: {n:,}"] if (n := len(paths) - len(scenes)) else []
    return NewRows(rows, SceneInputs(np.stack(scenes), spec) if scenes else None, notes)


def read_scene(path: Path, spec: Mapping[str, Any]) -> NDArray[np.unsignedinteger]:
    """The bands that the model reads, [C, S, S] in their order, of a file or a patch; DataError if it has others,
    or pixels of another size or type, or shows nothing."""
    pixels: NDArray[np.unsignedinteger]
    nodata, metres = None, None
    if path.is_dir():
        pixels, bands = bigearthnet.read_patch(path), bigearthnet.BANDS
        nodata, metres = bigearthnet.NODATA, bigearthnet.METRES
    elif path.suffix.lower() in eurosat.TIFFS:
        header = read_header(path)
        pixels, bands = read_pixels(path), eurosat.band_names(header.bands)
        nodata, metres = eurosat.nodata_of(header), header.resolution_m
    elif path.suffix.lower() in eurosat.PICTURES:
        mode, _ = eurosat.read_picture_header(path)
        pixels, bands = eurosat.read_picture(path), eurosat.COLOURS[mode]
    else:
        raise DataError(f"{path} is not a GeoTIFF, JPEG or PNG file")
    if missing := [band for band in spec["bands"] if band not in bands]:
        raise DataError(f"{path} lacks the band {', '.join(missing)}", f"it has {', '.join(bands)}")
    side = spec.get("prepared_size", spec["size"])  # models of earlier versions lack it, and the bits
    for what, own, needed in (
        ("pixels", "{} x {}".format(*pixels.shape[1:]), f"{side} x {side}"),
        ("bits", 8 * pixels.dtype.itemsize, spec.get("bits", 8 * pixels.dtype.itemsize)),
        ("metres a side of a pixel", metres, spec["resolution_m"]),
        ("as the value without data", nodata, spec["nodata"]),
    ):
        if own != needed:
            raise DataError(f"{path} has {_shown(own)} {what}, and the scenes of the model {_shown(needed)}")
    if defect := find_defect(pixels, bands, nodata):
        raise DataError(f"{path} has {defect}")
    return pixels[[bands.index(band) for band in spec["bands"]]]


def _shown(value: object) -> str:
    return "no known" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
