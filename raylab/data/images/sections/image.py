"""Images of sections, read by blocks of rows: TIFF files by tile or strip, also of one level of a pyramid, so that an
image may be larger than memory; PNG and JPEG files, which can only be decoded at once, up to PIXELS pixels.

What is in memory is one row of tiles, [bands, tile height, width].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylab.data.images.sections.section import Blocks
from raylab.errors import DataError

PICTURES, TIFFS = (".png", ".jpg", ".jpeg"), (".tif", ".tiff")
PIXELS = 2**26  # of files that are decoded at once
ROW_BYTES = 2**29  # of one row of tiles or strips
MODES = {"L": (1, "uint8"), "RGB": (3, "uint8"), "I;16": (1, "uint16")}
CENTIMETRE = 3  # TIFF's unit of resolution; inches are what print programs write, and say nothing of the tissue


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of itself; `um_per_px` is None if it does not."""

    width: int
    height: int
    bands: int
    bits: int
    um_per_px: float | None


def read_header(path: Path, level: int) -> ImageHeader:
    """Return the header of an image, of a pyramid that of its level `level`; DataError for what cannot be read."""
    if path.suffix.lower() in TIFFS:
        with _open(path) as file:
            base, pages = _pages(path, file, 0)[0], _pages(path, file, level)
            page = pages[0]
            _check_rows(path, pages)
            bands = len(pages) * page.samplesperpixel
            return ImageHeader(
                page.imagewidth, page.imagelength, bands, 8 * page.dtype.itemsize, _um_per_px(base, page.imagewidth)
            )
    if level:
        raise DataError(f"{path} has no level {level}", "only TIFF files are pyramids", "leave --level out")
    try:
        with Image.open(path) as picture:  # the header alone
            width, height, mode = *picture.size, picture.mode
    except OSError as error:
        raise DataError(f"cannot read {path}", str(error).partition("\n")[0][:200]) from error
    except Image.DecompressionBombError as error:  # of more than twice what Pillow takes without a warning
        raise _too_large(path) from error
    if width * height > PIXELS:
        raise _too_large(path)
    if mode not in MODES:
        raise DataError(f"{path} is of mode {mode}", f"sections are {', '.join(MODES)}", "convert it")
    bands, kind = MODES[mode]
    return ImageHeader(width, height, bands, 8 if kind == "uint8" else 16, None)


def read_blocks(path: Path, level: int, blocks: Blocks) -> Iterator[NDArray[np.unsignedinteger]]:
    """Yield the pixels of each block of rows, uint8 or uint16 [bands, rows, width]."""
    if path.suffix.lower() in TIFFS:
        yield from _tiff_blocks(path, level, blocks)
        return
    try:
        with Image.open(path) as picture:
            kind = MODES[picture.mode][1]
            pixels = np.atleast_3d(np.asarray(picture).astype(kind, copy=False)).transpose(2, 0, 1)
    except OSError as error:
        raise DataError(f"cannot read {path}", str(error).partition("\n")[0][:200]) from error
    for start, stop in blocks:
        yield pixels[:, start:stop]


def _tiff_blocks(path: Path, level: int, blocks: Blocks) -> Iterator[NDArray[np.unsignedinteger]]:
    with _open(path) as file:
        pages = _pages(path, file, level)
        page = pages[0]
        bands, tile = len(pages) * page.samplesperpixel, _tile_height(page)
        number, rows = -1, np.empty(0, page.dtype)  # the row of tiles that was read last
        for start, stop in blocks:
            out = np.empty((bands, stop - start, page.imagewidth), page.dtype.newbyteorder("="))
            for at in range(start // tile, -(-stop // tile)):
                if at != number:
                    try:
                        number, rows = at, np.concatenate([_tile_row(file, each, at) for each in pages])
                    except Exception as error:  # a damaged file fails in any part of the decoder
                        raise _unreadable(path, error) from error
                first, last = max(start, at * tile), min(stop, (at + 1) * tile)
                out[:, first - start : last - start] = rows[:, first - at * tile : last - at * tile]
            yield out


def _tile_row(file: Any, page: Any, number: int) -> NDArray[np.unsignedinteger]:
    """Row `number` of a page's tiles or strips: [samples, tile height, width]."""
    key, tile = page.keyframe, _tile_height(page.keyframe)
    across = -(-key.imagewidth // key.tilewidth) if key.is_tiled else 1
    down = -(-key.imagelength // tile)
    out = np.zeros((key.samplesperpixel, tile, key.imagewidth), key.dtype.newbyteorder("="))
    planes = key.samplesperpixel if key.planarconfig == 2 else 1  # 2: each sample has tiles of its own
    for plane in range(planes):
        for column in range(across):
            index = (plane * down + number) * across + column
            count = page.databytecounts[index]
            if count == 0:
                continue  # a tile that was left out is 0
            file.filehandle.seek(page.dataoffsets[index])
            tables = {"jpegtables": page.jpegtables} if page.jpegtables is not None else {}
            pixels, (_, _, _, left, _), _ = key.decode(file.filehandle.read(count), index, **tables)
            part = pixels[0, :, : key.imagewidth - left].transpose(2, 0, 1)  # [samples, rows, columns]
            into = slice(plane, plane + 1) if planes > 1 else slice(None)
            out[into, : part.shape[1], left : left + part.shape[2]] = part
    return out


def _pages(path: Path, file: Any, level: int) -> list[Any]:
    """The pages of a level: one with all bands, or one of each band."""
    levels = file.series[0].levels
    if not 0 <= level < len(levels):
        raise DataError(f"{path} has no level {level}", f"it has {len(levels)}, 0 the largest", "give another --level")
    pages, axes = list(levels[level].pages), levels[level].axes
    if axes not in ("YX", "YXS", "SYX") and not (len(axes) == 3 and axes.endswith("YX") and len(pages) > 1):
        raise DataError(f"{path} has the axes {axes}", "a section is one image, with all of its bands", "split it")
    if str(pages[0].dtype) not in ("uint8", "uint16"):
        raise DataError(f"{path} has values of type {pages[0].dtype}", "sections are uint8 or uint16", "convert it")
    return pages


def _too_large(path: Path) -> DataError:
    return DataError(
        f"{path} has more than {PIXELS:,} px",
        f"a {path.suffix[1:].upper()} file can only be decoded whole",
        "convert it to a tiled TIFF file, which is read by tile",
    )


def _check_rows(path: Path, pages: list[Any]) -> None:
    page = pages[0]
    needed = len(pages) * page.samplesperpixel * _tile_height(page) * page.imagewidth * page.dtype.itemsize
    if needed > ROW_BYTES:
        raise DataError(
            f"{path} would need {needed / 1e9:.1f} GB of memory for one row of its tiles or strips",
            f"{page.imagewidth:,} px wide, stored {_tile_height(page):,} px high; at most {ROW_BYTES / 1e9:.1f} GB are "
            "read at once",
            "write it in tiles of 256 or 512 px",
        )


def _tile_height(page: Any) -> int:
    return int(page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength))


def _um_per_px(base: Any, width: int) -> float | None:
    """Micrometres a pixel of a level `width` px wide, from the resolution of the largest level."""
    key = base.keyframe
    if key.resolutionunit != CENTIMETRE or key.resolution[0] <= 1:
        return None
    return float(10_000 / key.resolution[0] * key.imagewidth / width)


def _open(path: Path) -> Any:
    import tifffile  # only where there are TIFF files

    try:
        return tifffile.TiffFile(path)
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return DataError(f"cannot read {path}", why, "give a complete TIFF file, uncompressed or with deflate")
