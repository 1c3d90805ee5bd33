"""Sections: images by tile, tables, splits by interval, the prepared form, pairs, and what is refused."""

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tifffile
from PIL import Image

from raylab.data.images.sections.dataset import PairSamples, load_sections
from raylab.data.images.sections.image import read_blocks, read_header
from raylab.data.images.sections.neighbours import find_neighbours
from raylab.data.images.sections.prepare import Cutting, list_edges, prepare_sections
from raylab.data.images.sections.section import SectionRequest
from raylab.data.images.sections.sources import files, synthetic
from raylab.data.images.sections.split import default_interval, split_sections
from raylab.data.prepared import read_meta
from raylab.data.row_file import RowFile
from raylab.errors import DataError, UsageError

RNG = np.random.default_rng(0)
BLOCKS = [(3, 20), (20, 37), (60, 77)]


def request(folder: Path, depth: str = "depth", level: int = 0) -> SectionRequest:
    return SectionRequest(folder, None, depth, level, 0, 400, 64)


def draw(number: int, side: int = 48) -> np.ndarray:
    """Grey tissue whose brightness is the number of its section, on white."""
    pixels = np.full((side, side), 255, dtype=np.uint8)
    pixels[8:-8, 8:-8] = 50 + number + RNG.integers(0, 5, size=(side - 16, side - 16))
    return pixels


def write_brain(folder: Path, count: int = 30, **columns: list[Any]) -> pl.DataFrame:
    """PNG files of `count` sections and their table, with `columns` instead of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"s{number:03d}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(draw(number)).save(folder / name)
    table = pl.DataFrame(
        {"file": names, "section": range(10, 10 + 2 * count, 2), "depth": [500.0 - 4 * k for k in range(count)]}
        | columns
    )
    table.write_csv(folder / "sections.csv")
    return table


# images


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (16, 32)},
        {"tile": (16, 32), "compression": "zlib"},
        {"rowsperstrip": 7},
        {"rowsperstrip": 7, "compression": "zlib", "byteorder": ">"},
    ],
)
@pytest.mark.parametrize("shape", [(83, 61), (83, 61, 3), (4, 83, 61)])
def test_blocks_of_tiff_files_are_what_the_whole_image_holds(tmp_path, shape, options):
    pixels = RNG.integers(0, 2**16, size=shape, dtype=np.uint16)
    planar = {"planarconfig": "separate"} if shape[0] == 4 else {"planarconfig": "contig"} if len(shape) == 3 else {}
    tifffile.imwrite(tmp_path / "s.tif", pixels, photometric="minisblack", **planar, **options)
    whole = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1) if shape[-1] == 3 else pixels
    header = read_header(tmp_path / "s.tif", 0)
    assert (header.width, header.height, header.bands, header.bits) == (61, 83, len(whole), 16)
    for (start, stop), block in zip(BLOCKS, read_blocks(tmp_path / "s.tif", 0, BLOCKS), strict=True):
        assert np.array_equal(block, whole[:, start:stop])


def test_a_level_of_a_pyramid_is_read_with_its_resolution(tmp_path):
    base = RNG.integers(0, 255, size=(128, 96), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as file:
        form: dict[str, Any] = {"tile": (32, 32), "resolution": (5000, 5000), "resolutionunit": "CENTIMETER"}
        file.write(base, subifds=1, **form)
        file.write(base[::2, ::2], subfiletype=1, tile=(32, 32))
    assert read_header(tmp_path / "s.tif", 0).um_per_px == pytest.approx(2)
    header = read_header(tmp_path / "s.tif", 1)
    assert (header.width, header.height) == (48, 64) and header.um_per_px == pytest.approx(4)
    assert np.array_equal(next(read_blocks(tmp_path / "s.tif", 1, [(5, 40)]))[0], base[::2, ::2][5:40])
    with pytest.raises(DataError, match="has no level 2"):
        read_header(tmp_path / "s.tif", 2)


def test_images_larger_than_the_memory_of_preparing_them(tmp_path):
    """Five sections of 17 million pixels; memory holds a row of tiles and of patches, never an image."""
    side, tile, brain = 4096, 256, tmp_path / "brain"
    brain.mkdir()
    across = -(-side // tile)
    dark, light = (np.full((tile, tile), value, dtype=np.uint8) for value in (40, 255))
    dark[::2] += 60
    for number in range(5):
        inside = (dark if 4 < at // across < 11 and 4 < at % across < 11 else light for at in range(across**2))
        tifffile.imwrite(brain / f"s{number}.tif", inside, shape=(side, side), dtype=np.uint8, tile=(tile, tile),
                         compression="zlib")  # fmt: skip
    names = [f"s{number}.tif" for number in range(5)]
    pl.DataFrame({"file": names, "section": range(5), "depth": range(5)}).write_csv(brain / "sections.csv")
    tracemalloc.start()
    try:
        cutting = Cutting(size=256, interval=1, gap=0)
        meta = prepare_sections("sections", tmp_path / "out", files.read(request(brain)), cutting)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert meta.counts["train"]["sections"] == 3 and meta.counts["train"]["patches"] == 3 * 36
    assert most < side * side, f"{most / 1e6:.0f} MB, of images of 17 MB"


def test_images_that_would_be_decoded_whole_are_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr("raylab.data.images.sections.image.PIXELS", 1000)
    monkeypatch.setattr("raylab.data.images.sections.image.ROW_BYTES", 1000)
    Image.fromarray(draw(0)).save(tmp_path / "s.png")
    with pytest.raises(DataError, match=r"(?s)can only be decoded whole.*tiled TIFF"):
        read_header(tmp_path / "s.png", 0)
    tifffile.imwrite(tmp_path / "s.tif", draw(0))
    with pytest.raises(DataError, match=r"(?s)one row of its tiles or strips.*write it in tiles"):
        read_header(tmp_path / "s.tif", 0)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: path.write_bytes(b"II*\0"), "cannot read"),
        (lambda path: tifffile.imwrite(path, np.zeros((3, 9, 9, 3), np.uint8)), "has the axes"),
        (lambda path: tifffile.imwrite(path, np.zeros((9, 9), np.float32)), "values of type float32"),
    ],
)
def test_other_tiff_files_are_refused(tmp_path, write, told):
    write(tmp_path / "s.tif")
    with pytest.raises(DataError, match=f"(?s){told}"):
        read_header(tmp_path / "s.tif", 0)


def test_a_damaged_tile_is_an_error_with_the_file(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", RNG.integers(0, 255, size=(64, 64), dtype=np.uint8), tile=(32, 32),
                     compression="zlib")  # fmt: skip
    content = bytearray((tmp_path / "s.tif").read_bytes())
    content[-700:-600] = bytes(100)
    (tmp_path / "s.tif").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*s\.tif"):
        list(read_blocks(tmp_path / "s.tif", 0, [(0, 64)]))


# tables


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"section": [3] * 30}, "several rows with the section 3"),
        ({"file": ["s000.png"] * 30}, "several rows with the file s000.png"),
        (
            {"file": ["no.png", *(f"s{k:03d}.png" for k in range(1, 30))]},
            "names 1 files that .* does not have: no.png",
        ),
        ({"depth": ["deep", *("1" for _ in range(29))]}, "line 2: depth is 'deep'"),
        ({"depth": ["1", "inf", *("1" for _ in range(28))]}, "line 3: depth is 'inf'"),
        ({"section": ["1.5", *map(str, range(2, 31))]}, "line 2: section is '1.5'"),
        ({"section": [None, *range(2, 31)]}, "line 2: section is None"),
        ({"um_per_px": [0.0] * 30}, "line 2: um_per_px is '0.0'"),
        ({"um_per_px": [1.0] * 29 + [2.0]}, "2 resolutions in um a pixel: 29 images of 1, 1 images of 2"),
        ({"um_per_px": [1.0] * 29 + [None]}, "the resolution of 1 of 30 images is unknown: s029.png"),
        ({"depth": [None] * 30}, "no section of .* has a depth"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_with_the_place(tmp_path, columns, told):
    write_brain(tmp_path, **columns)
    with pytest.raises(DataError, match=f"(?s){told}"):
        files.read(request(tmp_path))


def test_sizes_that_may_be_resolutions_are_refused_unless_the_table_says(tmp_path):
    table = write_brain(tmp_path)
    Image.fromarray(draw(3, side=96)).save(tmp_path / "s003.png")
    with pytest.raises(DataError, match=r"(?s)2 sizes in pixels: 29 images of 48 x 48.*s003\.png.*um_per_px"):
        files.read(request(tmp_path))
    table.with_columns(um_per_px=pl.lit(2.5)).write_csv(tmp_path / "sections.csv")
    assert files.read(request(tmp_path)).um_per_px == 2.5


def test_a_colour_image_among_grey_ones_and_a_wrong_column_are_refused(tmp_path):
    write_brain(tmp_path)
    with pytest.raises(DataError, match=r"(?s)has no column 'dept'.*file, section, depth.*--depth"):
        files.read(request(tmp_path, "dept"))
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "s003.png")
    with pytest.raises(DataError, match="2 bands and bits: 29 images of 1 of 8 bits"):
        files.read(request(tmp_path))
    with pytest.raises(UsageError, match="needs --path"):
        files.read(request(tmp_path / "none"))
    (tmp_path / "sections.csv").unlink()
    with pytest.raises(UsageError, match=r"no sections\.csv in or beside"):
        files.read(request(tmp_path))


# splits


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_every_section_is_test_once_and_neighbours_do_not_cross(interval):
    folds = [split_sections(41, interval, fold, 1) for fold in range(5)]
    assert [sum(split[at] == "test" for split in folds) for at in range(41)] == [1] * 41
    for split in folds:
        for one, next_one in pairwise(split):
            assert one == next_one or None in (one, next_one)


def test_gaps_are_as_wide_as_asked_for():
    assert "".join((part or "-")[0] for part in split_sections(20, 4, 1, 0)) == "t" * 4 + "t" * 4 + "v" * 4 + "t" * 8
    split = split_sections(20, 4, 1, 2)
    assert [at for at, part in enumerate(split) if part is None] == [2, 3, 8, 9, 12, 13]
    assert default_interval(35) == 3 and default_interval(4) == 2


@pytest.mark.parametrize(
    ("sections", "options", "error", "told"),
    [
        (2, (1, 0, 0), DataError, "no section is left for train"),
        (30, (1, 0, 1), DataError, "no section is left for val"),
        (30, (3, 0, 9), DataError, "no section is left for train, val"),
        (30, (0, 0, 1), UsageError, "interval 0"),
        (30, (3, 5, 1), UsageError, "fold 5"),
    ],
)
def test_impossible_splits_are_refused(sections, options, error, told):
    with pytest.raises(error, match=f"(?s){told}"):
        split_sections(sections, *options)


# the prepared form


def test_the_prepared_form_holds_the_patches_of_tissue_in_their_places(tmp_path):
    table = write_brain(tmp_path / "brain").with_columns(
        depth=pl.when(pl.col("section") == 12).then(None).otherwise("depth")
    )
    table.write_csv(tmp_path / "brain" / "sections.csv")
    (tmp_path / "brain" / "more.png").write_bytes((tmp_path / "brain" / "s000.png").read_bytes())
    source = files.read(request(tmp_path / "brain"))
    meta = prepare_sections("sections", tmp_path / "out", source, Cutting(size=8, interval=2))
    assert read_meta(tmp_path / "out", "sections").data_hash == meta.data_hash
    index = pl.read_parquet(tmp_path / "out" / "index.parquet")
    patches = RowFile(tmp_path / "out" / "patches.npy")
    assert len(patches) == index.height and patches.shape[1:] == (1, 8, 8)
    assert index.group_by("section").len()["len"].unique().to_list() == [16]  # 32 x 32 px of tissue
    for row, section, r, c in index.select("row", "section", "grid_row", "grid_column").iter_rows():
        assert -2 <= min(r, c) <= max(r, c) <= 1
        number = (section - 10) // 2
        assert (np.abs(patches[np.array([row])].astype(int) - 52 - number) <= 2).all()
    assert [row.get("sections") for row in meta.attrition[:3]] == [31, 30, 29]
    assert meta.attrition[-2]["patches"] == 36 * meta.attrition[-2]["sections"]
    assert meta.warnings == ["1 images are not in the table and were not read"]
    assert meta.depth_per_section == pytest.approx(2)
    train = index.filter(pl.col("split") == "train")
    values = patches[train["row"].to_numpy()]
    assert meta.statistics.mean[0] == pytest.approx(values.mean()) and meta.statistics.std[0] == pytest.approx(
        values.std()
    )
    assert meta.depth_mean == pytest.approx(train["depth"].mean())
    assert meta.counts["train"]["with neighbours"] == meta.counts["train"]["patches"] == train.height


def test_sections_of_several_bands_and_16_bits_keep_their_values(tmp_path):
    brain, size = tmp_path / "brain", 8
    brain.mkdir()
    pixels = RNG.integers(1000, 4000, size=(10, 4, 48, 40), dtype=np.uint16)
    pixels[:, :, :8], pixels[:, :, -8:], pixels[..., :8], pixels[..., -8:] = 0, 0, 0, 0
    for number, section in enumerate(pixels):
        tifffile.imwrite(brain / f"{number}.tif", section, photometric="minisblack", planarconfig="separate",
                         tile=(16, 16))  # fmt: skip
    columns = {"file": [f"{number}.tif" for number in range(10)], "section": range(10), "depth": range(10)}
    pl.DataFrame(columns).write_csv(brain / "sections.csv")
    meta = prepare_sections("sections", tmp_path / "out", files.read(request(brain)), Cutting(size=size))
    assert (meta.bits, meta.bands) == (16, ["band 1", "band 2", "band 3", "band 4"])
    index, patches = pl.read_parquet(tmp_path / "out" / "index.parquet"), RowFile(tmp_path / "out" / "patches.npy")
    assert patches.dtype == np.uint16 and index.height == 16 * index["section"].n_unique()
    for row, section, r, c in index.select("row", "section", "grid_row", "grid_column").iter_rows():
        top, left = 24 + size * r, 20 + size * c
        assert np.array_equal(patches[np.array([row])][0], pixels[section, :, top : top + size, left : left + size])
    samples = load_sections(tmp_path / "out", "train", "sections")
    assert samples.batch(np.arange(3)).shape == (3, 4, size, size)


def test_the_grid_lies_around_the_centre():
    assert list_edges(48, 16) == ([-1, 0], [8, 24])
    assert list_edges(100, 16) == ([-3, -2, -1, 0, 1, 2], [2, 18, 34, 50, 66, 82])
    assert list_edges(15, 16) == ([], [])


@pytest.mark.parametrize(
    ("cutting", "told"),
    [
        (Cutting(size=64), "no patch is left for train, val, test"),
        (Cutting(size=24, tissue=1.0), "no patch is left"),
        (Cutting(size=4), "patch 4"),
        (Cutting(size=8, tissue=1.5), "tissue 1.5"),
    ],
)
def test_cuttings_without_patches_are_refused_and_leave_nothing(tmp_path, cutting, told):
    write_brain(tmp_path / "brain")
    with pytest.raises((DataError, UsageError), match=f"(?s){told}"):
        prepare_sections("sections", tmp_path / "out", files.read(request(tmp_path / "brain")), cutting)
    assert [path.name for path in tmp_path.iterdir()] == ["brain"]


def test_one_depth_for_all_is_refused(tmp_path):
    write_brain(tmp_path / "brain", depth=[1.0] * 30)
    with pytest.raises(DataError, match="all sections of train have the same depth"):
        prepare_sections("sections", tmp_path / "out", files.read(request(tmp_path / "brain")), Cutting(size=8))


def test_the_real_sections_are_prepared(real_data, tmp_path):
    source = files.read(SectionRequest(real_data / "brain" / "sections", None, "atlas_depth_25um", 0, 0, 0, 64))
    meta = prepare_sections("sections", tmp_path / "out", source, Cutting())
    assert meta.attrition[0] == {"step": "images in the folder", "sections": 35}
    assert 500 < meta.counts["train"]["patches"] < 1000 and meta.depth_per_section == pytest.approx(2, abs=0.1)


# samples


def test_neighbours_are_those_beside_and_at_the_same_place_of_the_next_section():
    position = np.array([(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 0, 0), (3, 0, 0), (0, 2, 0)])
    near = find_neighbours(position)
    assert [sorted(row[row >= 0].tolist()) for row in near] == [[1, 3], [0, 2], [1], [0], [], []]
    assert find_neighbours(position[:0]).shape == (0, 6)


def test_pairs_are_neighbours_and_depend_on_seed_epoch_and_row_alone(sections_data):
    pairs = load_sections(sections_data, "train", "sections", pairs=True)
    assert isinstance(pairs, PairSamples)
    index = np.arange(40)
    other = pairs.draw_neighbours(index, (1, 2))
    assert (np.abs(pairs.position[index] - pairs.position[other]).sum(1) == 1).all()
    assert not np.array_equal(other, pairs.draw_neighbours(index, (1, 3)))
    x = pairs.batch(index, (1, 2))
    assert x.shape == (40, 2, 1, 16, 16)
    assert np.array_equal(x[7:9].numpy(), pairs.batch(index[7:9], (1, 2)).numpy())
    plain = pairs.batch(index)
    single = load_sections(sections_data, "train", "sections")
    assert np.array_equal(
        plain[:, 0].numpy(), single.batch(np.flatnonzero(np.isin(single.rows, pairs.rows[index]))).numpy()
    )


def test_a_model_refuses_sections_of_another_resolution_or_depth(sections_data):
    spec = load_sections(sections_data, "train", "sections").spec
    for change, told in (
        ({"um_per_px": 2.0}, "um per pixel: the model's 2.0"),
        ({"classes": ["age"]}, "the model predicts age"),
        ({"bands": ["grey", "red"]}, "lacks the band red"),
    ):
        with pytest.raises(DataError, match=f"(?s){told}"):
            load_sections(sections_data, "val", "sections", spec=spec | change)
    with pytest.raises(DataError, match="32 px are requested"):
        load_sections(sections_data, "val", "sections", 32)


def test_drawn_sections_need_a_number_and_differ_in_depth_not_in_brightness():
    with pytest.raises(UsageError, match="too few"):
        synthetic.read(SectionRequest(None, None, "depth", 0, 0, 5, 16))
    drawn = [synthetic.draw(np.random.default_rng(k), k / 50, 16) for k in range(50)]
    means = [pixels[pixels < 230].mean() for pixels in drawn]
    assert abs(np.corrcoef(means, range(50))[0, 1]) < 0.5
