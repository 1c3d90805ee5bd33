"""One image file -> one grey radiograph, uint8 [H, W], 0 = black (air) .. 255 = white (dense).

The only way from a file to pixels: `prepare`, `evaluate` and `predict` go it. PNG and JPEG of 8 bits keep their
values; colour and palettes become luminance. PNG of 16 bits, grey or colour, is stretched linearly from its .5 to its
99.5 percentile, because files of 10 to 14 bits in a 16-bit container are common. What is transparent is not part of
the picture: it counts for nothing and is black. DICOM has a file of its own, dicom.py.

Memory is bounded: a header that announces more than PIXELS pixels is refused before anything is unpacked. A baseline
JPEG, whose decoder reduces while reading, may be up to REDUCED times as large.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from raylab.data.images.grey import KEPT, STRETCHED, Grey, Picture, luminance, stretch, to_grey
from raylab.errors import DataError

PIXELS = 100_000_000  # the largest radiographs have about 20 million
REDUCED = 16
SMALLEST = 32  # px; smaller images are icons, not radiographs
ARCHIVES = {b"\x1f\x8b": "a gzip archive", b"PK\x03\x04": "a zip archive", b"%PDF": "a PDF document"}
LEVELS = {"L;2": 85, "L;4": 17}  # Pillow's factors for PNG of 2 and 4 bits
TOP = 0.08  # fraction of the height that COVID-Net cuts off, because it contains burned-in text


def decode(path: Path, least: int = 224) -> Grey:
    """The radiograph of a PNG, JPEG or DICOM file, uint8 [H, W]; see `read_picture`."""
    return read_picture(path, least).grey


def read_picture(path: Path, least: int = 224) -> Picture:
    """The radiograph of a PNG, JPEG or DICOM file, recognised by content, not by name, with opacity already applied.

    `least`: the side in px to which it will be resized; a JPEG several times larger may be returned at reduced size.
    Raises DataError, with the file and the reason, for every file that cannot be used.
    """
    try:
        with path.open("rb") as file:
            head = file.read(132)
        if _is_dicom(head):
            # Imported here because most data sets have no DICOM and pydicom is slow to import.
            from raylab.data.images.dicom import read_dicom

            picture = read_dicom(path, PIXELS)
        elif head.startswith(b"\xff\xd8"):
            picture = _read_jpeg(path, least)
        elif head.startswith(b"\x89PNG"):
            picture = _read_png(path)
        else:
            raise DataError(f"{path} is not a PNG, JPEG or DICOM image", _kind(path, head), "convert it to one of them")
    except DataError:
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise DataError(f"{path} cannot be decoded", f"{type(error).__name__}: {error}") from error
    height, width = picture.grey.shape
    if min(height, width) < SMALLEST:
        raise DataError(f"{path} is too small", f"{width}x{height} px, at least {SMALLEST} are needed")
    return _compose(path, picture)


def frame(grey: Grey, size: int) -> Grey:
    """COVID-Net's view, uint8 [size, size]: without the top 8%, the central square, resized with antialiasing."""
    below = grey[round(TOP * grey.shape[0]) :]
    height, width = below.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(below[top : top + side, left : left + side])
    # Bilinear: Pillow widens the kernel when shrinking (no aliasing), and values never leave 0..255.
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def _is_dicom(head: bytes) -> bool:
    """Whether a file starts like DICOM: with `DICM` at byte 128 or, without preamble, with an element of its header or
    of the first group of a data set (group 2 or 8): a tag, then a VR or a short length."""
    if head[128:] == b"DICM":
        return True
    has_vr = head[4:6].isalpha() and head[4:6].isupper()
    if head[:2] in (b"\x02\0", b"\x08\0"):
        return has_vr or 0 < int.from_bytes(head[4:8], "little") <= 128
    return head[:2] == b"\0\x08" and has_vr  # explicit big endian


def _kind(path: Path, head: bytes) -> str:
    try:
        with Image.open(path) as image:
            return f"it is {image.format_description or image.format}"
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        known = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
        return f"it is {known}" if known else f"it begins with {head[:8]!r}" if head else "it is empty"


def _compose(path: Path, picture: Picture) -> Picture:
    """The picture composited over black. Refuses one in which nothing is visible."""
    grey, opacity = picture.grey, picture.opacity
    visible = grey if opacity is None else grey[opacity > 0]
    if visible.size == 0:
        raise DataError(f"{path} shows nothing", "all its pixels are transparent or padding")
    if visible.min() == visible.max():
        raise DataError(f"{path} shows nothing", "all its pixels are equal")
    return picture if opacity is None else Picture(to_grey(grey * opacity), picture.contrast, view=picture.view)


