from pathlib import Path

import pytest

from raylab.data.images import published
from raylab.data.images.covidx import Line
from raylab.data.images.manifest import discover, enriched, read_manifest
from raylab.errors import DataError

HEAD = "path,label,source,domain,split,patient,group,view\n"


def written(tmp_path: Path, rows: str, head: str = HEAD) -> tuple[Path, Path]:
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    (tmp_path / "manifest.csv").write_text(head + rows)
    return tmp_path / "manifest.csv", images


def test_rows_by_split_and_domain(tmp_path: Path) -> None:
    rows = "images/s/a.jpg,covid,s,A,test,p1,g1,PA\nimages/s/b.jpg,Normal,s,B,train,p2,,\n"
    both = read_manifest(*written(tmp_path, rows))
    assert both == {
        "test": [Line("p1", "s/a.jpg", "COVID-19", "s", 2, "PA", "g1")],
        "train": [Line("p2", "s/b.jpg", "normal", "s", 3)],
    }
    assert set(read_manifest(*written(tmp_path, rows), domain="B")) == {"train"}
    with pytest.raises(DataError, match=r"no rows of domain 'C'[\s\S]*A, B"):
        read_manifest(*written(tmp_path, rows), domain="C")


def test_the_least_that_a_manifest_says(tmp_path: Path) -> None:
    """Without a split column it is an external set; without patients every image is its own."""
    rows = read_manifest(*written(tmp_path, "a.png,pneumonia\n", "file,class\n"))
    assert rows == {"test": [Line("a.png", "a.png", "pneumonia", "unknown", 2)]}


@pytest.mark.parametrize(
    ("rows", "head", "what"),
    [
        ("a.png\n", "file\n", "no column label or class"),
        ("a.png,sick\n", "file,class\n", "line 2: class 'sick'"),
        ("a.png,normal,holdout\n", "file,class,split\n", "line 2: split 'holdout'"),
        ("../a.png,normal\n", "file,class\n", "is outside of the images folder"),
        (",normal\n", "file,class\n", "line 2: no file name"),
        ("", "", "cannot read the manifest"),
        ('"a.png,normal\n', "file,class\n", "manifest"),
        ('a.png,"', "file,class\n", "cannot read the manifest"),
    ],
)
def test_refused(tmp_path: Path, rows: str, head: str, what: str) -> None:
    with pytest.raises(DataError, match=r"manifest\.csv") as caught:
        read_manifest(*written(tmp_path, rows, head))
    assert what in str(caught.value)


def test_lists_get_views_and_keep_their_classes() -> None:
    lists = {"test": [Line("p1", "a.png", "normal", "x", 1), Line("p2", "b.png", "pneumonia", "x", 2)]}
    manifest = {"train": [Line("q", "a.png", "COVID-19", "y", 2, "LL", "g")]}
    rows, differ = enriched(lists, manifest)
    assert rows["test"] == [Line("p1", "a.png", "normal", "x", 1, "LL", "g"), lists["test"][1]]
    assert differ == 1


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        discover(tmp_path / "none")
    with pytest.raises(DataError, match=r"no label list and no manifest\.csv[\s\S]*columns path, label and split"):
        discover(tmp_path)
    (tmp_path / "test_COVIDx9A.txt").touch()
    assert discover(tmp_path).lists == {"test": tmp_path / "test_COVIDx9A.txt"}
    assert discover(tmp_path).images == tmp_path
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "manifest.csv").touch()
    for name in ("train_A", "train_B"):
        (tmp_path / "labels" / f"{name}.txt").touch()
    with pytest.raises(DataError, match="2 train lists"):
        discover(tmp_path)
    found = discover(tmp_path, "B")
    assert found.lists == {"train": tmp_path / "labels" / "train_B.txt"}
    assert found.images == tmp_path / "images" and found.manifest == tmp_path / "manifest.csv"
    assert set(discover(tmp_path, splits=("test",)).lists) == {"test"}


def test_counts_are_held_against_the_lecture() -> None:
    ehl = published.TABLES["E*HealthLine"]
    assert published.differences("E*HealthLine", ehl) == []
    fewer = {**ehl, "test": {"normal": 1700, "pneumonia": 97}}
    assert published.differences("E*HealthLine", fewer) == ["test: 0 COVID-19, the lecture counts 101"]
    covidx = {"train": {"normal": 8000, "pneumonia": 5538, "COVID-19": 358}, "test": {"normal": 66}}
    assert published.differences("COVIDx", covidx) == []
    assert published.table_of(["train_COVIDx_v2.txt", "test_COVIDx_v2.txt"]) == "COVIDx"
    assert published.table_of(["train_EHL.txt"]) == "E*HealthLine" and published.table_of(["train_A.txt"]) is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_other_writers_of_manifests(tmp_path: Path, encoding: str, mark: str, end: str) -> None:
    rows = [
        ["Path", "Label", "Patient", "Source"],
        ["a.png", "Normal", "7.0", "M\u00fcnchen"],
        ["b.png", "covid", "nan", ""],
    ]
    (tmp_path / "images").mkdir()
    (tmp_path / "m.csv").write_bytes("".join(mark.join(row) + end for row in rows).encode(encoding))
    assert read_manifest(tmp_path / "m.csv", tmp_path / "images")["test"] == [
        Line("7", "a.png", "normal", "M\u00fcnchen", 2),
        Line("b.png", "b.png", "COVID-19", "unknown", 3),
    ]


def test_a_list_without_sources_takes_those_of_the_manifest() -> None:
    lists = {"test": [Line("7", "a.png", "normal", "unknown", 1)]}
    rows, _ = enriched(lists, {"train": [Line("7", "a.png", "normal", "h1", 2)]})
    assert rows["test"][0].source == "h1"
