import os
from pathlib import Path

import pytest

from raylab.data.images.covidx import Line, read_list
from raylab.errors import DataError

REAL = Path(os.environ.get("RAYLAB_DATA", Path(__file__).parents[5] / "shared" / "data")) / "cxr"


def parse(tmp_path: Path, text: str) -> list[Line]:
    path = tmp_path / "train.txt"
    path.write_text(text)
    return read_list(path, tmp_path)


@pytest.mark.parametrize(
    ("row", "want"),
    [
        # COVIDx v1, v2: no source column
        ("8 SARS-Fig5-day9.jpeg pneumonia", ("8", "SARS-Fig5-day9.jpeg", "pneumonia", "unknown")),
        ("b7 b7.png normal", ("b7", "b7.png", "normal", "unknown")),
        # v3 on
        ("419639-003251 MIDRC-RICORD-1C-46647-0.png COVID-19 ricord",
         ("419639-003251", "MIDRC-RICORD-1C-46647-0.png", "COVID-19", "ricord")),
        ("COVID-19(69) COVID-19(69).png COVID-19 sirm", ("COVID-19(69)", "COVID-19(69).png", "COVID-19", "sirm")),
        ("nih01280 nih/a.jpg normal nih", ("nih01280", "nih/a.jpg", "normal", "nih")),
        # ids and names with spaces
        ("COVID (3) COVID (3).png COVID-19 sirm", ("COVID (3)", "COVID (3).png", "COVID-19", "sirm")),
        ("COVID-19 (3) COVID-19 (3).png COVID-19", ("COVID-19 (3)", "COVID-19 (3).png", "COVID-19", "unknown")),
        ("SIRM 12 scan.png COVID-19 sirm", ("SIRM 12", "scan.png", "COVID-19", "sirm")),
        ("7 a scan.png COVID-19 sirm", ("7", "a scan.png", "COVID-19", "sirm")),  # this file exists
        # a source that is itself called like a class
        ("3 a.png pneumonia pneumonia", ("3", "a.png", "pneumonia", "pneumonia")),
    ],
)  # fmt: skip
def test_line_forms(tmp_path: Path, row: str, want: tuple[str, str, str, str]) -> None:
    (tmp_path / "a scan.png").touch()
    assert parse(tmp_path, f"\ufeff{row}\r\n\r\n") == [Line(*want, number=1)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1 a.png normal\n2 b.png tuberculosis x\n", "line 2: no class"),
        ("1 a.png positive cohen\n", "line 1: class 'positive'"),
        ("1 a.png normal\n\nb.png normal\n", "line 3: no file name"),
        ("normal\n", "line 1: no id and file name"),
        ("word\n", "line 1: 1 word"),
        ("1 ../a.png normal\n", "is outside of the images folder"),
        ("1 /a.png normal nih\n", "is outside of the images folder"),
        ("\n \n", "is empty"),
    ],
)
def test_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(DataError, match=r"train\.txt") as caught:
        parse(tmp_path, text)
    assert what in str(caught.value)


def test_list_that_is_not_text(tmp_path: Path) -> None:
    for data, what in (
        (b"\xff\xfe\x00\x80", "UTF-16"),
        (b"\x89PNG\0\0", "not text"),
        (b"p \x81 normal", "byte 0x81 in line 1"),
    ):
        (tmp_path / "list.txt").write_bytes(data)
        with pytest.raises(DataError, match=what):
            read_list(tmp_path / "list.txt", tmp_path)
    with pytest.raises(DataError, match="No such file"):
        read_list(tmp_path / "none.txt", tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real images at {REAL}")
def test_real_lists() -> None:
    lines = read_list(REAL / "labels" / "train_A.txt", REAL / "images")
    assert len(lines) == 884
    assert {line.source for line in lines} == {"nih", "hannover"}
    assert all((REAL / "images" / line.file).is_file() for line in lines)


def test_latin_1_lists(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(
        "J\u00fcrgen 1.png normal s\r\n".encode("latin-1") + "\u00fc 2.png normal s\n".encode()
    )
    assert [line.patient for line in read_list(tmp_path / "list.txt", tmp_path)] == ["J\u00fcrgen", "\u00fc"]
