"""Scenes: sources, splits by place, the prepared form, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tifffile
import torch
from PIL import Image

from raylab.data.images.scenes import corine
from raylab.data.images.scenes.augment import augment_scenes
from raylab.data.images.scenes.dataset import load_scenes
from raylab.data.images.scenes.prepare import cloud_fraction, prepare_scenes
from raylab.data.images.scenes.scene import MOST, Place, SceneRequest, SceneSource
from raylab.data.images.scenes.sources import bigearthnet, eurosat, statlog, synthetic
from raylab.data.images.scenes.split import near_others
from raylab.data.images.scenes.tiff import read_header, read_pixels
from raylab.data.prepared import read_meta
from raylab.errors import DataError
from raylab.evaluation.overlap import leakage
from raylab.tasks import find_task
from raylab.tasks.preparation import Resources

BANDS = 13
GEO_KEYS = (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32632)  # projected, UTM zone 32N


def request(path: Path, count: int = 19) -> SceneRequest:
    return SceneRequest(path, 0, 60, count)


def geotiff(path: Path, pixels: np.ndarray, x: float = 0, y: float = 0, metres: float = 10, **more: Any) -> Path:
    """A GeoTIFF of [bands, S, S] whose upper left corner is at x, y of UTM zone 32N."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = [
        (33550, "d", 3, (metres, metres, 0.0), False),
        (33922, "d", 6, (0.0, 0.0, 0.0, x, y, 0.0), False),
        (34735, "H", len(GEO_KEYS), GEO_KEYS, False),
    ]
    data = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    options: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig", "extratags": tags, **more}
    if len(pixels) == 1:
        del options["planarconfig"]
    tifffile.imwrite(path, data, **options)
    return path


def make_eurosat(folder: Path, n: int = 30, side: int = 8, **more: Any) -> Path:
    """Three classes of scenes in 13 bands, each in a tile of its own."""
    rng = np.random.default_rng(0)
    for at in range(n):
        pixels = rng.integers(500, 1200, size=(BANDS, side, side)).astype(np.uint16)
        pixels[:, 0, 0] = 600 + 100 * (at % 3)
        geotiff(folder / f"class {at % 3}" / f"{at:02d}.tif", pixels, x=20_000.0 * at, y=5e6, **more)
    return folder


def make_patch(folder: Path, at: int, labels: list[str], value: int = 800) -> Path:
    """A patch of BigEarthNet: twelve bands of three sizes, and its JSON file."""
    patch = folder / f"patch_{at}"
    rng = np.random.default_rng(at)
    x, y = 600_000.0 + 20_000 * at, 5_000_000.0
    for band, side in bigearthnet.SIDES.items():
        pixels = rng.integers(value, value + 200, size=(1, side, side)).astype(np.uint16)
        geotiff(patch / f"{patch.name}_{band}.tif", pixels, x, y, 1200 / side)
    note = {
        "labels": labels,
        "coordinates": {"ulx": x, "uly": y, "lrx": x + 1200, "lry": y - 1200},
        "projection": 'PROJCS["WGS 84 / UTM zone 32N",GEOGCS["WGS 84",AUTHORITY["EPSG","4326"]],'
        'AUTHORITY["EPSG","32632"]]',
    }
    (patch / f"{patch.name}{bigearthnet.NOTE}").write_text(json.dumps(note))
    return patch


def prepared(source: SceneSource, out: Path, task: str = "landcover", **more: Any) -> Any:
    return prepare_scenes(task, out, source, seed=0, **more)


# 13 bands


def test_thirteen_bands_come_back_as_they_were_written_and_in_their_place(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 65_536, size=(BANDS, 8, 8)).astype(np.uint16)
    for name, more in {"plain": {}, "deflate": {"compression": "zlib"}}.items():
        path = geotiff(tmp_path / f"{name}.tif", pixels, x=1000, y=9000, **more)
        header = read_header(path)
        assert (header.bands, header.height, header.bits, header.resolution_m) == (BANDS, 8, 16, 10)
        assert header.place == Place("32632", 1040, 8960)
        assert np.array_equal(read_pixels(path), pixels)
    separate = tmp_path / "separate.tif"
    tifffile.imwrite(separate, pixels, photometric="minisblack", planarconfig="separate")
    assert np.array_equal(read_pixels(separate), pixels)
    assert read_header(separate).place is None


