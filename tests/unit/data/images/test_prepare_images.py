import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from raylab.data import splits
from raylab.data.images.augment import AUGMENT
from raylab.data.images.dataset import load_images
from raylab.data.images.meta import ImageMeta
from raylab.data.images.prepare import prepare_images
from raylab.errors import DataError, UsageError
from raylab.files import IGNORE_FILES

REAL = Path(os.environ.get("RAYLAB_DATA", Path(__file__).parents[5] / "shared" / "data")) / "cxr"
LABELS = ("normal", "pneumonia", "COVID-19")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """40 small images 0.png .. 39.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (50, 46), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def write(path: Path, numbers: range | list[int], extra: str = "") -> Path:
    path.write_text("".join(f"p{n // 2} {n}.png {LABELS[n // 2 % 3]} site{n // 2 % 2}\n" for n in numbers) + extra)
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "out"
    prepare_images("covidnet", out, None, None, None, None, source="synthetic", size=64, patients=60)
    return out


def test_three_lists(images: Path, tmp_path: Path) -> None:
    lists = [
        write(tmp_path / name, numbers)
        for name, numbers in {"a": range(24), "b": range(24, 32), "c": range(32, 40)}.items()
    ]
    seen: list[tuple[int, int]] = []
    meta = prepare_images(
        "covidnet", tmp_path / "out", images, *lists, size=32, progress=lambda *done: seen.append(done)
    )
    assert meta.task == "covidnet" and meta.kind == "cxr-frontal-u8" and meta.synthetic is False
    assert meta.counts["train"] == {"normal": 8, "pneumonia": 8, "COVID-19": 8}
    assert meta.patients == {"train": 12, "val": 4, "test": 4}
    assert meta.sources["train"]["site0"] == {"normal": 4, "pneumonia": 4, "COVID-19": 4}
    assert seen == [(40, 40)]  # one chunk
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert table["row"].to_list() == list(range(40)) and table["file"][33] == "33.png"
    pixels = np.load(tmp_path / "out" / "images.npy")
    assert pixels.shape == (40, 32, 32) and pixels.dtype == np.uint8
    assert meta.statistics["mean"] == pytest.approx(pixels[:24].mean() / 255)  # train only
    assert meta.statistics["std"] == pytest.approx(pixels[:24].std() / 255)


def test_val_is_carved_from_train_by_patient(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(40))
    meta = prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32)
    assert meta.val_carved_from_train is True and "carved" in meta.attrition[-1]["step"]
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    parts = table.group_by("patient").agg(pl.col("split").n_unique())
    assert parts["split"].max() == 1 and set(table["split"]) == {"train", "val"}
    again = prepare_images("covidnet", tmp_path / "again", images, train, None, None, size=32)
    assert (again.split_hash, again.data_hash) == (meta.split_hash, meta.data_hash)


def test_rows_that_overlap_leave_train_then_val(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(20), "other 39.png normal x\n" + "p0 0.png normal site0\n")
    val = write(tmp_path / "val.txt", [18, *range(20, 32)])
    test = write(tmp_path / "test.txt", [31, *range(32, 40)])
    meta = prepare_images("covidnet", tmp_path / "out", images, train, val, test, size=32)
    assert [(row["images"], row["patients"]) for row in meta.attrition] == [
        (44, 21),  # as listed
        (43, 21),  # p0's line stood twice
        (42, 20),  # 39.png stands in test under another id
        (40, 20),  # both images of p15 leave val: one of them is in test
        (38, 20),  # both images of p9 leave train: one of them is in val
    ]
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert table.filter(pl.col("split") == "test").height == 9  # test is kept whole
    assert table.group_by("patient").agg(pl.col("split").n_unique())["split"].max() == 1


def test_one_file_named_twice_counts_once(images: Path, tmp_path: Path) -> None:
    """By its name, by another spelling, and by a link; in one list, in two, and in a manifest."""
    (images / "soft.png").symlink_to("8.png")
    os.link(images / "9.png", images / "hard.png")
    (images / "sub").mkdir()
    (images / "sub" / "up.png").symlink_to("../10.png")
    again = [("p4", "8.png"), ("p4", "./8.png"), ("q", ".//8.png"), ("q", "soft.png")]
    again += [("p4", "hard.png"), ("p5", "sub/up.png"), ("p5", "./sub//up.png")]
    lines = "".join(f"{patient} {file} {LABELS[(5 if '5' in patient else 4) % 3]} x\n" for patient, file in again)
    train = write(tmp_path / "train.txt", range(8, 24), lines)
    meta = prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32)
    assert [row["images"] for row in meta.attrition][:2] == [16 + len(again), 16]
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert sorted(table["file"]) == sorted(f"{n}.png" for n in range(8, 24))

    test = write(tmp_path / "test.txt", [30, 31], f"other ./sub/up.png {LABELS[2]} x\n")
    meta = prepare_images("covidnet", tmp_path / "both", images, train, None, test, size=32)
    table = pl.read_parquet(tmp_path / "both" / "index.parquet")
    assert table["file"].n_unique() == table.height and set(table.filter(pl.col("split") == "test")["file"]) == {
        "30.png",
        "31.png",
        "10.png",
    }
    (tmp_path / "m.csv").write_text("path,label,view\n./8.png,pneumonia,LL\nsoft.png,pneumonia,LL\n9.png,pneumonia,\n")
    meta = prepare_images("covidnet", tmp_path / "m", images, None, None, None, size=32, manifest=tmp_path / "m.csv")
    assert [row["images"] for row in meta.attrition] == [3, 2]
    meta = prepare_images("covidnet", tmp_path / "l", images, None, None, train, size=32, manifest=tmp_path / "m.csv")
    assert pl.read_parquet(tmp_path / "l" / "index.parquet").filter(pl.col("view") == "LL")["file"].to_list() == [
        "8.png"
    ]

    wrong = write(tmp_path / "wrong.txt", [8], "p4 soft.png normal x\n")
    with pytest.raises(DataError, match=r"line 2: 8\.png is normal, but pneumonia in line 1"):
        prepare_images("covidnet", tmp_path / "wrong", images, wrong, None, None, size=32)


def test_two_files_of_one_name_in_folders_of_their_splits(images: Path, tmp_path: Path) -> None:
    for name, number in (("train", 30), ("test", 31)):
        (images / name).mkdir()
        (images / f"{number}.png").rename(images / name / "same.png")
    line = "{} same.png normal x\n"
    train = write(tmp_path / "train.txt", range(8), line.format("a"))
    test = write(tmp_path / "test.txt", range(8, 16), line.format("b"))
    meta = prepare_images("covidnet", tmp_path / "out", images, train, None, test, size=32)
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert meta.attrition[-1]["images"] == 18
    assert set(table.filter(pl.col("patient").is_in(["a", "b"]))["file"]) == {"same.png", "test/same.png"}


def test_how_brightness_came_about_is_counted(images: Path, tmp_path: Path) -> None:
    from test_dicom import RAMP, texture
    from test_dicom import write as dicom

    deep = texture(0, 4000).astype(np.uint16)
    dicom(images / "0.png", RAMP, WindowCenter="2048", WindowWidth="4096")
    dicom(images / "1.png", deep, bits=12, WindowCenter="2048", WindowWidth="4096")
    dicom(images / "2.png", deep[::-1].copy(), bits=12, ViewPosition="LL")
    dicom(images / "3.png", deep[:, ::-1].copy(), bits=12, WindowCenter="32768", WindowWidth="65536")
    deep[:20, :20] = 65535
    dicom(images / "4.png", deep[::-1, ::-1].copy())
    (images / "5.png").write_bytes(b"II*\0")
    meta = prepare_images(
        "covidnet", tmp_path / "out", images, None, None, write(tmp_path / "t.txt", range(6)), size=32, skip_bad=True
    )
    assert meta.contrast == {
        "values kept, window does not suit": 1,
        "window": 1,
        "stretched": 2,
        "stretched, window does not suit": 1,
    }
    assert any("1 images show 90%" in warning and "  4.png" in warning for warning in meta.warnings)
    assert any(warning.startswith("2 DICOM files have a window that does not suit") for warning in meta.warnings)
    assert any("1 images do not have a frontal view (1 LL)" in warning for warning in meta.warnings)
    assert meta.skipped[0]["reason"].endswith("; convert it to one of them")


def test_nothing_left_of_a_list(images: Path, tmp_path: Path) -> None:
    same = write(tmp_path / "same.txt", range(6))
    with pytest.raises(DataError, match=r"every train row of .*same\.txt"):
        prepare_images("covidnet", tmp_path / "out", images, same, None, same, size=32)
    assert not (tmp_path / "out").exists()


def test_two_classes_for_one_file(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(4), "p0 0.png COVID-19 site0\n")
    with pytest.raises(DataError, match=r"line 5: 0\.png is COVID-19, but normal in line 1"):
        prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32)


def test_missing_images_are_named(images: Path, tmp_path: Path) -> None:
    test = write(tmp_path / "test.txt", range(30, 55))
    with pytest.raises(DataError, match=r"15 of 25 images are missing") as caught:
        prepare_images("covidnet", tmp_path / "out", images, None, None, test, size=32)
    assert "49.png" in str(caught.value) and "50.png" not in str(caught.value) and "5 more" in str(caught.value)


def test_images_in_a_folder_of_their_split(images: Path, tmp_path: Path) -> None:
    """As COVIDx is unpacked: names without a folder, images below train/ and test/."""
    (images / "train").mkdir()
    for number in range(40):
        (images / f"{number}.png").rename(images / "train" / f"{number}.png")
    meta = prepare_images(
        "covidnet", tmp_path / "out", images, write(tmp_path / "t.txt", range(40)), None, None, size=32
    )
    assert sum(meta.patients.values()) == 20


def test_unreadable_images(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(40))
    whole = prepare_images("covidnet", tmp_path / "whole", images, train, None, None, size=32)
    (images / "3.png").write_text("not an image")
    (images / "7.png").write_bytes((images / "7.png").read_bytes()[:200])
    with pytest.raises(DataError, match="2 of 40 images cannot be used") as caught:
        prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32)
    assert "3.png" in str(caught.value) and "7.png" in str(caught.value) and "--skip-bad" in str(caught.value)
    assert not (tmp_path / "out").exists()
    meta = prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32, skip_bad=True)
    assert {row["file"] for row in meta.skipped} == {"3.png", "7.png"}
    assert meta.attrition[-1]["images"] == 38
    old = {f: i for i, f in enumerate(pl.read_parquet(tmp_path / "whole" / "index.parquet")["file"])}
    new = pl.read_parquet(tmp_path / "out" / "index.parquet")["file"].to_list()
    before, after = np.load(tmp_path / "whole" / "images.npy"), np.load(tmp_path / "out" / "images.npy")
    assert np.array_equal(after, before[[old[f] for f in new]]) and whole.skipped == []


def test_wrong_use(images: Path, tmp_path: Path) -> None:
    out, train = tmp_path / "out", write(tmp_path / "train.txt", range(4))
    with pytest.raises(UsageError, match="no label list"):
        prepare_images("covidnet", out, images, None, None, None)
    with pytest.raises(UsageError, match="no images folder given"):
        prepare_images("covidnet", out, None, train, None, None)
    with pytest.raises(DataError, match="no images folder at"):
        prepare_images("covidnet", out, tmp_path / "nowhere", train, None, None)
    with pytest.raises(UsageError, match="unknown source"):
        prepare_images("covidnet", out, images, train, None, None, source="covidnet")
    with pytest.raises(UsageError, match="--patients"):
        prepare_images("covidnet", out, None, None, None, None, source="synthetic", patients=3)


def test_the_source_synthetic_marks_images_that_are_not_of_patients(images: Path, tmp_path: Path) -> None:
    lists = [write(tmp_path / name, numbers) for name, numbers in {"a": range(24), "b": range(24, 40)}.items()]
    for path in lists:
        path.write_text(path.read_text().replace("site0", "synthetic").replace("site1", "synthetic"))
    meta = prepare_images("covidnet", tmp_path / "out", images, lists[0], None, lists[1], size=32)
    assert meta.synthetic and meta.source == "covidx"
    lists[1].write_text(lists[1].read_text().replace("synthetic", "site0", 1))
    with pytest.raises(DataError, match="the source 'synthetic' beside those of others"):
        prepare_images("covidnet", tmp_path / "mixed", images, lists[0], None, lists[1], size=32)


def test_lists_have_no_classes_with_spaces(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(24))
    with pytest.raises(UsageError, match="--classes: 'no nodule'") as error:
        prepare_images("covidnet", tmp_path / "out", images, train, None, None, classes=("no nodule", "nodule"))
    assert "separated by spaces" in error.value.why and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sources", "lists", "origin"),
    [
        (["lab"], {}, "lab"),
        (["lab", "b", "unknown"], {}, "b + lab"),
        (["unknown"], {}, "own images"),
        (["a", "b", "c", "d"], {}, "own images"),
        (["lab"], {"train": {}}, "covidx"),
    ],
)
def test_data_of_a_manifest_is_called_by_its_sources(sources: list[str], lists: dict[str, Any], origin: str) -> None:
    of_split = {"train": {name: {"normal": 1} for name in sources}}
    meta = ImageMeta.model_construct(source="covidx", manifest="0" * 64, lists=lists, sources=of_split)
    assert meta.origin == origin
    assert ImageMeta.model_construct(source="synthetic", sources=of_split).origin == "synthetic"


def test_synthetic_says_so(drawn: Path) -> None:
    samples = load_images(drawn, "all")
    assert samples.meta.synthetic is True and samples.meta.source == "synthetic"
    assert all(name.startswith("synthetic-A") for name in samples.ids)
    assert set(samples.source) == {"synthetic-A"}
    assert set(samples.meta.counts) == {"train", "val", "test"}


def test_loader_normalises_with_train_statistics(drawn: Path) -> None:
    train = load_images(drawn, "train")
    x = train.batch(np.arange(len(train)))
    assert x.shape == (len(train), 1, 64, 64) and x.dtype == torch.float32
    assert abs(float(x.mean())) < 1e-3 and abs(float(x.std()) - 1) < 1e-3
    assert train.y.dtype == train.group.dtype == np.int64 and train.absent == []
    whole, parts = load_images(drawn, "all"), [load_images(drawn, s) for s in ("train", "val", "test")]
    assert len(whole) == sum(len(p) for p in parts)
    assert len({int(g) for p in parts for g in set(p.group)}) == 60  # numbers of the directory, not of the split


def test_smaller_images_are_averaged(drawn: Path) -> None:
    large, small = load_images(drawn, "val"), load_images(drawn, "val", size=32)
    index = np.arange(5)
    means = torch.nn.functional.avg_pool2d(large.batch(index), 2)
    pair = torch.stack([small.batch(index).flatten(), means.flatten()])
    assert small.spec["size"] == 32 and torch.corrcoef(pair)[0, 1] > 0.99
    with pytest.raises(DataError, match="--size 96"):
        load_images(drawn, "val", size=96)


def test_model_brings_its_statistics(drawn: Path, images: Path, tmp_path: Path) -> None:
    spec = {**load_images(drawn, "train", size=32).spec, "mean": 0.25, "std": 0.5}
    prepare_images("covidnet", tmp_path / "out", images, None, None, write(tmp_path / "test.txt", range(8)), size=32)
    samples = load_images(tmp_path / "out", "test", spec=spec)
    raw = torch.from_numpy(np.load(tmp_path / "out" / "images.npy")[:, None]).float() / 255
    assert torch.equal(samples.batch(np.arange(8)), (raw - 0.25) / 0.5) and samples.spec == spec
    with pytest.raises(DataError, match="no train split to take pixel statistics from"):
        load_images(tmp_path / "out", "test")
    with pytest.raises(DataError, match="no train split"):
        load_images(tmp_path / "out", "train", spec=spec)
    for other in ({"kind": "icu-hourly"}, {"classes": ["normal", "COVID-19"]}):
        with pytest.raises(DataError, match="images of another kind"):
            load_images(tmp_path / "out", "test", spec={**spec, **other})


def test_wrong_names(drawn: Path) -> None:
    with pytest.raises(UsageError, match="unknown split 'tests'"):
        load_images(drawn, "tests")
    with pytest.raises(UsageError, match="unknown augmentation 'rotate'"):
        load_images(drawn, "train", augment={"rotate": 5})


def test_augmentation_depends_on_seed_epoch_and_row_alone(drawn: Path) -> None:
    train = load_images(drawn, "train", size=48)
    index = np.arange(21)
    x = train.batch(index, (5, 2))
    shuffled = np.random.default_rng(0).permutation(index)
    assert torch.equal(train.batch(shuffled, (5, 2)), x[shuffled])
    for cut in (index[:1], index[3:10]):  # other batches of other sizes
        assert torch.equal(train.batch(cut, (5, 2)), x[cut])
    whole = load_images(drawn, "all", size=48)  # another split object, the same rows of the directory
    at = np.searchsorted(whole.rows, train.rows[index])
    assert torch.equal(whole.batch(at, (5, 2)), x)
    for other in ((5, 3), (6, 2), None):
        assert not torch.equal(train.batch(index, other), x)


def test_augmentation_moves_as_stated(drawn: Path) -> None:
    index = np.arange(16)
    still = dict.fromkeys(AUGMENT, 0.0)
    plain = load_images(drawn, "train").batch(index)
    spec = load_images(drawn, "train").spec
    none = load_images(drawn, "train", augment=still).batch(index, (0, 0))
    assert torch.allclose(none, plain, atol=1e-4)
    mirrored = load_images(drawn, "train", augment={**still, "flip": 1.0}).batch(index, (0, 0))
    assert torch.allclose(mirrored, plain.flip(-1), atol=1e-4)
    brighter = load_images(drawn, "train", augment={**still, "brightness": 0.1}).batch(index, (0, 0))
    to_pixels = [x * spec["std"] + spec["mean"] for x in (brighter, plain)]
    ratio = (to_pixels[0].sum((1, 2, 3)) / to_pixels[1].sum((1, 2, 3))).numpy()
    assert ratio.min() > 0.89 and ratio.max() < 1.11 and ratio.std() > 0.01
    black = -spec["mean"] / spec["std"]
    assert float(load_images(drawn, "train").batch(index, (0, 0)).min()) >= black - 1e-5  # outside is air


def test_a_rectangle_is_erased_from_the_share_of_images_asked_for(drawn: Path) -> None:
    index, still = np.arange(21), dict.fromkeys(AUGMENT, 0.0)
    plain, whole = (load_images(drawn, "train", augment=a).batch(index, (0, 0)) for a in (still, {}))
    counts = {}
    for share in (0.5, 1.0):
        erased = load_images(drawn, "train", augment={**still, "erase": share}).batch(index, (0, 0))
        changed = [number for number in index if not torch.equal(erased[number], plain[number])]
        for number in changed:
            rows, columns = np.nonzero((erased[number, 0] != plain[number, 0]).numpy())
            box = erased[number, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert len(box.unique()) == 1 and 0.01 < box.numel() / plain[0, 0].numel() < 0.42
        counts[share] = len(changed)
    assert counts[1.0] == 21 and 4 < counts[0.5] < 17
    both = load_images(drawn, "train", augment={"erase": 1.0}).batch(index, (0, 0))
    assert 0.5 < float((both == whole).float().mean()) < 0.98, "the rest is moved as without erasing"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images at {REAL}")
def test_real_images(tmp_path: Path) -> None:
    labels = REAL / "labels"
    meta = prepare_images("covidnet", tmp_path / "b", REAL / "images", None, labels / "val_B.txt", None, size=64)
    assert meta.counts == {"val": {"normal": 52, "pneumonia": 97, "COVID-19": 25}}
    assert meta.statistics is None and meta.skipped == []


def test_carving_uses_the_shared_splitter() -> None:
    """A patient with images of two classes still goes to one split."""
    parts = splits.assign(["a", "a", "b", "c"], [0, 2, 1, 0], {"train": 0.85, "val": 0.15}, 0)
    assert parts[0] == parts[1]


def radiographs(folder: Path, names: dict[str, int], cut: int = 0) -> Path:
    """Images that differ by seed, {name: seed}; `cut` px narrower."""
    folder.mkdir(exist_ok=True)
    for name, seed in names.items():
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).resize((120, 120))
        coarse.crop((0, 0, 120 - cut, 120)).save(folder / name)
    return folder


def test_copies_under_other_names_never_cross_splits(tmp_path: Path) -> None:
    folder = radiographs(tmp_path / "images", {f"{n}.png": n for n in range(30)})
    radiographs(folder, {f"copy{n}.png": n for n in (3, 25)}, cut=3)
    rows = [f"p{n} {n}.png {LABELS[n % 3]} here" for n in range(20)]
    train = tmp_path / "train.txt"
    train.write_text("\n".join([*rows, "q25 copy25.png pneumonia there", "q3 copy3.png normal there"]))
    test = tmp_path / "test.txt"
    test.write_text("\n".join(f"p{n} {n}.png {LABELS[n % 3]} here" for n in range(20, 30)))
    meta = prepare_images("covidnet", tmp_path / "out", folder, train, None, test, size=64)
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert "copy25.png" not in table["file"].to_list() and "25.png" in table["file"].to_list()
    assert any("copies of" in row["step"] and row["images"] == 31 for row in meta.attrition)
    pair = table.filter(pl.col("file").is_in(["3.png", "copy3.png"]))
    assert set(pair["group"]) == {"here:p3"} and pair["split"].n_unique() == 1 and pair["patient"].n_unique() == 2
    assert meta.duplicates.pairs == meta.duplicates.of_different_patients == 2
    samples = load_images(tmp_path / "out", "all")
    assert len(samples) == 31 and len(set(samples.group)) == 30


def test_apart_from_another_set(tmp_path: Path) -> None:
    folder = radiographs(tmp_path / "images", {f"{n}.png": n for n in range(12)})
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("\n".join(f"a{n} {n}.png {LABELS[n % 3]} one" for n in range(6)))
    second.write_text("\n".join(f"b{n} {n}.png {LABELS[n % 3]} two" for n in range(4, 12)))
    prepare_images("covidnet", tmp_path / "a", folder, None, None, first, size=64)
    meta = prepare_images("covidnet", tmp_path / "b", folder, None, None, second, size=64, apart_from=[tmp_path / "a"])
    assert pl.read_parquet(tmp_path / "b" / "index.parquet")["file"].to_list() == [f"{n}.png" for n in range(6, 12)]
    assert np.load(tmp_path / "b" / "images.npy").shape[0] == 6
    assert meta.attrition[-1] == {"step": "without copies of images in a", "images": 6, "patients": 6}
    with pytest.raises(DataError, match="every image is a copy"):
        prepare_images("covidnet", tmp_path / "c", folder, None, None, first, size=64, apart_from=[tmp_path / "a"])


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    folder = radiographs(tmp_path / "images", {f"{n}.png": n for n in range(6)})
    radiographs(folder, {"side.png": 7}, cut=60)  # 60 x 120
    (tmp_path / "manifest.csv").write_text(
        "path,label,view,patient\n"
        + "".join(f"{n}.png,normal,{'LL' if n == 2 else 'AP Supine'},p{n}\n" for n in range(6))
        + "side.png,pneumonia,,p9\n"
    )
    train = tmp_path / "train_COVIDx.txt"
    lines = [f"p{n} {n}.png normal here" for n in range(6)]
    train.write_text("\n".join([*lines, "p9 side.png pneumonia here"]))
    meta = prepare_images(
        "covidnet", tmp_path / "out", folder, train, None, None, size=64, manifest=tmp_path / "manifest.csv"
    )
    said = "\n".join(meta.warnings)
    assert "1 images do not have a frontal view (1 LL)" in said and "2.png" in said
    assert "1 images are narrower or wider" in said and "side.png" in said
    assert "no COVID-19 in train" in said
    assert meta.published.table == "COVIDx" and len(meta.published.differs) == 3
    views = pl.read_parquet(tmp_path / "out" / "index.parquet")["view"].to_list()
    assert views.count("LL") == 1 and views.count(None) == 1


def test_a_manifest_alone(tmp_path: Path) -> None:
    folder = radiographs(tmp_path / "images", {f"{n}.png": n for n in range(6)})
    (tmp_path / "manifest.csv").write_text(
        "path,label,patient\n" + "".join(f"images/{n}.png,{('covid', 'normal')[n % 2]},p{n // 2}\n" for n in range(6))
    )
    meta = prepare_images(
        "covidnet", tmp_path / "out", folder, None, None, None, size=64, manifest=tmp_path / "manifest.csv"
    )
    assert meta.counts == {"test": {"normal": 3, "pneumonia": 0, "COVID-19": 3}}
    assert meta.patients == {"test": 3} and meta.lists == {}


def test_decoding_elsewhere_gives_the_same_cache(images: Path, tmp_path: Path) -> None:
    (images / "3.png").write_text("not an image")
    train = write(tmp_path / "train.txt", range(40))
    seen = []

    def spread(work, chunks, cpus, tell):  # type: ignore[no-untyped-def]
        for path, argument in reversed(chunks.items()):
            seen.append(path)
            work(argument, path)

    here = prepare_images("covidnet", tmp_path / "a", images, train, None, None, size=32, skip_bad=True)
    there = prepare_images("covidnet", tmp_path / "b", images, train, None, None, size=32, skip_bad=True, spread=spread)
    assert seen and here.data_hash == there.data_hash and here.skipped == there.skipped
    written = {p.name for p in (tmp_path / "b").iterdir()} - set(IGNORE_FILES)
    assert written == {"images.npy", "index.parquet", "meta.json"}


def test_bad_images_leave_nothing_behind(tmp_path: Path) -> None:
    folder = radiographs(tmp_path / "images", {f"{n}.png": n for n in range(3)})
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(folder / "0.png")
    Image.new("L", (20_000, 20_000)).save(folder / "1.png")
    (folder / "2.png").write_bytes(b"GIF89a, which is no PNG")
    train = write(tmp_path / "train.txt", range(3))
    with pytest.raises(DataError, match="3 of 3 images cannot be used") as caught:
        prepare_images("covidnet", tmp_path / "out", folder, train, None, None, size=32)
    for why in ("1x1 px", "400 million pixels", "not a PNG, JPEG or DICOM"):
        assert why in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "train.txt"]


def test_a_masked_centre_shows_nothing_of_the_lung_field(drawn: Path) -> None:
    masked, plain = (load_images(drawn, "train", mask=mask) for mask in ("centre", None))
    index = np.arange(6)
    black = -plain.spec["mean"] / plain.spec["std"]
    x = masked.batch(index)
    assert torch.allclose(x[:, :, 7:54, 8:56], torch.full((6, 1, 47, 48), black))
    assert torch.equal(x[:, :, :6], plain.batch(index)[:, :, :6])
    changed = load_images(drawn, "train", mask="centre")
    changed.images = np.load(drawn / "images.npy")
    changed.images[:, 7:54, 8:56] = 200  # whatever is in the box, the network sees the same, augmented or not
    assert torch.equal(changed.batch(index, (0, 3)), masked.batch(index, (0, 3)))
    again = load_images(drawn, "val", spec=masked.spec)  # the model's spec, not the caller, says what it sees
    assert torch.allclose(again.batch(index)[:, :, 7:54, 8:56], torch.full((6, 1, 47, 48), black))


def test_a_masked_border_shows_the_lung_field_alone(drawn: Path) -> None:
    masked, plain = (load_images(drawn, "train", mask=mask) for mask in ("border", None))
    index, lungs = np.arange(6), (slice(None), slice(None), slice(6, 54), slice(8, 56))
    x, expected = masked.batch(index), torch.full((6, 1, 64, 64), -plain.spec["mean"] / plain.spec["std"])
    expected[lungs] = plain.batch(index)[lungs]
    assert torch.allclose(x, expected)
    changed = load_images(drawn, "train", mask="border")
    changed.images = np.load(drawn / "images.npy")
    changed.images[:, :6] = changed.images[:, 54:] = changed.images[:, :, :8] = changed.images[:, :, 56:] = 200
    assert torch.equal(changed.batch(index, (0, 3)), masked.batch(index, (0, 3)))


CASE = Path(os.environ.get("RAYLAB_CASES", Path(__file__).parents[5] / "shared" / "cases"))


@pytest.mark.parametrize(("manifest", "train"), [("manifest", 30), ("manifest-10-each", 10)])
def test_one_number_in_two_hospitals(tmp_path: Path, manifest: str, train: int) -> None:
    case = CASE / "patient-numbers-of-two-hospitals"
    if not case.is_dir():
        pytest.skip(f"no case at {case}")
    meta = prepare_images(
        "covidnet", tmp_path / "out", case / "images", None, None, None, size=64, manifest=case / f"{manifest}.csv"
    )
    kept = {split: sum(counts.values()) for split, counts in meta.counts.items()}
    assert (kept["train"] + kept["val"], kept["test"]) == (train, 10)


def manifest(folder: Path, *rows: str, head: str = "path,label,patient,source,split") -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def prepared_from(images: Path, tmp_path: Path, *rows: str, **more: str) -> tuple[dict, pl.DataFrame]:
    meta = prepare_images(
        "covidnet", tmp_path / "out", images, None, None, None, size=32, manifest=manifest(tmp_path, *rows, **more)
    )
    return meta, pl.read_parquet(tmp_path / "out" / "index.parquet")


def test_groups_are_of_a_source(images: Path, tmp_path: Path) -> None:
    """Patient 7 of h1 stays together, patient 7 of h2 is somebody else."""
    rows = [f"{n}.png,{LABELS[n % 3]},{'7' if n < 4 else n},h{n % 2},train" for n in range(20)]
    meta, table = prepared_from(images, tmp_path, *rows)
    assert table.filter(pl.col("patient") == "7")["group"].unique().sort().to_list() == ["h0:7", "h1:7"]
    assert meta.attrition[0] == {"step": "rows of the manifest", "images": 20, "patients": 17}
    assert sum(meta.patients.values()) == 17


@pytest.mark.parametrize("other", ["7", "7.0", " 7 ", "\u00a07"])
def test_one_patient_in_two_spellings_does_not_cross_splits(images: Path, tmp_path: Path, other: str) -> None:
    train = [f"{n}.png,{LABELS[n % 3]},{n},h1,train" for n in range(12)]
    meta, table = prepared_from(images, tmp_path, *train, f'20.png,normal,"{other}", H1 ,test')
    assert [row["images"] for row in meta.attrition][1:3] == [13, 12]
    assert "7.png" not in table["file"].to_list() and table.filter(pl.col("split") == "test")["patient"].item() == "7"


def test_who_cannot_be_told_apart_is_said(images: Path, tmp_path: Path) -> None:
    rows = [f"{n}.png,{LABELS[n % 3]},{n},train" for n in range(12)]
    more = ["20.png,normal,007,train", "21.png,normal,P1,train", "22.png,normal,p1,train", "23.png,normal,NA,train"]
    meta, table = prepared_from(images, tmp_path, *rows, *more, "24.png,normal,8,test", head="path,label,patient,split")
    said = "\n".join(meta.warnings)
    assert "16 of 16 images name no source" in said  # 8.png left train: without sources it is the patient of 24.png
    assert "4 patient numbers differ from another one of their source only in letter case" in said
    assert "1 of 16 images name no patient" in said and "8.png" not in table["file"].to_list()


def test_a_list_without_sources_is_compared_by_number(images: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("".join(f"{n} {n}.png {LABELS[n % 3]} h1\n" for n in range(12)))
    (tmp_path / "test.txt").write_text("7 20.png normal\n50 21.png normal\n")
    meta = prepare_images(
        "covidnet", tmp_path / "out", images, tmp_path / "train.txt", None, tmp_path / "test.txt", size=32
    )
    assert [row["images"] for row in meta.attrition][1:3] == [14, 13]


def test_one_file_name_in_the_folders_of_two_splits_is_two_images(images: Path, tmp_path: Path) -> None:
    for split, numbers in (("train", range(12)), ("test", range(20, 23))):
        (images / split).mkdir()
        for at, n in enumerate(numbers):
            (images / f"{n}.png").rename(images / split / f"{at}.png")
    rows = [f"{n}.png,{LABELS[n % 3]},{n},h1,train" for n in range(12)]
    meta, _ = prepared_from(images, tmp_path, *rows, *(f"{n}.png,normal,{n},h2,test" for n in range(3)))
    assert meta.attrition[2]["images"] == 15


def test_a_number_that_is_not_whole_is_refused_without_showing_it(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: the patient is a number with decimals or an exponent") as caught:
        prepared_from(images, tmp_path, "0.png,normal,7,h1,train", "1.png,normal,7.25,h1,train")
    assert "7.25" not in str(caught.value)


def test_a_manifest_of_other_files_beside_lists(images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(12))

    def prepare(*files: str) -> dict:
        beside = manifest(tmp_path, *(f"{file},normal,g" for file in files), head="path,label,group")
        return prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32, manifest=beside)

    with pytest.raises(DataError, match="none of the 12 files of the lists is among the 1 of"):
        prepare("30.png")
    assert (
        "10 of 12 files of the lists are not in the manifest: no view and no group"
        in prepare("0.png", "1.png").warnings
    )


def test_classes_are_those_that_are_named(images: Path, tmp_path: Path) -> None:
    rows = "".join(f"{n}.png,{'Mass' if n // 2 % 2 else 'no nodule'},p{n // 2},train\n" for n in range(24))
    (tmp_path / "m.csv").write_text("path,label,patient,split\n" + rows)
    words = ("covidnet", tmp_path / "out", images, None, None, None)
    meta = prepare_images(*words, size=32, manifest=tmp_path / "m.csv", classes=("no nodule", "mass"))
    assert meta.classes == ["no nodule", "mass"]
    assert {name: sum(of[name] for of in meta.counts.values()) for name in meta.classes} == {
        "no nodule": 12,
        "mass": 12,
    }
    samples = load_images(tmp_path / "out", "train", task="covidnet")
    assert samples.spec["classes"] == ["no nodule", "mass"] and set(samples.y) == {0, 1}
    table = pl.read_parquet(tmp_path / "out" / "index.parquet")
    assert (table["label"] == (table["class"] == "mass")).all()
    (tmp_path / "b.txt").write_text("".join(f"p{n} {n}.png {('negative', 'positive')[n % 2]}\n" for n in range(24)))
    lists = (tmp_path / "b.txt", None, None)
    binary = prepare_images("covidnet", tmp_path / "b", images, *lists, size=32, classes=("negative", "positive"))
    assert binary.classes == ["negative", "positive"] and binary.published is None
    with pytest.raises(DataError, match="does not fit images of another kind"):
        load_images(tmp_path / "b", "train", spec=samples.spec, task="covidnet")


@pytest.mark.parametrize("classes", [("one",), ("a", "A"), ("a", "b/c")])
def test_classes_that_cannot_be_used_are_refused(classes: tuple[str, ...], images: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.txt", range(8))
    with pytest.raises(UsageError, match="--classes"):
        prepare_images("covidnet", tmp_path / "out", images, train, None, None, size=32, classes=classes)


def test_a_misspelt_class_is_no_class_of_its_own(images: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,label\n0.png,mass\n1.png,mas\n")
    with pytest.raises(DataError, match="line 3: class 'mas'"):
        prepare_images(
            "covidnet", tmp_path / "out", images, None, None, None, manifest=tmp_path / "m.csv", classes=("no", "mass")
        )
