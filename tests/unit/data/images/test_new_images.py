"""New X-rays: the same inputs as a prepared directory gives, and a reason for a file that cannot be used."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from raylab.data.images.dataset import load_images
from raylab.data.images.new_images import read_new_images
from raylab.data.images.prepare import prepare_images
from raylab.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 small images."""
    made = tmp_path_factory.mktemp("new") / "images"
    made.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (50, 46), np.uint8)).save(made / f"{number}.png")
    return made


@pytest.fixture(scope="module")
def prepared(folder: Path) -> Path:
    lists = []
    for split, numbers in {"train": range(24), "val": range(24, 32), "test": range(32, 40)}.items():
        lists.append(folder.parent / f"{split}.txt")
        classes = ("normal", "pneumonia", "COVID-19")
        lines = [f"p{number} {number}.png {classes[number % 3]} here" for number in numbers]
        lists[-1].write_text("\n".join(lines) + "\n")
    prepare_images("covidnet", folder.parent / "out", folder, *lists, size=40)
    return folder.parent / "out"


@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("mask", [None, "centre", "border"])
def test_the_inputs_are_those_of_the_prepared_directory(
    folder: Path, prepared: Path, size: int | None, mask: str | None
) -> None:
    spec = load_images(prepared, "train", size, mask=mask).spec
    samples = load_images(prepared, "test", spec=spec)
    files = pl.read_parquet(prepared / "index.parquet").filter(pl.col("split") == "test")["file"]
    new = read_new_images([folder / name for name in files], spec)
    index = np.arange(len(samples))
    assert new.inputs is not None and new.inputs.batch(index).shape[-1] == (size or 40)
    assert np.array_equal(new.inputs.batch(index).numpy(), samples.batch(index).numpy())


def test_a_folder_is_read_and_what_is_no_image_has_a_reason(folder: Path, prepared: Path, tmp_path: Path) -> None:
    spec = load_images(prepared, "train").spec
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "a.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "b.txt").write_text("no picture")
    (tmp_path / ".hidden").write_text("no picture")
    new = read_new_images(tmp_path, spec)
    assert [Path(file).name for file in new.rows["file"]] == ["b.txt", "a.png"] and len(new.inputs or []) == 1
    assert new.rows["reason"][0].startswith("is not a PNG, JPEG or DICOM image") and new.rows["reason"][1] is None
    assert new.notes == ["files that cannot be used: 1"]
    assert read_new_images(tmp_path / "b.txt", spec).inputs is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (np.zeros((8, 8), np.uint8), "cannot be read from a ndarray"),
        (3, "cannot be read from a int"),
        ("nowhere", "there is no file or folder nowhere"),
        ([], "there are no image files"),
    ],
    ids=["array", "number", "missing", "none"],
)
def test_anything_but_files_is_refused(files: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_new_images(files, {"size": 32})
