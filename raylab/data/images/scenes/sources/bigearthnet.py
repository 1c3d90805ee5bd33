"""BigEarthNet, Sentinel-2 (Sumbul et al. 2019, arXiv 1902.06148): patches of 1,200 m with several labels of CORINE.

A folder with a folder per patch: PATCH/PATCH_B02.tif and the other eleven bands, of 10, 20 and 60 m a pixel, and
PATCH_labels_metadata.json with labels, coordinates and projection. All bands are brought to 120 x 120 px of 10 m
(bilinear). Value 0 means no data, as in Sentinel-2's products.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ValidationError

from raylab.data.images.scenes import corine
from raylab.data.images.scenes.scene import Place, Scene, SceneRequest, SceneSource
from raylab.data.images.scenes.tiff import read_header, read_pixels
from raylab.errors import DataError, UsageError

SIDES = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 120),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 60),
    **dict.fromkeys(("B01", "B09"), 20),
}
"""Pixels a side of each band's file."""
BANDS = tuple(sorted(SIDES))
SIZE, METRES, NODATA = 120, 10.0, 0
NOTE = "_labels_metadata.json"


class Corners(BaseModel):
    ulx: float
    uly: float
    lrx: float
    lry: float


class PatchNote(BaseModel):
    """What is read of a patch's JSON file."""

    labels: list[str]
    coordinates: Corners
    projection: str


def read(request: SceneRequest) -> SceneSource:
    path = request.path
    if path is None:
        raise UsageError("the source bigearthnet needs --path DIR", do="give the folder of its patches")
    if not path.is_dir():
        raise DataError(f"there is no folder {path}", "BigEarthNet has a folder per patch there", "check --path")
    if request.corine not in (19, 43):
        raise UsageError(f"--corine {request.corine}", "BigEarthNet has 19 or 43 classes", "use --corine 19 or 43")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not folders:
        raise DataError(f"{path} has no folders", "a patch is a folder of GeoTIFF files", "check --path")
    scenes = [read_note(folder, request.corine) for folder in folders]
    labelled = [scene for scene in scenes if scene.labels]
    steps = (("patches", len(scenes)),) if len(labelled) < len(scenes) else ()
    warnings = (
        (f"{len(scenes) - len(labelled):,} patches have no label among the {request.corine} classes: left out",)
        if steps
        else ()
    )
    return SceneSource(
        "bigearthnet",
        BANDS,
        corine.classes(request.corine),
        SIZE,
        16,
        labelled,
        lambda at: read_patch(path / labelled[at].id, labelled[at].place),
        several_labels=True,
        nodata=NODATA,
        resolution_m=METRES,
        attrition=steps,
        warnings=warnings,
    )


def read_note(folder: Path, count: int) -> Scene:
    """A patch by its JSON file."""
    file = folder / f"{folder.name}{NOTE}"
    try:
        note = PatchNote.model_validate_json(file.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {file}",
            error.strerror or "",
            "every patch needs its JSON file: restore it, or take the folder out",
        ) from error
    except ValidationError as error:
        first: Any = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{file} is not the JSON file of a patch: {field} {first['msg']}", do="restore it") from error
    zone = re.findall(r'AUTHORITY\["EPSG",\s*"(\d+)"\]', note.projection)
    if not zone:
        raise DataError(f"{file} names no projection", "without it the place of the patch is unknown", "restore it")
    at = note.coordinates
    place = Place(zone[-1], (at.ulx + at.lrx) / 2, (at.uly + at.lry) / 2)  # the last code is that of the projection
    return Scene(folder.name, corine.indices(note.labels, count, str(file)), place)


def read_patch(folder: Path, place: Place | None = None) -> NDArray[np.uint16]:
    """uint16 [12, 120, 120] of a patch; DataError for a band that is missing, has another size, or lies elsewhere: than
    `place`, that of the labels, or than the first band."""
    files = {band: folder / f"{folder.name}_{band}.tif" for band in BANDS}
    if missing := [band for band, file in files.items() if not file.is_file()]:
        raise DataError(f"{folder} lacks the band {', '.join(missing)}", f"a patch has {len(BANDS)} bands")
    out = np.empty((len(BANDS), SIZE, SIZE), dtype=np.uint16)
    than = "than the other bands of its patch" if place is None else "than the JSON file of its patch says"
    for at, (band, file) in enumerate(files.items()):
        header = read_header(file)
        found = (header.bands, header.height, header.width, header.bits)
        if found != (1, SIDES[band], SIDES[band], 16):
            raise DataError(
                f"{file} has {found[0]} band(s) of {found[2]} x {found[1]} px and {found[3]} bits",
                f"{band} of a patch is 1 band of {SIDES[band]} x {SIDES[band]} px and 16 bits",
            )
        if header.place is None:
            raise DataError(f"{file} has no projection", "whether the bands of a patch lie on each other is unknown")
        place = place or header.place
        if header.place != place:
            raise DataError(f"{file} lies elsewhere {than}", "the bands of a patch and its labels are of one place")
        out[at] = enlarge(read_pixels(file)[0])
    return out


def is_in_patch(file: Path) -> bool:
    """Whether a file is a band of the patch that its folder is, or the patch's JSON file."""
    patch = file.parent.name
    return file.name == f"{patch}{NOTE}" or file.name in {f"{patch}_{band}.tif" for band in BANDS}


def enlarge(pixels: NDArray[np.unsignedinteger]) -> NDArray[np.uint16]:
    """uint16 [SIZE, SIZE] of one band, bilinear; a pixel that a pixel without data touches has no data."""
    if pixels.shape == (SIZE, SIZE):
        return pixels.astype(np.uint16)

    def resize(values: NDArray[Any]) -> NDArray[Any]:
        picture = Image.fromarray(values.astype(np.float32))
        return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    large: NDArray[np.uint16] = np.rint(resize(pixels)).astype(np.uint16)
    if (pixels == 0).any():
        large[resize(pixels == 0) > 0] = 0
    return large