def test_eurosat_of_13_bands_is_split_by_tiles_and_standardised_with_its_own_statistics(tmp_path):
    out = tmp_path / "out"
    meta = prepared(eurosat.read(request(make_eurosat(tmp_path / "raw"))), out)
    assert meta.bands == list(eurosat.SENTINEL2) and meta.bits == 16 and meta.split_by == "by tiles of 10 km"
    train = load_scenes(out, "train", "landcover")
    assert train.batch(np.arange(4)).shape == (4, BANDS, 8, 8)
    x = train.batch(np.arange(len(train)))
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(BANDS), atol=1e-4)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(BANDS), atol=1e-4)
    index = pl.read_parquet(out / "index.parquet")
    assert index.group_by("place").agg(pl.col("split").n_unique())["split"].max() == 1
    found = leakage("landcover", out, out, "test")
    assert found["checked"] and found["shared"] == 0 and found["unit"] == "tile"


def test_a_model_reads_its_own_bands_by_name_and_refuses_scenes_without_them(tmp_path):
    source = eurosat.read(request(make_eurosat(tmp_path / "raw")))
    out = tmp_path / "out"
    prepared(source, out)
    full = load_scenes(out, "val", "landcover")
    two = {**full.spec, "bands": ["B04", "B03"], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    some = load_scenes(out, "val", "landcover", spec=two).batch(np.arange(3))
    stored = np.load(out / "scenes.npy")[full.rows[:3]]
    assert np.array_equal(some.numpy(), stored[:, [3, 2]].astype(np.float32))
    with pytest.raises(DataError, match="lacks the band B99"):
        load_scenes(out, "val", "landcover", spec={**two, "bands": ["B99", "B03"]})
    with pytest.raises(DataError, match="resolution_m: the model's 20"):
        load_scenes(out, "val", "landcover", spec={**full.spec, "resolution_m": 20.0})


def test_pixels_without_data_are_the_mean_and_no_part_of_the_statistics(tmp_path):
    raw = make_eurosat(tmp_path / "raw")
    plain = prepared(eurosat.read(request(raw)), tmp_path / "plain")
    source = eurosat.read(request(raw))

    def read(at: int) -> np.ndarray:
        pixels = source.read(at).copy()
        pixels[:, :, -1] = 0
        return pixels

    meta = prepared(replace(source, read=read), tmp_path / "gaps")
    assert any("without data" in text for text in meta.warnings)
    assert meta.statistics.mean[0] == pytest.approx(plain.statistics.mean[0], rel=0.05)  # zeros would take an eighth
    x = load_scenes(tmp_path / "gaps", "test", "landcover").batch(np.arange(2))
    assert (x[..., -1] == 0).all() and (x[..., 0] != 0).any()

    def read_little(at: int) -> np.ndarray:
        return np.zeros_like(read(at)) if at == 4 else read(at)

    meta = prepared(replace(source, read=read_little), tmp_path / "little")
    assert meta.attrition[-1] == {"step": "without scenes of more than 50% pixels without data", "scenes": 29}


def test_patches_that_show_clouds_only_are_left_out_and_snow_is_not():
    cloud = np.full((BANDS, 4, 4), 5000, dtype=np.uint16)
    snow = cloud.copy()
    snow[eurosat.SENTINEL2.index("B11")] = 800
    assert cloud_fraction(cloud, eurosat.SENTINEL2) == 1 and cloud_fraction(snow, eurosat.SENTINEL2) == 0
    assert cloud_fraction(cloud[:3], ("red", "green", "blue")) == 0


# what is refused


def test_a_folder_with_two_sizes_is_refused_with_their_counts(tmp_path):
    raw = make_eurosat(tmp_path / "raw", 6)
    geotiff(raw / "class 0" / "odd.tif", np.ones((BANDS, 16, 16), np.uint16))
    with pytest.raises(DataError, match=r"6 of 13 bands of 8 px and 16 bits, 1 of 13 bands of 16 px .*"):
        eurosat.read(request(raw))


def test_a_folder_with_two_resolutions_on_the_ground_is_refused(tmp_path):
    raw = make_eurosat(tmp_path / "raw", 6)
    geotiff(raw / "class 0" / "odd.tif", np.ones((BANDS, 8, 8), np.uint16), metres=20)
    with pytest.raises(DataError, match=r"pixels of different sizes on the ground, in m: 10\.0, 20\.0"):
        eurosat.read(request(raw))


def test_a_file_that_lacks_a_band_is_refused(tmp_path):
    raw = make_eurosat(tmp_path / "raw", 6)
    geotiff(raw / "class 0" / "odd.tif", np.ones((BANDS - 1, 8, 8), np.uint16))
    with pytest.raises(DataError, match="1 of 12 bands"):
        eurosat.read(request(raw))


def test_geotiff_without_projection_has_no_place(tmp_path):
    raw = make_eurosat(tmp_path / "raw", 6)
    pixels = np.ones((BANDS, 8, 8), np.uint16)
    tifffile.imwrite(raw / "class 0" / "odd.tif", pixels, photometric="minisblack", planarconfig="separate")
    with pytest.raises(DataError, match="1 of 7 files have no projection, among them "):
        eurosat.read(request(raw))


def test_an_image_larger_than_a_scene_is_refused_before_its_pixels_are_read(tmp_path):
    path = tmp_path / "large.tif"
    tifffile.memmap(path, shape=(MOST + 1, MOST + 1), dtype=np.uint16, photometric="minisblack").flush()
    with pytest.raises(DataError, match="cut it into scenes first"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"II*\0", b"\xff\xd8\xff"])
