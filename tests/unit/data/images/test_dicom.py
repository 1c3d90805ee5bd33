"""DICOM files written here, byte by byte where it matters, against renderings made here by numpy or by pydicom's own
functions."""

import base64
import subprocess
import sys
from pathlib import Path

import gdcm
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

from raylab.data.images import decode as module
from raylab.data.images import dicom as reader
from raylab.data.images.decode import decode, read_picture
from raylab.errors import DataError

Y, X = np.mgrid[:64, :256]
RAMP = X.astype(np.uint8)  # [64, 256], black left, white right
PATIENT = {"PatientName": "Doe^Jane", "PatientID": "SECRET-4711", "PatientBirthDate": "19500102"}


def write(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", bits: int = 0, **tags: object) -> Path:
    """A native file of `pixels` [H, W] or [H, W, 3], of as many bits as its type has, or of `bits`."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in {**PATIENT, **tags}.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def change(path: Path, **tags: object) -> Path:
    data = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


def transcode(path: Path, syntax: str) -> Path:
    """The file in another transfer syntax, by GDCM's encoders."""
    source, changer, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    source.SetFileName(str(path))
    assert source.Read()
    changer.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    changer.SetInput(source.GetImage())
    assert changer.Change(), syntax
    writer.SetFileName(str(path))
    writer.SetFile(source.GetFile())
    writer.SetImage(changer.GetOutput())
    assert writer.Write()
    return path


def encapsulated(path: Path, stream: bytes, syntax: str, **tags: object) -> Path:
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = syntax
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    data["PixelData"].is_undefined_length = True
    data.save_as(path)
    return change(path, **tags)


def texture(low: int, high: int, shape: tuple[int, int] = (96, 128), seed: int = 0) -> np.ndarray:
    """Smooth, with every value between low and high: int64."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = np.sin(x / 9 + seed) + np.cos(y / 7) + np.sin((x + y) / 31)
    return np.rint((waves - waves.min()) / np.ptp(waves) * (high - low) + low).astype(np.int64)


def stretched(values: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
    part = values if shown is None else values[shown]
    low, high = np.percentile(part, (0.5, 99.5))
    grey = np.rint(((values - low) / (high - low)).clip(0, 1) * 255)
    return grey if shown is None else np.where(shown, grey, 0)


def alike(grey: np.ndarray, reference: np.ndarray, most: float = 1) -> bool:
    return grey.dtype == np.uint8 and bool(np.abs(grey.astype(float) - reference).max() <= most)


def luma(colour: np.ndarray) -> np.ndarray:
    return colour.astype(float) @ (0.299, 0.587, 0.114)


# Stored values


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "allocated"), [(8, 16), (10, 16), (12, 16), (14, 16), (16, 16), (6, 8), (8, 8)])
def test_bit_depths_whatever_the_unused_bits_hold(tmp_path: Path, bits: int, allocated: int, signed: bool) -> None:
    values = texture(0, 2**bits - 1) - (2 ** (bits - 1) if signed else 0)
    garbage = np.random.default_rng(0).integers(0, 2 ** (allocated - bits), values.shape) << bits
    stored = ((values % 2**bits) | garbage).astype(f"u{allocated // 8}").view(f"{'ui'[signed]}{allocated // 8}")
    grey = decode(write(tmp_path / "a.dcm", stored, bits=bits))
    assert alike(grey, values if bits == 8 and not signed else stretched(values))


def test_overlays_are_ignored(tmp_path: Path) -> None:
    """Both kinds: bits of their own group, and bits 12 to 15 of the pixels."""
    values = texture(0, 4095)
    path = write(tmp_path / "a.dcm", (values | (X[:96, :128].mean() > 0) << 15).astype(np.uint16), bits=12)
    data = pydicom.dcmread(path)
    data.add_new(0x60000010, "US", values.shape[0])
    data.add_new(0x60000011, "US", values.shape[1])
    data.add_new(0x60000100, "US", 1)
    data.add_new(0x60003000, "OW", b"\xff" * (values.size // 8))
    data.save_as(path)
    assert alike(decode(path), stretched(values))


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),  # as the standard has it: once, not twice
    ],
)
def test_monochrome_1_and_presentation(tmp_path: Path, photometric: str, shape: str | None, inverted: bool) -> None:
    tags = {} if shape is None else {"PresentationLUTShape": shape}
    grey = decode(write(tmp_path / "a.dcm", RAMP, photometric, **tags))
    assert np.array_equal(grey, 255 - RAMP if inverted else RAMP)


# Modality


@pytest.mark.parametrize(("slope", "intercept"), [("2", "-1000"), ("-1", "4095"), ("0.0125", "-3.5"), ("1", "0")])
def test_rescale(tmp_path: Path, slope: str, intercept: str) -> None:
    path = write(tmp_path / "a.dcm", texture(0, 4095).astype(np.uint16), RescaleSlope=slope, RescaleIntercept=intercept)
    data = pydicom.dcmread(path)
    assert alike(decode(path), stretched(apply_modality_lut(data.pixel_array, data)))


def lut(first: int, entries: np.ndarray, bits: int, vr: str = "US", first_vr: str = "US") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", first_vr, [len(entries) % 65536, first, bits])
    item.add_new("LUTData", vr, entries.tolist() if vr == "US" else entries.tobytes())
    item.LUTExplanation = "a curve"
    return item


def test_modality_lut(tmp_path: Path) -> None:
    curve = (np.linspace(0, 1, 4000) ** 2 * 65535).astype(np.uint16)
    path = write(tmp_path / "a.dcm", texture(0, 4095).astype(np.uint16), ModalityLUTSequence=[lut(50, curve, 16)])
    data = pydicom.dcmread(path)
    assert alike(decode(path), stretched(apply_modality_lut(data.pixel_array, data)))


# Windows and VOI LUTs


def displayed(path: Path, index: int = 0) -> np.ndarray:
    """pydicom's rendering by window `index`, on 0..255."""
    data = pydicom.dcmread(path)
    windowed = apply_windowing(apply_modality_lut(data.pixel_array, data), data, index)
    ends = np.array([-(1 << data.BitsStored - 1), (1 << data.BitsStored - 1) - 1])
    ends = ends if data.PixelRepresentation else np.array([0, (1 << data.BitsStored) - 1])
    low, high = sorted(apply_modality_lut(ends, data))
    return (windowed - low) / (high - low) * 255


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize("kind", ["<u2", "<i2"])
def test_windows(tmp_path: Path, function: str | None, kind: str) -> None:
    tags = {"WindowCenter": "900", "WindowWidth": "700", "RescaleSlope": "0.5", "RescaleIntercept": "10"}
    tags |= {} if function is None else {"VOILUTFunction": function}
    path = write(tmp_path / "a.dcm", texture(0, 4000).astype(kind), bits=14, **tags)
    assert alike(decode(path), displayed(path)) and read_picture(path).contrast == "window"


def test_the_first_window_that_suits(tmp_path: Path) -> None:
    tags = {"WindowCenter": ["90000", "1200", "700"], "WindowWidth": ["10", "800", "2000"]}
    path = write(tmp_path / "a.dcm", texture(0, 2000).astype(np.uint16), bits=12, **tags)
    assert alike(decode(path), displayed(path, 1))


@pytest.mark.parametrize(
    ("centre", "width", "what"),
    [
        (32768, 65536, "of 16 bits, of pixels of 12"),
        (100000, 400, "beyond the pixels: all white or black"),
        (2000, 1, "a threshold"),
        (2000, 0, "not allowed"),
    ],
)
def test_windows_that_do_not_suit_are_left_and_counted(tmp_path: Path, centre: int, width: int, what: str) -> None:
    values = texture(0, 4095)
    tags = {"WindowCenter": str(centre), "WindowWidth": str(width)}
    picture = read_picture(write(tmp_path / "a.dcm", values.astype(np.uint16), bits=12, **tags))
    assert alike(picture.grey, stretched(values)) and picture.contrast == "stretched, window does not suit", what
    eight = write(tmp_path / "b.dcm", RAMP, WindowCenter="2048", WindowWidth="4096")
    assert np.array_equal(decode(eight), RAMP)


def test_a_bright_object_with_a_window(tmp_path: Path) -> None:
    """A marker of lead on 2.4 % of the image does not turn the tissue into 28 levels."""
    values = texture(500, 900)
    values[:15, :20] = 16000
    tags = {"WindowCenter": "700", "WindowWidth": "400"}
    grey = decode(write(tmp_path / "a.dcm", values.astype(np.uint16), **tags))
    assert alike(grey, ((values - 699.5) / 399 + 0.5).clip(0, 1) * 255)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_voi_lut_comes_before_windows(tmp_path: Path, bits: int) -> None:
    curve = ((1 / (1 + np.exp(-np.linspace(-4, 4, 3000)))) * (2**bits - 1)).astype(np.uint16)
    tags = {"VOILUTSequence": [lut(500, curve, bits)], "WindowCenter": "2000", "WindowWidth": "300"}
    path = write(tmp_path / "a.dcm", texture(0, 4095).astype(np.uint16), bits=12, **tags)
    data = pydicom.dcmread(path)
    values = data.pixel_array.astype(np.int64)
    reference = curve[(values - 500).clip(0, 2999)] / (2**bits - 1) * 255
    if bits != 8:  # pydicom takes its indices modulo 256 where entries are of 8 bits
        assert np.array_equal(reference, apply_voi(data.pixel_array, data) / (2**bits - 1) * 255)
    assert alike(decode(path), reference) and read_picture(path).contrast == "VOI LUT"


@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_entries_of_eight_bits_two_a_word(tmp_path: Path, syntax: str) -> None:
    curve = (255 - np.arange(256)).astype(np.uint8)
    path = write(tmp_path / "a.dcm", RAMP, VOILUTSequence=[lut(0, curve, 8, "OW")])
    if syntax == "ExplicitVRBigEndian":
        data = pydicom.dcmread(path)
        data.VOILUTSequence[0].LUTData = curve.view("<u2").astype(">u2").tobytes()
        data.PixelData = RAMP.view("<u2").astype(">u2").tobytes()
        data["PixelData"].VR = "OW"
        data.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
        assert list(data.iterall())  # parsed, so that they are written in the other order of bytes
        pydicom.dcmwrite(path, data, implicit_vr=False, little_endian=False, force_encoding=True)
    assert np.array_equal(decode(path), 255 - RAMP)


# Padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("padding", [0, 4095, 1000])
@pytest.mark.parametrize("view", [{}, {"WindowCenter": "1000", "WindowWidth": "400"}, {"RescaleSlope": "-1"}])
def test_padding_is_black_and_does_not_count(tmp_path: Path, photometric: str, padding: int, view: dict) -> None:
    values, shown = texture(800, 1200), np.ones((96, 128), bool)
    shown[:, :19] = shown[:, -19:] = False
    values[values == padding] += 1
    plain = decode(write(tmp_path / "plain.dcm", values[:, 19:-19].astype(np.uint16), photometric, 12, **view))
    values[~shown] = padding
    tags = {**view, "PixelPaddingValue": padding}
    grey = decode(write(tmp_path / "a.dcm", values.astype(np.uint16), photometric, 12, **tags))
    assert (grey[~shown] == 0).all()
    assert alike(grey[:, 19:-19], plain)


def test_padding_range_limit(tmp_path: Path) -> None:
    values = texture(800, 1200)
    shown = values > 850
    values[~shown] = np.linspace(3000, 3100, (~shown).sum()).astype(int)
    for ends in ((3000, 3100), (3100, 3000)):
        tags = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), ends, strict=True))
        grey = decode(write(tmp_path / "a.dcm", values.astype(np.uint16), bits=12, **tags))
        assert alike(grey, stretched(values, shown))