def _bound(path: Path, pixels: int, limit: int) -> None:
    if pixels > limit:
        raise DataError(f"{path} is refused", f"{pixels / 1e6:,.0f} million pixels, at most {limit / 1e6:,.0f} million")


def _read_jpeg(path: Path, least: int) -> Picture:
    try:
        opened = JpegImageFile(path)
    except SyntaxError as error:
        why = f"JPEG is read with 8 bits, not with 12 or 16, and no JPEG-LS; Pillow says: {error}"
        raise DataError(
            f"{path} cannot be decoded", why, "convert it to PNG, with 16 bits if it has more than 8"
        ) from error
    with opened as image:
        # A progressive file keeps all coefficients in memory, so reducing it does not bound the memory.
        _bound(path, image.width * image.height, PIXELS * (1 if image.info.get("progressive") else REDUCED))
        if image.mode == "CMYK" and "adobe" not in image.info:
            raise DataError(f"{path} is refused", "a CMYK JPEG without Adobe's marker: black may be 0 or 255")
        if min(image.size) > 4 * least:
            image.draft("L", (2 * least, 2 * least))  # 1/2, 1/4 or 1/8, never below the requested size
        _bound(path, image.width * image.height, PIXELS)
        return Picture(np.asarray(ImageOps.exif_transpose(image).convert("L")), KEPT)


def _read_png(path: Path) -> Picture:
    # The plug-in itself, because Image.open has its own process-wide pixel limit.
    with PngImageFile(path) as image:
        _bound(path, image.width * image.height, PIXELS)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise DataError(f"{path} is not one radiograph", f"animated PNG with {frames} frames", "export one of them")
        stored = str(image.tile[0].args)  # channels and bits of the file in Pillow's notation: L;4, RGB;16B
        clear = image.info.get("transparency")  # tRNS: the transparent colour, or the opacities of a palette
        if stored.endswith(";16B") and image.mode != "I;16":
            values = _read_deep_channels(path, stored.removesuffix(";16B"))
        elif image.mode == "P" and clear is not None:
            values, clear = np.asarray(ImageOps.exif_transpose(image).convert("RGBA")), None
        else:
            is_plain = image.mode in ("1", "P", "RGB") and clear is None
            upright = ImageOps.exif_transpose(image)
            values = np.asarray(upright.convert("L") if is_plain or image.mode == "1" else upright)
    if clear is not None:
        clear = np.multiply(clear, LEVELS.get(stored, 1))
    return _split(values, clear)


def _read_deep_channels(path: Path, channels: str) -> NDArray[Any]:
    """[H, W, C] of a PNG of 16 bits in several channels. Pillow keeps one byte of each sample, so both are read."""

    def read(stored: str) -> NDArray[Any]:
        with PngImageFile(path) as image:
            image.tile = [tile._replace(args=stored) for tile in image.tile]
            return np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)

    if channels == "LA":  # read as four channels of 8 bits
        pairs = read("RGBA")
        upper, lower = pairs[..., ::2], pairs[..., 1::2]
    else:
        upper, lower = read(f"{channels};16B"), read(f"{channels};16L")
    values: NDArray[Any] = upper << 8 | lower
    return values


def _split(values: NDArray[Any], clear: NDArray[Any] | None) -> Picture:
    """The picture of `values` uint8 or uint16, [H, W] grey or [H, W, C] grey or RGB with or without alpha, in which the
    colour `clear` is transparent."""
    opacity: NDArray[np.float32] | None = None
    if clear is not None:
        differs = values != clear
        opacity = (differs.any(axis=-1) if values.ndim == 3 else differs).astype(np.float32)
    if values.ndim == 3:
        top = np.iinfo(values.dtype).max
        if values.shape[-1] in (2, 4) and values[..., -1].min() < top:
            opacity = (values[..., -1] / top).astype(np.float32)
        values = luminance(values) if values.shape[-1] >= 3 else values[..., 0]
    if values.dtype == np.uint8:
        return Picture(values, KEPT, opacity)
    shown = None if opacity is None else opacity > 0
    return Picture(stretch(values, shown), STRETCHED, opacity)
