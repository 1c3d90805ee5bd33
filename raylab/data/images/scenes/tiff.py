"""GeoTIFF files of scenes: pixels of any number of bands, where they lie, and which value means no data.

Sizes and tags are read first, so that a file that is larger than a scene is refused before its pixels are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raylab.data.images.scenes.scene import MOST, Place
from raylab.errors import DataError

SCALE, TIEPOINT, GEO_KEYS, GDAL_NODATA = 33550, 33922, 34735, 42113  # tags (OGC GeoTIFF 1.1, and GDAL's)
PROJECTED_CRS = 3072  # GeoKey: the EPSG code of a projection, such as 32633 (UTM zone 33N)
USER_DEFINED = 32767


@dataclass(frozen=True)
class TiffHeader:
    """What a file says of itself. `resolution_m` and `place` are None without a projection; `place` is the centre."""

    bands: int
    height: int
    width: int
    bits: int
    resolution_m: float | None
    place: Place | None
    nodata: int | None


def read_header(path: Path) -> TiffHeader:
    """The header of a GeoTIFF; DataError for another kind of file, values other than uint8 and uint16, and scenes of
    more than MOST pixels a side."""
    tifffile = _library()
    try:
        with tifffile.TiffFile(path) as file:
            if len(file.pages) != 1:
                raise DataError(f"{path} has {len(file.pages)} images", "a scene is one image with all of its bands")
            page = file.pages[0]
            bands, height, width = page.samplesperpixel, page.imagelength, page.imagewidth
            kind = str(page.dtype)
            tags = {code: page.tags[code].value for code in (SCALE, TIEPOINT, GEO_KEYS, GDAL_NODATA)
                    if code in page.tags}  # fmt: skip
    except DataError:
        raise
    except Exception as error:  # a damaged file fails in any part of the decoder
        raise _unreadable(path, error) from error
    if kind not in ("uint8", "uint16"):
        raise DataError(f"{path} has values of type {kind}", "scenes are of uint8 or uint16", "convert it")
    check_size(path, width, height)
    place, resolution = _place(path, tags, width, height)
    return TiffHeader(bands, height, width, 8 if kind == "uint8" else 16, resolution, place, _nodata(path, tags))


def read_pixels(path: Path) -> NDArray[np.unsignedinteger]:
    """[bands, H, W] of a file whose header has been read; DataError if its pixels cannot be."""
    tifffile = _library()
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            pixels: NDArray[np.unsignedinteger] = np.asarray(page.asarray())
            is_last = page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    if pixels.ndim == 2:
        return pixels[None]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if is_last else pixels


def check_size(path: Path, width: int, height: int) -> None:
    """Raise DataError for a file that is not a scene but an image to be cut into scenes."""
    if max(width, height) > MOST:
        raise too_large(path, f"{width:,} x {height:,} px")


def too_large(path: Path, size: str = "too many pixels") -> DataError:
    """The error for an image that is to be cut into scenes."""
    return DataError(f"{path} has {size}", f"scenes have at most {MOST} px a side", "cut it into scenes first")


def _place(path: Path, tags: dict[int, Any], width: int, height: int) -> tuple[Place | None, float | None]:
    keys = tags.get(GEO_KEYS, ())
    codes = {keys[at]: keys[at + 3] for at in range(4, len(keys) - 3, 4)}
    epsg = codes.get(PROJECTED_CRS)
    if epsg in (None, USER_DEFINED) or SCALE not in tags or TIEPOINT not in tags:
        return None, None
    (scale_x, scale_y, *_), (column, row, _, x, y, *_) = tags[SCALE], tags[TIEPOINT]
    if abs(scale_x - scale_y) > 1e-6 * scale_x:
        raise DataError(f"{path} has pixels of {scale_x:g} x {scale_y:g} m", "they must be square", "resample it")
    centre = x + (width / 2 - column) * scale_x, y - (height / 2 - row) * scale_y
    return Place(str(epsg), *centre), float(scale_x)


def _nodata(path: Path, tags: dict[int, Any]) -> int | None:
    text = str(tags.get(GDAL_NODATA, "")).strip("\0 ")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{path} says that its value without data is '{text}'", do="correct its tag") from error
    return int(value) if value.is_integer() and value >= 0 else None  # no uint has any other value


def _library() -> Any:
    import tifffile  # only where there are GeoTIFF files

    return tifffile


def _unreadable(path: Path, error: Exception) -> DataError:
    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return DataError(f"cannot read {path}", why, "give a complete GeoTIFF, uncompressed or with deflate")
