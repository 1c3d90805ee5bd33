"""One image file -> one grey radiograph, uint8 [H, W], 0 = black (air) .. 255 = white (dense).

PNG and JPEG of 8 bits keep their values; colour and palettes become luminance. Deeper pixels (16-bit PNG, DICOM) are
stretched linearly from their .5 to their 99.5 percentile, because files of 10 to 14 bits in a 16-bit container are
common and presentation windows are missing or differ by vendor (they are not applied). DICOM: the modality rescale
is applied, MONOCHROME1 is inverted, one frame only.

Memory is bounded: a header that announces more than PIXELS pixels is refused before anything is unpacked. A baseline
JPEG, whose decoder reduces while reading, may be up to REDUCED times as large.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from raylab.errors import DataError

Grey = NDArray[np.uint8]

PIXELS = 100_000_000  # largest radiographs have about 20 million
REDUCED = 16
SMALLEST = 32  # px; below this it is an icon, not a radiograph
DEFLATED = "1.2.840.10008.1.2.1.99"  # the DICOM transfer syntax that is unpacked before its size can be known
RADIOGRAPHS = ("CR", "DX", "RF", "OT")  # DICOM modalities of projection radiographs; OT: scanned films
TOP = 0.08  # share of the height that COVID-Net cuts off: burned-in text stands there


def decode(path: Path, least: int = 224) -> Grey:
    """Grey radiograph uint8 [H, W] of a PNG, JPEG or DICOM file, told apart by content, not by name.

    `least`: the side in px that will be made of it; a JPEG several times larger may come back reduced.
    Raises DataError, with the file and the reason, for everything that cannot be used.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(132)
        if magic[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom"):
            grey = _dicom(path)
        elif magic.startswith(b"\xff\xd8"):
            grey = _jpeg(path, least)
        elif magic.startswith(b"\x89PNG"):
            # The plug-in itself, not Image.open, whose process-wide pixel limit is not ours.
            with PngImageFile(path) as image:
                _bound(path, image.width * image.height, PIXELS)
                grey = _grey(image)
        else:
            raise DataError(f"{path} is not a PNG, JPEG or DICOM image")
    except DataError:
        raise
    except Exception as error:  # decoders fail in many ways on damaged files, and all of them mean the same here
        raise DataError(f"{path} cannot be decoded", f"{type(error).__name__}: {error}") from error
    if min(grey.shape) < SMALLEST:
        raise DataError(f"{path} is too small", f"{grey.shape[1]}x{grey.shape[0]} px, at least {SMALLEST} are needed")
    if grey.min() == grey.max():
        raise DataError(f"{path} shows nothing", "all its pixels are equal")
    return grey


def frame(grey: Grey, size: int) -> Grey:
    """COVID-Net's view, uint8 [size, size]: the top 8 % cut off, the central square, resized with antialiasing."""
    below = grey[round(TOP * grey.shape[0]) :]
    height, width = below.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(below[top : top + side, left : left + side])
    # Bilinear: Pillow widens the kernel when it shrinks (no aliasing), and it never overshoots 0..255.
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))


def view(path: Path) -> str:
    """What a DICOM file says it shows: its ViewPosition (PA, AP, LL, ...), or its Modality where that is no radiograph
    (CT, MR, ...). Empty for other files, and where nothing is said."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            return ""
    import pydicom

    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality", "ViewPosition"])
    except Exception as error:
        raise DataError(f"{path} cannot be read", f"{type(error).__name__}: {error}") from error
    modality = str(data.get("Modality") or "")
    return modality if modality not in ("", *RADIOGRAPHS) else str(data.get("ViewPosition") or "")


def _bound(path: Path, pixels: int, limit: int) -> None:
    if pixels > limit:
        raise DataError(f"{path} is refused", f"{pixels / 1e6:,.0f} million pixels, at most {limit / 1e6:,.0f} million")


def _jpeg(path: Path, least: int) -> Grey:
    with JpegImageFile(path) as image:
        # A progressive file keeps all its coefficients in memory, so that reducing does not bound it.
        _bound(path, image.width * image.height, PIXELS * (1 if image.info.get("progressive") else REDUCED))
        if min(image.size) > 4 * least:
            image.draft("L", (2 * least, 2 * least))  # 1/2, 1/4 or 1/8, never below what was asked
        _bound(path, image.width * image.height, PIXELS)
        return _grey(image)


def _grey(image: Image.Image) -> Grey:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _stretch(np.asarray(upright))
    return np.asarray(upright.convert("L"))


def _stretch(values: NDArray[Any]) -> Grey:
    """The .5 to 99.5 percentile of `values` [H, W] -> 0..255."""
    step = max(1, min(values.shape) // 1024)  # a million pixels tell the percentiles well enough
    low, high = np.percentile(values[::step, ::step], (0.5, 99.5))
    if low == high:  # more than 99 % of one value: fall back on the full range
        low, high = values.min(), values.max()
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / max(high - low, 1e-6))
    grey: Grey = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return grey


def _dicom(path: Path) -> Grey:
    # Imported here: most data sets have no DICOM, and pydicom takes a while to load.
    import pydicom
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels import apply_modality_lut

    with path.open("rb") as file:
        has_preamble = file.read(132)[128:] == b"DICM"
    if has_preamble and read_file_meta_info(path).get("TransferSyntaxUID") == DEFLATED:
        raise DataError(f"{path} is refused", "deflated DICOM: its size is not known before it is unpacked")
    data = pydicom.dcmread(path, force=not has_preamble)
    if "PixelData" not in data:
        raise DataError(f"{path} is not an image", "DICOM without pixels")
    frames, samples = int(data.get("NumberOfFrames") or 1), int(data.get("SamplesPerPixel", 1))
    if frames > 1:
        raise DataError(f"{path} is not one radiograph", f"DICOM with {frames} frames")
    _bound(path, int(data.Rows) * int(data.Columns) * samples, PIXELS)
    values = data.pixel_array
    if samples == 3:  # pydicom has turned YBR into RGB
        return np.asarray(Image.fromarray(values).convert("L"))
    rescaled = apply_modality_lut(values, data)
    same = values.dtype == np.uint8 and np.array_equal(rescaled, values)
    grey = values if same else _stretch(rescaled)
    return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey
