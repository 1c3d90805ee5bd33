"""PNG, JPEG and what is neither, against renderings made here. DICOM: test_dicom.py."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import RAMP, alike, luma, stretched, texture
from test_dicom import write as dicom

from raylab.data.images import decode as module
from raylab.data.images.decode import decode, frame, read_picture
from raylab.errors import DataError


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # Adam7


def png(path: Path, samples: np.ndarray, depth: int, kind: int, interlaced: bool = False, **chunks: bytes) -> Path:
    """A PNG of `samples` [H, W, C], written without any imaging library."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def lines(part: np.ndarray) -> bytes:
        if depth >= 8:
            rows = [row.astype(f">u{depth // 8}").tobytes() for row in part]
        else:
            bits = (part.reshape(len(part), -1, 1) >> np.arange(depth)[::-1]) & 1
            rows = [np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in bits]
        return b"".join(b"\0" + row for row in rows)

    parts = [samples[y::dy, x::dx] for y, x, dy, dx in PASSES] if interlaced else [samples]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, kind, 0, 0, interlaced)
    body = b"".join(lines(part) for part in parts if part.size)
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    whole = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + whole)
    return path


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_png_grey_of_every_depth(tmp_path: Path, depth: int, interlaced: bool) -> None:
    values = texture(0, 2**depth - 1)
    grey = decode(png(tmp_path / "a.png", values[..., None], depth, GREY, interlaced))
    assert alike(grey, stretched(values) if depth == 16 else values * 255 / (2**depth - 1))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", [GREY, RGB, GREY_ALPHA, RGBA])
def test_png_of_sixteen_bits_at_its_true_depth(tmp_path: Path, kind: int, interlaced: bool) -> None:
    """Pixels of 12 bits in 16, with colour, with alpha, and with both: all as in a grey file."""
    values = texture(0, 3481)
    alpha = np.full_like(values, 65535)
    channels = {GREY: [values], RGB: [values] * 3, GREY_ALPHA: [values, alpha], RGBA: [values] * 3 + [alpha]}[kind]
    path = png(tmp_path / "a.png", np.stack(channels, -1), 16, kind, interlaced)
    assert alike(decode(path), stretched(values)) and len(np.unique(decode(path))) > 250
    assert np.array_equal(decode(path), decode(png(tmp_path / "b.png", values[..., None], 16, GREY)))


def test_png_of_sixteen_bits_in_colour(tmp_path: Path) -> None:
    colour = np.stack([texture(0, 60000, seed=seed) for seed in range(3)], -1)
    assert alike(decode(png(tmp_path / "a.png", colour, 16, RGB)), stretched(luma(colour)))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("kind", [GREY_ALPHA, RGBA])