@pytest.mark.parametrize(
    ("kind", "bits", "stored", "said", "vr"),
    [
        ("<i2", 16, -2000, 63536, "US"),
        ("<i2", 12, -2000, 63536, "US"),
        ("<u2", 16, 63536, -2000, "SS"),
        ("<u2", 12, 4095, 65535, "US"),
        ("<i2", 12, -2048, -2048, "SS"),
    ],
)
def test_padding_of_the_other_sign(tmp_path: Path, kind: str, bits: int, stored: int, said: int, vr: str) -> None:
    values, shown = texture(100, 900), np.ones((96, 128), bool)
    shown[:30] = False
    values[~shown] = stored
    path = write(tmp_path / "a.dcm", values.astype(kind), bits=bits)
    data = pydicom.dcmread(path)
    data.add_new("PixelPaddingValue", vr, said)
    data.save_as(path)
    assert alike(decode(path), stretched(values, shown))


@pytest.mark.parametrize("syntax", ["JPEGBaselineProcess1", "JPEG2000"])
def test_padding_after_lossy_compression(tmp_path: Path, syntax: str) -> None:
    """It is not quite what it was: values nearby are padding, too. Native files say that they were compressed."""
    values, shown = texture(80, 120), np.ones((96, 128), bool)
    shown[:32] = False
    values[~shown] = 253
    jpeg = np.asarray(Image.fromarray(values.astype(np.uint8)))
    tags = {"PixelPaddingValue": 254, "WindowCenter": "100", "WindowWidth": "41"}
    native = write(tmp_path / "a.dcm", jpeg, LossyImageCompression="01", **tags)
    coded = transcode(write(tmp_path / "b.dcm", jpeg, **tags), syntax)
    for path in (native, coded):
        grey = decode(path)
        assert (grey[:24] == 0).all() and alike(grey[40:], ((values[40:] - 99.5) / 40 + 0.5).clip(0, 1) * 255, 12)
    kept = decode(write(tmp_path / "c.dcm", jpeg, **tags))  # not compressed: what is not equal is not padding
    assert (kept[:32] == 255).all()


