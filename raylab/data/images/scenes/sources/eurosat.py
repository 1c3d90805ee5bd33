"""EuroSAT (Helber et al. 2019, arXiv 1709.00029): a folder per class, with JPEG or PNG files of one or three colours,
or GeoTIFF files of 13 bands of Sentinel-2. Any folder of classes in this form is read; bands of GeoTIFF files other
than Sentinel-2's 13 are numbered.

All files must have one kind, size and number of bands. JPEG and PNG do not say where they are. GeoTIFF files do, if
they have a projection.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raylab.data.images.scenes.scene import Scene, SceneRequest, SceneSource
from raylab.data.images.scenes.tiff import TiffHeader, check_size, read_header, read_pixels, too_large
from raylab.errors import DataError, UsageError

PICTURES, TIFFS = (".jpg", ".jpeg", ".png"), (".tif", ".tiff")
SENTINEL2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""The order of EuroSAT's bands."""
COLOURS = {"L": ("grey",), "RGB": ("red", "green", "blue")}
UNREADABLE = (OSError, SyntaxError, ValueError)  # what Pillow raises for damaged files


def read(request: SceneRequest) -> SceneSource:
    path = request.path
    if path is None:
        raise UsageError("the source eurosat needs --path DIR", do="give the folder with a folder per class")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}", "EuroSAT has a folder per class there", "check --path")
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in (*PICTURES, *TIFFS))
    classes = tuple(sorted({file.parent.name for file in files}))
    if len(classes) < 2:
        raise DataError(f"{path} has {len(classes)} folders with images", "there is one per class, at least two")
    if wrong := [name for name in classes if not re.fullmatch(r"[\w.\- ]+", name)]:
        raise DataError(f"class '{wrong[0]}'", "scores are named after folders", "use letters, digits, spaces, . _ -")
    tiffs = [file for file in files if file.suffix.lower() in TIFFS]
    if tiffs and len(tiffs) < len(files):
        raise DataError(
            f"{path} has {len(tiffs)} GeoTIFF files beside {len(files) - len(tiffs)} JPEG or PNG files",
            "all scenes need the same bands",
            "prepare them in directories of their own",
        )
    named: list[tuple[str, tuple[int, ...]]] = [
        (f"{file.parent.name}/{file.name}", (classes.index(file.parent.name),)) for file in files
    ]
    if tiffs:
        return _tiffs(path, files, named, classes)
    return _pictures(path, files, named, classes)


