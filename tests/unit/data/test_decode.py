from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from raylab.data import decode as module
from raylab.data.decode import decode, frame, read_picture
from raylab.errors import DataError

RAMP = np.tile(np.arange(256, dtype=np.uint8), (64, 1))  # [64, 256], black left, white right


def dicom(path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", **tags: object) -> Path:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated = data.BitsStored = pixels.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


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


def test_dicom_monochrome1_and_rescale(tmp_path: Path) -> None:
    assert np.array_equal(decode(dicom(tmp_path / "a.dcm", RAMP, "MONOCHROME1")), 255 - RAMP)
    negative = decode(dicom(tmp_path / "b.dcm", RAMP.astype(np.uint16), RescaleSlope="-1", RescaleIntercept="1000"))
    assert negative[0, 0] == 255 and negative[0, -1] == 0


def test_dicom_refused(tmp_path: Path) -> None:
    movie = dicom(tmp_path / "movie.dcm", np.stack([RAMP, RAMP]), NumberOfFrames=2)
    with pytest.raises(DataError, match="2 frames"):
        decode(movie)
    report = pydicom.dcmread(movie)
    del report.PixelData
    report.save_as(tmp_path / "report.dcm")
    with pytest.raises(DataError, match="without pixels"):
        decode(tmp_path / "report.dcm")
    report.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    report.save_as(tmp_path / "deflated.dcm")
    with pytest.raises(DataError, match="deflated"):
        decode(tmp_path / "deflated.dcm")
    (tmp_path / "noise.dcm").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(DataError, match=r"noise\.dcm"):
        decode(tmp_path / "noise.dcm")


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