def test_files_that_are_no_tiff_are_told(content, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*a\.tif"):
        read_header(path)


def test_a_damaged_picture_stops_or_is_skipped_and_listed(tmp_path):
    for at in range(30):
        picture = Image.fromarray(np.random.default_rng(at).integers(0, 255, (8, 8, 3)).astype(np.uint8))
        (tmp_path / "raw" / f"c{at % 2}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "raw" / f"c{at % 2}" / f"{at}.png")
    (tmp_path / "raw" / "c0" / "0.png").write_bytes(b"nothing")
    source = eurosat.read(request(tmp_path / "raw"))
    with pytest.raises(DataError, match=r"1 of 30 scenes cannot be used.*\n.*cannot read"):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    meta = prepared(source, tmp_path / "out", skip_bad=True)
    assert meta.skipped[0]["file"] == "c0/0.png" and meta.bits == 8 and meta.bands == ["red", "green", "blue"]
    assert any("the splits are random" in text for text in meta.warnings)


# BigEarthNet


def test_corine_has_43_classes_in_19_groups():
    assert len(corine.ALL) == 43 and len(corine.GROUPS) == 19 and len(corine.UNGROUPED) == 11
    assert corine.indices(["Rice fields", "Pastures"], 19, "x") == (2, 4)
    assert corine.indices(["Airports"], 19, "x") == () and len(corine.indices(["Airports"], 43, "x")) == 1
    assert not any("," in name or "/" in name for count in (19, 43) for name in corine.classes(count))
    with pytest.raises(DataError, match="the label 'Pasture' is not one of CORINE's 43") as refusal:
        corine.indices(["Pasture"], 19, "x")
    assert "Pastures" in refusal.value.do
    with pytest.raises(DataError, match=r"Urban fabric.*\n.*one of the 19 groups"):
        corine.indices(["Urban fabric"], 43, "x")


def test_patches_become_twelve_bands_of_one_size_with_several_labels(tmp_path):
    for at in range(10):
        make_patch(tmp_path / "raw", at, ["Pastures"] if at % 2 else ["Pastures", "Mixed forest"])
    make_patch(tmp_path / "raw", 10, ["Airports"])
    source = bigearthnet.read(request(tmp_path / "raw"))
    meta = prepared(source, tmp_path / "out", "landcover-multilabel")
    assert meta.several_labels and meta.size == 120 and len(meta.bands) == 12 and len(meta.classes) == 19
    assert meta.attrition[:2] == [{"step": "patches", "scenes": 11}, {"step": "scenes of the source", "scenes": 10}]
    train = load_scenes(tmp_path / "out", "train", "landcover-multilabel")
    assert train.y.dtype == np.float32 and train.y[:, 4].all() and 0 < train.y[:, 10].sum() < len(train)
    with pytest.raises(DataError, match="prepared for 'landcover-multilabel', not for 'landcover'"):
        read_meta(tmp_path / "out", "landcover")
    preparation = find_task("landcover").preparation
    options = preparation.parse("landcover", {"source": "bigearthnet", "path": tmp_path / "raw"})
    with pytest.raises(Exception, match="has several labels, which is task 'landcover-multilabel'"):
        preparation.run("landcover", tmp_path / "other", options, False, Resources(None, None))  # type: ignore[arg-type]


def test_patches_that_lack_a_band_or_have_one_of_another_size_or_place_are_told(tmp_path):
    patch = make_patch(tmp_path, 0, ["Pastures"])
    place = bigearthnet.read_note(patch, 19).place
    assert bigearthnet.read_patch(patch, place).shape == (12, 120, 120)
    band = patch / f"{patch.name}_B05.tif"
    geotiff(band, np.ones((1, 120, 120), np.uint16), 600_000, 5_000_000)
    with pytest.raises(DataError, match="B05 of a patch is 1 band of 60 x 60 px"):
        bigearthnet.read_patch(patch, place)
    geotiff(band, np.ones((1, 60, 60), np.uint16), 0, 0, 20)
    for of_labels, than in ((place, "JSON file"), (None, "other bands")):
        with pytest.raises(DataError, match=f"lies elsewhere than the {than}"):
            bigearthnet.read_patch(patch, of_labels)
    tifffile.imwrite(band, np.ones((60, 60), np.uint16))
    with pytest.raises(DataError, match="has no projection"):
        bigearthnet.read_patch(patch, place)
    band.unlink()
    with pytest.raises(DataError, match="lacks the band B05"):
        bigearthnet.read_patch(patch, place)


def test_enlarged_bands_keep_their_values_and_their_gaps():
    pixels = np.full((20, 20), 700, dtype=np.uint16)
    assert (bigearthnet.enlarge(pixels) == 700).all()
    pixels[0, 0] = 0
    large = bigearthnet.enlarge(pixels)
    assert (large[:6, :6] == 0).all() and set(np.unique(large)) == {0, 700}


# splits and augmentation


def test_neighbours_of_another_split_leave_train_then_val():
    places = [Place("z", x, 0.0) for x in (0, 100, 250, 1000, 1090)] + [Place("other zone", 0, 0)]
    split = ["train", "test", "train", "val", "test", "train"]
    assert near_others(places, split, 120) == [True, False, False, True, False, False]


def test_scenes_beside_those_of_another_split_are_left_out_and_counted(tmp_path):
    source = synthetic.read(SceneRequest(None, 0, 160, 19))
    close = [replace(scene, place=Place("z", 160.0 * (at % 40), 160.0 * (at // 40))) for at, scene in
             enumerate(source.scenes)]  # fmt: skip
    meta = prepared(replace(source, scenes=close), tmp_path / "out", tile_km=0.64)
    assert meta.attrition[-1]["step"] == "without scenes within 320 m of another split"
    assert meta.attrition[-1]["scenes"] < 160
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    xy, train = table.select("x", "y").to_numpy(), (table["split"] == "train").to_numpy()
    apart = np.abs(xy[train][:, None] - xy[~train][None]).max(-1)
    assert apart.min() >= 320


def test_exact_copies_stay_together(tmp_path):
    source = synthetic.read(SceneRequest(None, 0, 96, 19))
    meta = prepared(replace(source, read=lambda at: source.read(0 if at in (0, 40, 90) else at)), tmp_path / "out")
    assert any("2 scenes are exact copies" in text for text in meta.warnings)
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    copies = table.filter(pl.col("id").is_in([f"synthetic-{at:05d}" for at in (0, 40, 90)]))
    assert copies["place"].n_unique() == 1 and copies["split"].n_unique() == 1


def test_augmentation_turns_each_scene_by_its_own_number():
    x = np.arange(2 * 3 * 4 * 4, dtype=np.uint16).reshape(2, 3, 4, 4)
    rows = np.array([7, 9])
    both = augment_scenes(x, 1, 2, rows)
    assert np.array_equal(both[1:], augment_scenes(x[1:], 1, 2, rows[1:]))
    assert np.array_equal(np.sort(both.reshape(2, 3, -1)), np.sort(x.reshape(2, 3, -1)))
    kinds = {augment_scenes(x[:1], 0, 0, np.array([row])).tobytes() for row in range(60)}
    assert len(kinds) == 8


# Statlog


def test_overlapping_neighbourhoods_are_counted():
    image = np.arange(5 * 5 * 4, dtype=np.uint8).reshape(5, 5, 4)

    def at(row: int, column: int) -> np.ndarray:
        return image[row : row + 3, column : column + 3].transpose(2, 0, 1)

    train = np.stack([at(0, 0)])
    assert statlog.overlapping(np.stack([at(0, 1), at(1, 0), at(1, 1), at(2, 2)]), train) == 2
    assert statlog.overlapping(np.stack([at(1, 1)]), np.stack([at(0, 1), at(2, 1)])) == 1


def test_blocks_do_not_cross_the_original_split():
    assert statlog.block_of(4434).startswith("train") and statlog.block_of(4435) == "test-000"


def test_statlog_keeps_its_original_split_and_says_that_it_leaks(real_data, tmp_path):
    path = real_data / "landcover" / "statlog-satellite.parquet"
    meta = prepared(statlog.read(request(path)), tmp_path / "out")
    assert sum(meta.counts["test"].values()) == 2000 and meta.bands == list(statlog.BANDS)
    assert any("1,939 of 2,000 test neighbourhoods share six" in text for text in meta.warnings)
    with pytest.raises(DataError, match="the original split is of 6,435"):
        short = tmp_path / "short.parquet"
        pl.read_parquet(path).head(100).write_parquet(short)
        statlog.read(request(short))


def test_the_real_fixtures_of_eurosat_and_bigearthnet_are_prepared(real_data, tmp_path):
    folder = real_data / "landcover"
    meta = prepared(eurosat.read(request(folder / "eurosat")), tmp_path / "eurosat")
    assert meta.size == 64 and len(meta.classes) == 10 and sum(sum(n.values()) for n in meta.counts.values()) == 48
    source = bigearthnet.read(request(folder / "bigearthnet-s2"))
    meta = prepared(source, tmp_path / "ben", "landcover-multilabel")
    assert meta.split_by == "by tiles of 10 km" and meta.resolution_m == 10
    assert sum(row["scenes"] for row in meta.attrition[-1:]) <= 11


def test_a_band_without_data_is_named(tmp_path):
    source = eurosat.read(request(make_eurosat(tmp_path / "raw")))

    def read(at: int) -> np.ndarray:
        pixels = source.read(at).copy()
        pixels[9] = 0
        return pixels

    with pytest.raises(DataError, match="band B10 of eurosat has no data in any scene"):
        prepared(replace(source, read=read), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [eurosat, bigearthnet])
def test_a_folder_that_is_not_there_is_told(module, tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        module.read(request(tmp_path / "nowhere"))