def test_nothing_but_padding(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", np.full((64, 64), 7, np.uint16), PixelPaddingValue=7)
    with pytest.raises(DataError, match="transparent or padding"):
        decode(path)
    values = np.full((64, 64), 7, np.uint16)
    values[:9] = 9  # one value beside it is no picture either
    with pytest.raises(DataError, match="all its pixels are equal"):
        decode(write(tmp_path / "b.dcm", values, PixelPaddingValue=7))


# Colour


COLOUR = np.stack([X, Y * 4, 255 - X], axis=-1).astype(np.uint8)


def test_rgb_of_either_planes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", COLOUR, "RGB")
    assert alike(decode(path), luma(COLOUR))
    change(path, PlanarConfiguration=1, PixelData=COLOUR.transpose(2, 0, 1).tobytes())
    assert alike(decode(path), luma(COLOUR))


def test_deep_rgb_is_stretched(tmp_path: Path) -> None:
    deep = COLOUR.astype(np.uint16) * 16
    assert alike(decode(write(tmp_path / "a.dcm", deep, "RGB", 12)), stretched(luma(deep)))
    with pytest.raises(DataError, match="RGB of 32 bits"):
        decode(write(tmp_path / "b.dcm", deep.astype(np.uint32), "RGB"))


def ycc(colour: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return np.rint(colour @ matrix.T + (0, 128, 128)).clip(0, 255).astype(np.uint8)


def test_ybr(tmp_path: Path) -> None:
    full = ycc(COLOUR)
    path = write(tmp_path / "a.dcm", full, "YBR_FULL")
    assert alike(decode(path), luma(COLOUR), 2)
    pairs = full.reshape(64, 128, 2, 3)  # two Y, then the chroma of the left one
    half = np.concatenate([pairs[..., 0], pairs[:, :, :1, 1], pairs[:, :, :1, 2]], axis=-1)
    change(path, PhotometricInterpretation="YBR_FULL_422", PixelData=half.tobytes())
    assert alike(decode(path), luma(COLOUR), 2)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("entry", "said"), [("u1", 8), ("<u2", 8), ("<u2", 16), ("deep", 16)])
def test_palettes_are_looked_up(tmp_path: Path, signed: bool, entry: str, said: int) -> None:
    """What decides is the colours, not their numbers, whatever the words that hold them."""
    colours = np.random.default_rng(3).integers(0, 256, (300, 3))
    first = -5 if signed else 40
    indices = texture(first - 10, first + 310)  # some beyond either end
    scale = 257 if entry == "deep" else 1
    path = write(tmp_path / "a.dcm", indices.clip(0 if not signed else None).astype("<i2" if signed else "<u2"))
    data = pydicom.dcmread(path)
    data.PhotometricInterpretation = "PALETTE COLOR"
    for name, entries in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        words = (entries * scale).astype("<u2" if entry == "deep" else entry)
        data.add_new(f"{name}PaletteColorLookupTableDescriptor", "SS" if signed else "US", [300, first, said])
        data.add_new(f"{name}PaletteColorLookupTableData", "OW", words.tobytes())
    data.save_as(path)
    assert alike(decode(path), luma(colours[(indices - first).clip(0, 299)]))


@pytest.mark.parametrize("photometric", ["HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB"])
def test_other_photometric_interpretations_are_refused_by_name(tmp_path: Path, photometric: str) -> None:
    with pytest.raises(DataError, match=f"photometric interpretation {photometric}"):
        decode(write(tmp_path / "a.dcm", COLOUR, photometric))


# Transfer syntaxes


NATIVE = ("ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless")
LOSSLESS = (
    *NATIVE,
    *("JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"),
)


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize(("kind", "bits"), [("<u1", 8), ("<i1", 8), ("<u2", 10), ("<i2", 12), ("<u2", 16), ("<i2", 16)])
def test_lossless_transfer_syntaxes(tmp_path: Path, syntax: str, kind: str, bits: int) -> None:
    values = texture(0, 2**bits - 1) - (2 ** (bits - 1) if "i" in kind else 0)
    path = transcode(write(tmp_path / "a.dcm", values.astype(kind), bits=bits), syntax)
    assert alike(decode(path), values if kind == "<u1" else stretched(values))


@pytest.mark.parametrize("syntax", ["JPEGBaselineProcess1", "JPEGLSNearLossless", "JPEG2000"])
def test_lossy_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    values = texture(0, 255)
    assert alike(decode(transcode(write(tmp_path / "a.dcm", values.astype(np.uint8)), syntax)), values, 4)
    if syntax != "JPEGBaselineProcess1":
        deep = texture(0, 4095)
        path = transcode(write(tmp_path / "b.dcm", deep.astype(np.uint16), bits=12), syntax)
        assert alike(decode(path), stretched(deep), 4)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_colour_in_lossless_transfer_syntaxes(tmp_path: Path, syntax: str) -> None:
    assert alike(decode(transcode(write(tmp_path / "a.dcm", COLOUR, "RGB"), syntax)), luma(COLOUR))


# 100 x + 25 y on 32 x 32 px, coded by OpenJPH 0.26.3, as no package here writes it
HTJ2K = """
/0//UQApQAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJ
CQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAL8AAf+TwAAmD/cFB3QAwAATQAASgEj+Awd0AJACB3QAwAATwAATACKL/AKCd
ADIkQBjVADAABVQAAVQjh07dvyqcgJ1AOJisfjAIQHstgDAABaEAAFoAMDAwMDAwMDA58p6enGCeABu13Vd13X9hCB79hCB7LoAwAAtuAAFukaj0Wg0
Go1Go9FoNBqN+f8Kenp6enp6cQJ9ADCEEEIIIYQQQgj/eGAAB79gAB79gAB79gAB7LMB/9k="""


@pytest.mark.parametrize("syntax", [uid.HTJ2KLossless, uid.HTJ2K])
def test_high_throughput_jpeg_2000(tmp_path: Path, syntax: str) -> None:
    values = 100 * X[:32, :32] + 25 * Y[:32, :32]
    path = write(tmp_path / "a.dcm", np.zeros((32, 32), np.uint16))
    assert alike(decode(encapsulated(path, base64.b64decode(HTJ2K), syntax)), stretched(values))


@pytest.mark.parametrize("said", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("stream", ["jfif", "jfif 4:2:0", "adobe", "4:2:0 without marker", "rgb"])
def test_a_jpeg_stream_says_its_colour_space(tmp_path: Path, said: str, stream: str) -> None:
    options = {"keep_rgb": True} if stream == "rgb" else {"subsampling": 2 if "4:2:0" in stream else 0}
    Image.fromarray(COLOUR).save(tmp_path / "a.jpg", quality=95, **options)
    jpeg = (tmp_path / "a.jpg").read_bytes()
    if stream in ("adobe", "4:2:0 without marker"):
        jpeg = jpeg[:2] + jpeg[20:]  # without JFIF's
    if stream == "adobe":
        jpeg = jpeg[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x01" + jpeg[2:]
    path = encapsulated(write(tmp_path / "a.dcm", COLOUR, said), jpeg, uid.JPEGBaseline8Bit)
    assert np.abs(decode(path) - luma(COLOUR)).max() < 8


def test_other_transfer_syntaxes_are_refused_by_name(tmp_path: Path) -> None:
    path = transcode(write(tmp_path / "a.dcm", texture(0, 4095).astype(np.uint16), bits=12), "JPEGExtendedProcess2_4")
    with pytest.raises(DataError, match=r"JPEG Extended.* of 12 bits[\s\S]*gdcmconv --raw"):
        decode(path)
    stream = get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)
    encapsulated(path, stream, uid.MPEG4HP41)
    with pytest.raises(DataError, match=r"transfer syntax MPEG-4 .*\(1\.2\.840\.10008\.1\.2\.4\.102\)"):
        decode(path)
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.102", b"1.2.840.10008.1.2.4.910"))
    with pytest.raises(DataError, match=r"transfer syntax 1\.2\.840\.10008\.1\.2\.4\.910"):
        decode(path)
    path = transcode(write(path, RAMP), "JPEGLosslessProcess14_1")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.1\0\0\0"))
    with pytest.raises(DataError, match="compressed, but Explicit VR Little Endian says otherwise"):
        decode(path)


@pytest.mark.parametrize("syntax", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_stream_of_another_size_is_refused(tmp_path: Path, syntax: str) -> None:
    """Before it is unpacked: what it says of itself is what memory is taken for."""
    path = transcode(write(tmp_path / "a.dcm", texture(0, 4095).astype(np.uint16), bits=12), syntax)
    with pytest.raises(DataError, match="of 128x96 px in a DICOM of 128x48 px"):
        decode(change(path, Rows=48))


# Headers


def headless(path: Path, syntax: str, with_meta: bool = False) -> Path:
    whole = transcode(path, syntax).read_bytes()
    length = 12 + int.from_bytes(whole[140:144], "little")
    path.write_bytes(whole[132 if with_meta else 132 + length :])
    return path


@pytest.mark.parametrize("name", ["a.dcm", "IM0001"])
@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_without_preamble_and_header(tmp_path: Path, syntax: str, name: str) -> None:
    values = texture(0, 4095)
    path = write(tmp_path / name, values.astype(np.uint16), bits=12, Modality="DX", ViewPosition="LL")
    picture = read_picture(headless(path, syntax))
    assert alike(picture.grey, stretched(values)) and picture.view == "LL"


@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "JPEGLosslessProcess14_1"])
def test_without_preamble_but_with_a_header(tmp_path: Path, syntax: str) -> None:
    values = texture(0, 4095)
    path = headless(write(tmp_path / "a", values.astype(np.uint16), bits=12), syntax, with_meta=True)
    assert alike(decode(path), stretched(values))


def test_a_header_that_names_no_transfer_syntax(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    data = pydicom.dcmread(path)
    del data.file_meta.TransferSyntaxUID
    data.save_as(path, implicit_vr=False, little_endian=True)
    assert np.array_equal(decode(path), RAMP)


def test_without_header_what_is_not_certain_is_refused(tmp_path: Path) -> None:
    packed = headless(write(tmp_path / "a.dcm", RAMP), "JPEGLosslessProcess14_1")
    with pytest.raises(DataError, match="names no transfer syntax"):
        decode(packed)
    longer = headless(change(write(tmp_path / "b.dcm", RAMP), Rows=60), "ExplicitVRLittleEndian")
    with pytest.raises(DataError, match="names no transfer syntax, and its pixels are 16,384 bytes; 15,360"):
        decode(longer)
    (tmp_path / "c.dcm").write_bytes(b"\x08\0\x05\0CS" + bytes(range(256)) * 4)
    with pytest.raises(DataError, match=r"c\.dcm"):
        decode(tmp_path / "c.dcm")


# What is refused


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its reason, and none with a word about the patient."""
    path = tmp_path / "a.dcm"

    def refused(match: str, file: Path, **tags: object) -> None:
        change(file, **tags)
        with pytest.raises(DataError, match=match) as caught:
            decode(file)
        assert not [value for value in PATIENT.values() if str(value) in str(caught.value)]

    movie = np.concatenate([RAMP, RAMP])
    refused("2 frames", write(path, movie), Rows=64, NumberOfFrames=2)
    refused("32,768 bytes of pixels, 16,384 for one frame", write(path, movie), Rows=64)
    refused("16,384 bytes of pixels, 16,640 are needed", write(path, RAMP), Rows=65)
    refused("contradict", write(path, COLOUR, "MONOCHROME2"))
    refused("12 bits stored of 16, the highest of them bit 15", write(path, RAMP.astype("<u2"), bits=12), HighBit=15)
    refused("without BitsStored", write(path, RAMP), BitsStored=None)
    item = lut(0, np.arange(4), 16)
    item.LUTDescriptor = [256, 0, 16]
    refused("lookup table of 4 entries, 256 are needed", write(path, RAMP), VOILUTSequence=[item])
    report = pydicom.dcmread(write(path, RAMP))
    del report.PixelData
    report.save_as(path)
    refused("without pixels", path)
    broken = transcode(write(path, texture(0, 4095).astype(np.uint16), bits=12), "JPEGLosslessProcess14_1")
    stream = get_frame(pydicom.dcmread(broken).PixelData, 0, number_of_frames=1)
    refused("JPEG Lossless", encapsulated(broken, stream[:300], uid.JPEGLosslessSV1))
    monkeypatch.setattr(module, "PIXELS", 10_000)
    zeros = transcode(write(path, np.zeros((1000, 1000), np.uint8)), "DeflatedExplicitVRLittleEndian")
    assert zeros.stat().st_size < 5000
    with pytest.raises(DataError, match="deflated DICOM of more than"):
        decode(zeros)


def test_nothing_of_the_patient_is_read() -> None:
    assert {pydicom.datadict.tag_for_keyword(name) >> 16 for name in reader.TAGS} <= {
        0x0008,
        0x0018,
        0x0028,
        0x2050,
        0x7FE0,
    }


def test_who_reads_no_dicom_does_not_load_its_codecs() -> None:
    code = "import sys, raylab.data.images.decode; print({'pydicom', 'gdcm', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