def test_what_is_transparent_is_black_and_does_not_count(tmp_path: Path, kind: int, depth: int) -> None:
    top = 2**depth - 1
    values, alpha = texture(top // 20, top // 5), np.full((96, 128), top)
    values[:, :30], alpha[:, :30] = top, 0  # white below nothing
    alpha[:, 100:] = round(top * 0.6)
    channels = [values, alpha] if kind == GREY_ALPHA else [values] * 3 + [alpha]
    grey = decode(png(tmp_path / "a.png", np.stack(channels, -1), depth, kind))
    reference = stretched(values, alpha > 0) if depth == 16 else values.astype(float)
    assert (grey[:, :30] == 0).all() and alike(grey, reference * (alpha / top), 1.5)


@pytest.mark.parametrize(("depth", "clear"), [(1, 0), (2, 2), (4, 9), (8, 200), (16, 50000)])
def test_the_transparent_grey_of_a_png(tmp_path: Path, depth: int, clear: int) -> None:
    values = texture(0, 2**depth - 1)
    values[:20] = clear
    shown = values != clear
    path = png(tmp_path / "a.png", values[..., None], depth, GREY, tRNS=struct.pack(">H", clear))
    if depth == 1:  # what is left is white
        with pytest.raises(DataError, match="all its pixels are equal"):
            decode(path)
        return
    reference = stretched(values, shown) if depth == 16 else np.where(shown, values * 255 / (2**depth - 1), 0)
    assert (decode(path)[~shown] == 0).all() and alike(decode(path), reference)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png(tmp_path: Path, depth: int) -> None:
    colour = np.stack([texture(0, 2**depth * 4 // 5, seed=seed) for seed in range(3)], -1)
    colour[:20] = (255, 254, 253)
    path = png(tmp_path / "a.png", colour, depth, RGB, tRNS=struct.pack(">HHH", 255, 254, 253))
    shown = np.arange(96)[:, None].repeat(128, 1) >= 20
    reference = stretched(luma(colour), shown) if depth == 16 else np.where(shown, luma(colour), 0)
    assert alike(decode(path), reference)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [False, True])
def test_palettes_of_a_png(tmp_path: Path, depth: int, alpha: bool) -> None:
    """The colours decide, not their numbers, and their opacity."""
    rng = np.random.default_rng(depth)
    colours, opacity = rng.integers(0, 256, (2**depth, 3), np.uint8), rng.integers(0, 256, 2**depth, np.uint8)
    chunks = {"PLTE": colours.tobytes()} | ({"tRNS": opacity.tobytes()} if alpha else {})
    numbers = texture(0, 2**depth - 1)
    shades = luma(colours) * (opacity / 255 if alpha else 1)
    grey = decode(png(tmp_path / "a.png", numbers[..., None], depth, PALETTE, **chunks))
    assert alike(grey, shades[numbers], 1.5)


def test_nothing_to_see(tmp_path: Path) -> None:
    values = texture(0, 255)
    clear = png(tmp_path / "clear.png", np.stack([values, values * 0], -1), 8, GREY_ALPHA)
    outline = png(tmp_path / "outline.png", np.stack([values * 0 + 90, values // 128 * 255], -1), 8, GREY_ALPHA)
    for path, why in ((clear, "transparent"), (outline, "equal")):
        with pytest.raises(DataError, match=why):
            decode(path)


def test_orientation_of_deep_colour(tmp_path: Path) -> None:
    values = texture(0, 3481)
    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    for kind, channels in ((RGB, [values] * 3), (GREY_ALPHA, [values, values * 0 + 65535])):
        path = png(tmp_path / "a.png", np.stack(channels, -1), 16, kind, eXIf=exif)
        assert alike(decode(path), np.rot90(stretched(values), -1))


def test_jpeg_in_colour(tmp_path: Path) -> None:
    colour = np.stack([texture(0, 255, seed=seed) for seed in range(3)], -1).astype(np.uint8)
    image = Image.fromarray(colour)
    for name, picture, options in (
        ("ycc", image, {"subsampling": 0}),
        ("rgb", image, {"keep_rgb": True}),
        ("cmyk", image.convert("CMYK"), {}),
    ):
        grey = decode(save(tmp_path / f"{name}.jpg", picture, quality=97, **options))
        assert np.abs(grey - luma(colour)).mean() < 2, name
    plain = (tmp_path / "cmyk.jpg").read_bytes()

    # YCCK: the first three planes as YCbCr, which Pillow does not write (it inverts what it writes), and the marker
    inks = np.concatenate([colour, texture(0, 128, seed=9)[..., None].astype(np.uint8)], -1)
    planes = np.concatenate([255 - np.asarray(Image.fromarray(colour).convert("YCbCr")), inks[..., 3:]], -1)
    save(tmp_path / "ycck.jpg", Image.frombytes("CMYK", (128, 96), planes.tobytes()), quality=97, subsampling=0)
    body = (tmp_path / "ycck.jpg").read_bytes()
    at = body.index(b"\xff\xee") + 15
    (tmp_path / "ycck.jpg").write_bytes(body[:at] + b"\2" + body[at + 1 :])
    reference = luma((255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255)
    assert np.abs(decode(tmp_path / "ycck.jpg") - reference).mean() < 2

    at = plain.index(b"\xff\xee")
    (tmp_path / "plain.jpg").write_bytes(plain[:at] + plain[at + 16 :])
    with pytest.raises(DataError, match="CMYK JPEG without Adobe's marker"):
        decode(tmp_path / "plain.jpg")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("TIFF", "TIFF"), ("BMP", "Windows Bitmap"), ("GIF", "GIF"), ("WEBP", "WebP"), ("JPEG2000", "JPEG 2000")],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png", format=name)
    with pytest.raises(DataError, match=rf"is not a PNG, JPEG or DICOM image[\s\S]*{kind}"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"\x1f\x8b\x08", "gzip"), (b"PK\3\4", "zip"), (b"%PDF-1.7", "PDF"), (b"<html>404", "<html>"), (b"", "empty")],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, body: bytes, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(body)
    with pytest.raises(DataError, match=kind):
        decode(tmp_path / "a.png")


def test_jpeg_of_other_precision_is_refused(tmp_path: Path) -> None:
    for body in (b"\xff\xc1\0\x0b\x0c\0@\0@\1\1\x11\0", b"\xff\xf7\0\x0b\x08\0@\0@\1\1\x11\0"):  # 12 bits; JPEG-LS
        (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + body + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + b"\0" * 99)
        with pytest.raises(DataError, match="JPEG is read with 8 bits"):
            decode(tmp_path / "a.jpg")


def test_more_than_one_image(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(255 - RAMP)])
    with pytest.raises(DataError, match="animated PNG with 2 frames"):
        decode(tmp_path / "a.png")


def test_eight_bits_keep_their_values(tmp_path: Path) -> None:
    assert np.array_equal(decode(save(tmp_path / "a.png", Image.fromarray(RAMP))), RAMP)
    assert np.array_equal(decode(dicom(tmp_path / "a.dcm", RAMP)), RAMP)
    jpeg = decode(save(tmp_path / "a.jpg", Image.fromarray(RAMP), quality=95))
    assert np.abs(jpeg.astype(int) - RAMP).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_colour_and_palettes_become_grey(tmp_path: Path, mode: str) -> None:
    grey = decode(save(tmp_path / "a.png", Image.fromarray(RAMP).convert(mode)))
    assert np.abs(grey.astype(int) - RAMP).max() <= 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    grey = decode(save(tmp_path / "a.jpg", Image.fromarray(RAMP).convert("CMYK"), quality=95))
    assert grey[:, -1].mean() > 240 > 15 > grey[:, 0].mean()


def test_told_apart_by_content(tmp_path: Path) -> None:
    save(tmp_path / "a.png", Image.fromarray(RAMP)).rename(tmp_path / "a.jpg")
    assert np.array_equal(decode(tmp_path / "a.jpg"), RAMP)


def test_twelve_bits_in_sixteen_use_the_whole_range(tmp_path: Path) -> None:
    deep = (np.tile(np.arange(256, dtype=np.uint16), (64, 1)) * 16).astype(np.uint16)
    for path in (save(tmp_path / "a.png", Image.fromarray(deep)), dicom(tmp_path / "a.dcm", deep)):
        grey = decode(path)
        assert (grey.min(), grey.max()) == (0, 255)
        assert np.abs(grey.astype(int) - RAMP).max() <= 3  # the percentiles cut a little off both ends
        assert (np.diff(grey[0].astype(int)) >= 0).all()


def test_one_hot_pixel_does_not_set_the_range(tmp_path: Path) -> None:
    deep = (np.tile(np.arange(256, dtype=np.uint16), (64, 1)) * 16).astype(np.uint16)
    deep[0, 0] = 65535
    assert np.median(decode(dicom(tmp_path / "a.dcm", deep))) == pytest.approx(127, abs=2)


def test_more_pixels_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIXELS", 100_000)
    large = Image.fromarray(RAMP).resize((1024, 1024))
    for path in (
        save(tmp_path / "a.png", large),
        save(tmp_path / "progressive.jpg", large, progressive=True),
        save(tmp_path / "large.jpg", large.resize((2000, 2000))),  # more than REDUCED times
        dicom(tmp_path / "a.dcm", np.asarray(large)),
    ):
        with pytest.raises(DataError, match="refused"):
            decode(path, 64)
    assert decode(save(tmp_path / "baseline.jpg", large), 64).shape == (128, 128)  # decoded at 1/8


def test_unusable_files(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.png", Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)))
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "half.jpg").write_bytes(b"\xff\xd8\xff\xe0 and so on")
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / "blank.png", Image.new("L", (64, 64), 7))
    save(tmp_path / "icon.png", Image.fromarray(RAMP[:16, :16]))
    for name in ("half.png", "half.jpg", "text.png", "empty.png", "folder.png", "blank.png", "icon.png", "none.png"):
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            decode(tmp_path / name)


def test_frame_cuts_the_top_and_the_sides() -> None:
    grey = np.full((100, 200), 100, np.uint8)
    grey[:8] = 255  # burned-in text
    grey[:, :50] = grey[:, -50:] = 0
    square = frame(grey, 46)
    assert square.shape == (46, 46) and square.dtype == np.uint8
    assert square[:, 2:-2].min() == square.max() == 100  # 92 px of the 100 below and between


def test_frame_of_a_tall_image_is_its_middle() -> None:
    grey = np.zeros((200, 92), np.uint8)
    grey[16 + 46 : 16 + 46 + 92] = 200
    assert (frame(grey, 32) == 200).all()


def test_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(save(tmp_path / "a.png", Image.fromarray(RAMP), exif=exif)).shape == (256, 64)


def test_what_a_file_says_of_its_view(tmp_path: Path) -> None:
    """A lateral view by its position, a CT slice by its modality; other files and scanned films say nothing."""
    assert read_picture(dicom(tmp_path / "side.dcm", RAMP, Modality="DX", ViewPosition="LL")).view == "LL"
    assert read_picture(dicom(tmp_path / "slice.dcm", RAMP, Modality="CT", ViewPosition="AP")).view == "CT"
    assert read_picture(dicom(tmp_path / "film.dcm", RAMP, Modality="OT")).view == ""
    assert read_picture(save(tmp_path / "a.png", Image.fromarray(RAMP))).view == ""
