"""One DICOM radiograph -> its picture, in the order of the standard's grayscale pipeline (PS3.4 N.2):

1. Stored values without their unused high bits. Padding (Pixel Padding Value, Pixel Padding Range Limit) does not
   count for the contrast and is shown black.
2. Modality LUT or rescale.
3. The first VOI LUT, or else the first window, that suits the pixels: one that shows them in less than a quarter of
   the grey levels, or clips nine tenths of them, is skipped, because windows outlive conversions of the bit depth.
4. Without one, 8 bits keep their values, and other depths are stretched (`grey.stretch`).
5. MONOCHROME1 and Presentation LUT Shape INVERSE are inverted.

Colour and palettes become luminance. Overlays are ignored. Nothing but TAGS is read of a file: nothing of the patient.
"""

import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder

from raylab.data.images.grey import KEPT, STRETCHED, UNFIT, Grey, Mask, Picture, luminance, stretch, to_grey
from raylab.errors import DataError

Values = NDArray[Any]

RADIOGRAPHS = ("CR", "DX", "RF", "OT")  # modalities of projection radiographs; OT: scanned films
GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
LOSSY = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K)
NEEDED = (
    *("PixelData", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation"),
)
COLOURS = ("RedPaletteColorLookupTable", "GreenPaletteColorLookupTable", "BluePaletteColorLookupTable")
TAGS = (
    *NEEDED,
    *("HighBit", "PlanarConfiguration", "NumberOfFrames", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("LossyImageCompression", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
    *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *(f"{colour}{part}" for colour in COLOURS for part in ("Descriptor", "Data")),
    *("Modality", "ViewPosition"),
)
RESCALE = (("RescaleSlope", 1), ("RescaleIntercept", 0))  # with defaults
LEVELS = 255 / 4  # a window that shows the pixels in fewer grey levels belongs to another bit depth
INSIDE = 0.1  # fraction of the pixels that a window must not clip
LOSS = 0.01  # fraction of the range of stored values by which lossy compression may change padding
CONVERT = "convert it to Explicit VR Little Endian, for example `gdcmconv --raw OLD NEW`, or remove it"
EXPORT = "export the relevant frame, or remove the file"

# pydicom's warnings are errors here or irrelevant, and would be printed for every file.
logging.getLogger("pydicom").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pydicom")


def read_dicom(path: Path, most: int) -> Picture:
    """The picture of a DICOM file of at most `most` samples, with or without preamble and file meta information.

    Raises DataError, which names the photometric interpretation or the transfer syntax, for a file that is not one
    image or cannot be read.
    """
    data = _dataset(path, most)
    syntax = data.file_meta.TransferSyntaxUID
    photometric, bits = data.PhotometricInterpretation, int(data.BitsStored)
    try:
        values, said = get_decoder(syntax).as_array(data)
    except Exception as error:  # codecs raise many types of errors
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path} cannot be decoded", f"{photometric}, {syntax.name}: {why}", CONVERT) from error
    shown: Mask | None = None
    if photometric in GREY:
        shown = _shown(values, data)
        grey, contrast = _render(values, shown, data)
    elif photometric == PALETTE:
        grey, contrast = _palette(values, data), KEPT
    elif said["photometric_interpretation"] != "RGB":
        raise DataError(f"{path} cannot be decoded", f"{photometric} was not converted to RGB", CONVERT)
    else:
        brightness = luminance(values)
        grey, contrast = (brightness.astype(np.uint8), KEPT) if bits == 8 else (stretch(brightness), STRETCHED)
    modality = str(data.get("Modality") or "")
    view = modality if modality not in ("", *RADIOGRAPHS) else str(data.get("ViewPosition") or "")
    return Picture(grey, contrast, None if shown is None else shown.astype(np.float32), view)


def _dataset(path: Path, most: int) -> pydicom.FileDataset:
    """The elements TAGS of a file with one decodable image; its transfer syntax is set."""
    with path.open("rb") as file:
        has_header = file.read(132)[128:] == b"DICM"
        _check_deflated(path, file, has_header, 4 * most)
    data = pydicom.dcmread(path, force=not has_header, specific_tags=list(TAGS))
    if "PixelData" not in data:
        raise DataError(f"{path} is not an image", "DICOM without pixels, or truncated before them")
    if missing := [name for name in NEEDED if data.get(name) is None]:
        raise DataError(f"{path} cannot be decoded", f"DICOM without {', '.join(missing)}")
    photometric, samples = str(data.PhotometricInterpretation), int(data.SamplesPerPixel)
    if photometric not in (*GREY, PALETTE, *COLOUR):
        known = f"raylab reads {', '.join((*GREY, PALETTE, *COLOUR))}"
        raise DataError(f"{path} is refused", f"photometric interpretation {photometric}; {known}", CONVERT)
    if samples != (3 if photometric in COLOUR else 1):
        raise DataError(f"{path} is refused", f"{photometric} contradicts {samples} samples per pixel")
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise DataError(f"{path} is not one radiograph", f"DICOM with {frames} frames", EXPORT)
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    high = stored - 1 if data.get("HighBit") is None else int(data.HighBit)
    if not stored <= allocated or high != stored - 1:
        why = f"{stored} bits stored of {allocated}, the highest of them bit {high}: it is ambiguous which bits count"
        raise DataError(f"{path} is refused", why, CONVERT)
    if samples == 3 and stored > 16:
        raise DataError(f"{path} is refused", f"{photometric} of {stored} bits; colour has at most 16", CONVERT)
    pixels = int(data.Rows) * int(data.Columns)
    if pixels * samples > most:
        why = f"{pixels * samples / 1e6:,.0f} million values, at most {most / 1e6:,.0f} million"
        raise DataError(f"{path} is refused", why)
    channels = 2 if photometric == "YBR_FULL_422" else samples
    _check_pixels(path, data, (pixels * channels * allocated + 7) // 8)
    return data


def _check_deflated(path: Path, file: BinaryIO, has_header: bool, most: int) -> None:
    """Refuse a deflated data set of more than `most` bytes, measured by inflating it piece by piece."""
    file.seek(132 if has_header else 0)
    head = file.read(1024)
    if uid.DeflatedExplicitVRLittleEndian.encode() not in head:
        return
    # The header starts with its own length: (0002,0000), UL of 4 bytes
    if not has_header or head[:8] != b"\x02\0\0\0UL\x04\0":
        raise DataError(f"{path} is refused", "deflated DICOM without the length of its header", CONVERT)
    file.seek(132 + 12 + int.from_bytes(head[8:12], "little"))
    unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while (piece := unpacker.unconsumed_tail or file.read(1 << 20)) and not unpacker.eof:
        size += len(unpacker.decompress(piece, 1 << 24))
        if size > most:
            raise DataError(f"{path} is refused", f"deflated DICOM of more than {most / 1e6:,.0f} MB")


def _check_pixels(path: Path, data: pydicom.FileDataset, expected: int) -> None:
    """Refuse pixels that contradict the header. Sets the transfer syntax if the file does not name it."""
    element = data["PixelData"]
    length, is_encapsulated = len(element.value), bool(element.is_undefined_length)
    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = data.original_encoding
        if is_encapsulated or length not in (expected, expected + expected % 2):
            why = f"it names no transfer syntax, and its pixels are {length:,} bytes; {expected:,} would be certain"
            raise DataError(f"{path} is refused", why, "rewrite it with its meta header, or remove it")
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
        return
    try:
        get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(f"{path} is refused", f"transfer syntax {syntax.name} ({syntax})", CONVERT) from error
    if is_encapsulated != syntax.is_encapsulated:
        packed = "compressed" if is_encapsulated else "plain"
        raise DataError(f"{path} is refused", f"its pixels are {packed}, but {syntax.name} says otherwise", CONVERT)
    if syntax == uid.JPEGExtended12Bit and data.BitsStored > 8:
        raise DataError(f"{path} is refused", f"{syntax.name} of {data.BitsStored} bits", CONVERT)
    if not is_encapsulated:
        if length < expected:
            raise DataError(f"{path} is truncated", f"{length:,} bytes of pixels, {expected:,} are needed")
        if length >= 2 * expected:
            why = f"{length:,} bytes of pixels, {expected:,} for one frame"
            raise DataError(f"{path} is not one radiograph", why, EXPORT)
        return
    size, is_ycc = _stream_header(get_frame(element.value, 0, number_of_frames=1))
    if size not in (None, (data.Rows, data.Columns)):
        why = f"{syntax.name} of {size[1]}x{size[0]} px in a DICOM of {data.Columns}x{data.Rows} px"
        raise DataError(f"{path} is refused", why)
    if is_ycc is not None and data.PhotometricInterpretation in COLOUR:
        # Some writers declare every colour JPEG as RGB; the stream is authoritative (pydicom reads JFIF markers).
        data.PhotometricInterpretation = "YBR_FULL" if is_ycc else "RGB"


def _stream_header(stream: bytes) -> tuple[tuple[int, int] | None, bool | None]:
    """The header of a JPEG, JPEG-LS or JPEG 2000 stream: (height, width), and whether it is YCbCr; None if unknown."""
    is_jpeg = stream[:2] == b"\xff\xd8"
    if not is_jpeg and (at := stream.find(b"\xff\x4f\xff\x51", 0, 4096)) >= 0:  # JPEG 2000: SOC, SIZ
        right, bottom, left, top = (int.from_bytes(stream[at + n : at + n + 4]) for n in (8, 12, 16, 20))
        return (bottom - top, right - left), None
    at, is_ycc = 2, None
    while is_jpeg and at + 15 < len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # SOF
            if stream[at + 9] == 3 and stream[at + 11] != stream[at + 14]:  # only chroma is subsampled
                is_ycc = True
            return (int.from_bytes(stream[at + 5 : at + 7]), int.from_bytes(stream[at + 7 : at + 9])), is_ycc
        if marker == 0xEE and stream[at + 4 : at + 9] == b"Adobe":
            is_ycc = stream[at + 15] == 1
        at += 2 + int.from_bytes(stream[at + 2 : at + 4])
    return None, is_ycc


def _shown(values: Values, data: pydicom.FileDataset) -> Mask | None:
    """[H, W], False where a pixel is padding; None if the file declares no padding.

    Writers disagree on the sign of the padding value, so it is taken modulo the range of the stored values.
    """
    if data.get("PixelPaddingValue") is None:
        return None
    levels = 1 << int(data.BitsStored)
    lowest = -levels // 2 if data.PixelRepresentation else 0
    ends = [data.PixelPaddingValue, data.get("PixelPaddingRangeLimit")]
    ends = sorted((int(end) - lowest) % levels + lowest for end in ends if end is not None)
    is_lossy = data.file_meta.TransferSyntaxUID in LOSSY or data.get("LossyImageCompression") == "01"
    slack = int(LOSS * levels) if is_lossy else 0
    shown: Mask = (values < ends[0] - slack) | (values > ends[-1] + slack)
    return shown


def _render(values: Values, shown: Mask | None, data: pydicom.FileDataset) -> tuple[Grey, str]:
    rescaled = _modality(values, data)
    if shown is not None and not shown.any():
        return np.zeros(values.shape, np.uint8), KEPT
    sample = (rescaled if shown is None else rescaled[shown]).ravel()
    sample = sample[:: max(1, sample.size >> 20)]
    is_ready = data.BitsStored == 8 and not data.PixelRepresentation and rescaled is values
    contrast = KEPT if is_ready else STRETCHED
    views = list(_views(data))
    fitting = next((at for at, (_, view) in enumerate(views) if _suits(view(sample))), None)
    if fitting is not None:
        contrast, view = views[fitting]
        grey = view(rescaled)
    else:
        grey = values.astype(np.uint8) if is_ready else stretch(rescaled, shown)
        contrast += UNFIT if views else ""
    is_inverse = str(data.get("PresentationLUTShape") or "").upper() == "INVERSE"
    return (255 - grey if is_inverse or data.PhotometricInterpretation == "MONOCHROME1" else grey), contrast


def _modality(values: Values, data: pydicom.FileDataset) -> Values:
    if data.get("ModalityLUTSequence"):
        item = data.ModalityLUTSequence[0]
        first, table = _table(item.LUTDescriptor, item.LUTData, data)
        return _look_up(values, first, table)
    slope, intercept = (float(default if data.get(name) is None else data[name].value) for name, default in RESCALE)
    return values if (slope, intercept) == (1, 0) else values.astype(np.float64) * slope + intercept


def _views(data: pydicom.FileDataset) -> Iterator[tuple[str, Callable[[Values], Grey]]]:
    """The VOI LUTs of a file, then its windows, each as a function of values after the modality LUT."""
    for item in data.get("VOILUTSequence") or ():
        first, table = _table(item.LUTDescriptor, item.LUTData, data)
        shades = to_grey(table * (255 / ((1 << int(item.LUTDescriptor[2])) - 1)))
        yield "VOI LUT", partial(_look_up, first=first, table=shades)
    elements = (data.get(name) for name in ("WindowCenter", "WindowWidth"))
    centres, widths = (np.atleast_1d([] if element is None else element).astype(float) for element in elements)
    function = str(data.get("VOILUTFunction") or "LINEAR").upper()
    for centre, width in zip(centres, widths, strict=False):
        yield "window", partial(_window, centre=centre, width=width, function=function)


def _window(values: Values, centre: float, width: float, function: str) -> Grey:
    """Apply a window (PS3.3 C.11.2.1.2 and C.11.2.1.3), scaled to 0..255."""
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1
    scaled = (values.astype(np.float32) - np.float32(centre)) / np.float32(max(width, 1e-6))
    if function == "SIGMOID":
        return to_grey(255 / (1 + np.exp(-4 * scaled)))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise ValueError(f"VOI LUT function {function}")
    return to_grey((scaled + np.float32(0.5)) * 255)


def _suits(sample: Grey) -> bool:
    low, high = np.percentile(sample, (1, 99))
    return bool(high - low >= LEVELS and ((sample > 0) & (sample < 255)).mean() >= INSIDE)


def _palette(values: Values, data: pydicom.FileDataset) -> Grey:
    """The luminance of the palette colours of `values`."""
    parts = [_table(data[f"{name}Descriptor"].value, data[f"{name}Data"].value, data) for name in COLOURS]
    shades = luminance(np.stack([table for _, table in parts], axis=-1))
    # Some writers store entries of 8 bits in words of 16 and declare 16 bits
    is_deep = max(int(table.max()) for _, table in parts) > 255
    return _look_up(values, parts[0][0], to_grey(shades / 257) if is_deep else shades.astype(np.uint8))


def _table(descriptor: Any, entries: Any, data: pydicom.FileDataset) -> tuple[int, NDArray[np.uint16]]:
    """The first value that a lookup table maps, and its entries."""
    count, first = int(descriptor[0]) % 65536 or 65536, int(descriptor[1])
    if isinstance(entries, bytes):
        _, little = data.original_encoding
        words = np.frombuffer(entries + b"\0" * (len(entries) % 2), "<u2" if little else ">u2").astype("<u2")
    else:
        words = np.atleast_1d(np.asarray(entries)).astype("<u2")
    is_packed = len(words) < count and int(descriptor[2]) <= 8  # two entries per word
    table = words.view(np.uint8) if is_packed else words
    if len(table) < count:
        raise ValueError(f"lookup table of {len(table)} entries, {count} are needed")
    return first, table[:count].astype(np.uint16)


def _look_up(values: Values, first: int, table: Values) -> Values:
    if values.dtype.kind == "f":
        values = np.rint(values)
    entries: Values = table[(values.astype(np.int32) - first).clip(0, len(table) - 1)]
    return entries
