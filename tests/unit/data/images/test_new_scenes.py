"""New scenes: the same inputs as a prepared directory gives, and a reason for one that cannot be used."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from test_scenes import BANDS, geotiff, make_eurosat, make_patch, prepared, request

from raylab.data.images.scenes.dataset import load_scenes
from raylab.data.images.scenes.new_scenes import read_new_scenes
from raylab.data.images.scenes.sources import bigearthnet, eurosat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of 13 bands in `raw`, prepared in `out`."""
    made: Path = tmp_path_factory.mktemp("new-scenes")
    prepared(eurosat.read(request(make_eurosat(made / "raw"))), made / "out")
    return made


@pytest.mark.parametrize("size", [None, 4])
def test_the_inputs_are_those_of_the_prepared_directory(folder: Path, size: int | None) -> None:
    samples = load_scenes(folder / "out", "test", "landcover", size)
    new = read_new_scenes([folder / "raw" / name for name in samples.ids], samples.spec)
    index = np.arange(len(samples))
    assert new.inputs is not None and new.rows["reason"].null_count() == len(samples)
    assert new.inputs.batch(index).shape[1:] == (BANDS, size or 8, size or 8)
    assert np.array_equal(new.inputs.batch(index).numpy(), samples.batch(index).numpy())


def test_bands_are_found_by_name(folder: Path) -> None:
    spec = load_scenes(folder / "out", "test", "landcover").spec
    two = {**spec, "bands": ["B8A", "B02"], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    file = folder / "raw" / "class 0" / "00.tif"
    inputs = read_new_scenes(file, two).inputs
    assert inputs is not None
    stored = eurosat.read_pixels(file)[[12, 1]]
    assert np.array_equal(inputs.batch(np.array([0]))[0].numpy(), stored.astype(np.float32))


def test_a_folder_of_patches_is_read_and_so_is_one_of_them(tmp_path: Path) -> None:
    for at in range(10):
        make_patch(tmp_path / "raw", at, ["Pastures"] if at % 2 else ["Pastures", "Mixed forest"])
    prepared(bigearthnet.read(request(tmp_path / "raw")), tmp_path / "out", "landcover-multilabel")
    samples = load_scenes(tmp_path / "out", "all", "landcover-multilabel")
    new = read_new_scenes(tmp_path / "raw", samples.spec)
    assert [Path(file).name for file in new.rows["file"]] == [f"patch_{at}" for at in range(10)] and not new.notes
    order = np.argsort(samples.ids)
    assert new.inputs is not None
    assert np.array_equal(new.inputs.batch(np.arange(10)).numpy(), samples.batch(order).numpy())
    geotiff(tmp_path / "River" / "River_1.tif", np.ones((BANDS, 8, 8), np.uint16))
    river = read_new_scenes(tmp_path / "River", samples.spec).rows
    assert river["file"].to_list() == [str(tmp_path / "River" / "River_1.tif")], "no band of a patch"
    (tmp_path / "raw" / "patch_3" / "patch_3_B05.tif").unlink()
    one = read_new_scenes(tmp_path / "raw" / "patch_3", samples.spec)
    assert one.inputs is None and one.rows["reason"][0].startswith("lacks the band B05")


def bad_files(folder: Path) -> dict[str, tuple[str, Any]]:
    """{file: (start of its reason, what writes it)}."""
    rng = np.random.default_rng(0)

    def write(**more: Any) -> Any:
        bands, side = more.pop("bands", BANDS), more.pop("side", 8)
        low = more.pop("low", 500)
        pixels = rng.integers(low, more.pop("high", low + 200), size=(bands, side, side)).astype(
            more.pop("kind", np.uint16)
        )
        return lambda path: geotiff(path, pixels, 0, 5e6, **more)

    return {
        "a.tif": ("lacks the band B01, ", write(bands=4)),
        "b.tif": ("has 16 x 16 pixels, and the scenes of the model 8 x 8", write(side=16)),
        "c.tif": ("has 8 bits, and the scenes of the model 16", write(kind=np.uint8, low=0)),
        "d.tif": ("has 20 metres a side of a pixel, and the scenes of the model 10", write(metres=20)),
        "e.tif": ("has more than 95% clouds", write(low=5000)),
        "f.tif": ("cannot read ", lambda path: path.write_bytes(b"II*\0")),
        "g.txt": ("is not a GeoTIFF, JPEG or PNG file", lambda path: path.write_text("no scene")),
        "h.png": ("lacks the band B01, ", lambda path: Image.new("RGB", (8, 8)).save(path)),
        "i.png": ("is RGB, 8 x 9 px", lambda path: Image.new("RGB", (8, 9)).save(path)),
        "j.png": ("has too many pixels", lambda path: Image.new("1", (14_000, 14_000)).save(path)),
        "k.png": ("has too many pixels", lambda path: Image.new("1", (10_000, 10_000)).save(path)),
        "l.tif": ("has more than 50% pixels without data", write(low=0, high=1)),
    }  # fmt: skip


def test_a_scene_that_cannot_be_used_has_a_reason(folder: Path, tmp_path: Path) -> None:
    expected = {}
    for name, (reason, write) in bad_files(tmp_path).items():
        write(tmp_path / name)
        expected[name] = reason
    geotiff(tmp_path / "z.tif", eurosat.read_pixels(folder / "raw" / "class 0" / "00.tif"), 0, 5e6)
    new = read_new_scenes(tmp_path, load_scenes(folder / "out", "test", "landcover").spec)
    found = {Path(file).name: reason for file, reason in new.rows.iter_rows()}
    assert found.pop("z.tif") is None and new.inputs is not None and len(new.inputs) == 1
    assert found.keys() == expected.keys()
    assert {name: reason[: len(expected[name])] for name, reason in found.items()} == expected
    assert new.notes == [f"scenes that cannot be used: {len(expected)}"]
    assert isinstance(new.rows, pl.DataFrame)