def read_picture_header(file: Path) -> tuple[str, int]:
    """(mode of Pillow, pixels a side) of a JPEG or PNG file, before its pixels are read; DataError unless it is a
    square scene of 8 bits, grey or RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                mode, (width, height) = picture.mode, picture.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_large(file) from error
    except UNREADABLE as error:
        raise DataError(f"cannot read {file}", str(error).partition("\n")[0][:200]) from error
    check_size(file, width, height)
    if mode not in COLOURS or width != height:
        what = f"{file} is {mode}, {width} x {height} px"
        raise DataError(what, "scenes are square, 8 bits, grey or RGB", "convert it")
    return mode, width


def read_picture(file: Path) -> NDArray[np.uint8]:
    """[bands, S, S] of a file whose header has been read; DataError if its pixels cannot be."""
    try:
        with Image.open(file) as picture:
            values = np.atleast_3d(np.asarray(picture))
    except UNREADABLE as error:
        raise DataError(f"cannot read {file}", str(error).partition("\n")[0][:200]) from error
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def band_names(count: int) -> tuple[str, ...]:
    """The names of so many bands of a GeoTIFF."""
    return SENTINEL2 if count == len(SENTINEL2) else tuple(f"band {number}" for number in range(1, count + 1))


def nodata_of(header: TiffHeader) -> int | None:
    """The value without data of a GeoTIFF: Sentinel-2's products write 0, and EuroSAT's files do not say so."""
    return 0 if header.bands == len(SENTINEL2) and header.nodata is None else header.nodata


def _pictures(
    path: Path, files: Sequence[Path], named: list[tuple[str, tuple[int, ...]]], classes: tuple[str, ...]
) -> SceneSource:
    forms: list[tuple[str, int]] = [("", 0)] * len(files)
    unread: dict[int, DataError] = {}
    for at, file in enumerate(files):
        try:
            forms[at] = read_picture_header(file)
        except DataError as error:
            unread[at] = error
    mode, side = _only(path, files, forms, unread, lambda one: f"{one[0]}, {one[1]} px")

    def pixels(at: int) -> NDArray[np.unsignedinteger]:
        if at in unread:
            raise unread[at]
        return read_picture(files[at])

    scenes = [Scene(name, labels) for name, labels in named]
    return SceneSource("eurosat", COLOURS[mode], classes, side, 8, scenes, pixels)


def _tiffs(
    path: Path, files: Sequence[Path], named: list[tuple[str, tuple[int, ...]]], classes: tuple[str, ...]
) -> SceneSource:
    headers: list[TiffHeader | None] = [None] * len(files)
    unread: dict[int, DataError] = {}
    for at, file in enumerate(files):
        try:
            header = read_header(file)
            if header.width != header.height:
                raise DataError(f"{file} has {header.width} x {header.height} px", "scenes are square", "cut it")
            headers[at] = header
        except DataError as error:
            unread[at] = error
    forms = [None if one is None else (one.bands, one.width, one.bits) for one in headers]
    bands, side, bits = _only(path, files, forms, unread, lambda of: f"{of[0]} bands of {of[1]} px and {of[2]} bits")
    good = [one for one in headers if one is not None]
    without = [file for file, one in zip(files, headers, strict=True) if one is not None and one.place is None]
    if 0 < len(without) < len(good):
        raise DataError(
            f"{len(without)} of {len(good)} files have no projection, among them {without[0]}",
            "they cannot be split by place as the others can be",
            "restore it, or prepare them in a directory of their own",
        )
    metres = {one.resolution_m for one in good}
    nodata = {nodata_of(one) for one in good}
    for what, values in (
        ("pixels of different sizes on the ground, in m", metres),
        ("different no-data values", nodata),
    ):
        if len(values) > 1:
            raise DataError(
                f"{path} has scenes with {what}: {', '.join(sorted(str(value) for value in values))}",
                "a network would see one field at two sizes" if values is metres else "",
                "prepare them in directories of their own",
            )

    def pixels(at: int) -> NDArray[np.unsignedinteger]:
        if at in unread:
            raise unread[at]
        return read_pixels(files[at])

    return SceneSource(
        "eurosat",
        band_names(bands),
        classes,
        side,
        bits,
        [
            Scene(name, labels, None if one is None else one.place)
            for (name, labels), one in zip(named, headers, strict=True)
        ],
        pixels,
        nodata=next(iter(nodata)),
        resolution_m=next(iter(metres)),
    )


def _only(
    path: Path,
    files: Sequence[Path],
    forms: Sequence[Hashable],
    unread: dict[int, DataError],
    words: Callable[[Any], str],
) -> Any:
    """The one form of all readable files; DataError if there are several, or none."""
    counts = Counter(form for at, form in enumerate(forms) if at not in unread)
    if not counts:
        raise DataError(f"none of the {len(files)} files of {path} can be read", str(next(iter(unread.values()))))
    if len(counts) > 1:
        common = counts.most_common(1)[0][0]
        other = next(files[at] for at, form in enumerate(forms) if at not in unread and form != common)
        raise DataError(
            f"{path} has scenes of different forms: "
            + ", ".join(f"{n} of {words(form)}" for form, n in counts.most_common()),
            f"one of the fewer is {other}",
            "all scenes need one size and the same bands: prepare them in directories of their own",
        )
    return next(iter(counts))
