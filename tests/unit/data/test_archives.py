"""Archives that unpack to any size, or that have other things in them than files: bounded, and refused clearly."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from raylab.data.archives import read_tar, unpack
from raylab.data.icu.sources.physionet2012 import members
from raylab.errors import DataError, RaylabError, escape_unprintable

LINK, HARD, DIRECTORY, PIPE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE


def write_tar(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return path


def test_plain_files_are_read_and_others_with_another_ending_are_left_out(tmp_path: Path) -> None:
    plain = [("set-a/1.txt", tarfile.REGTYPE, b"one"), ("set-a/2.txt", tarfile.REGTYPE, b"two")]
    others = [("set-a", DIRECTORY, b""), ("set-a/link", LINK, b""), ("set-a/._1.txt", tarfile.REGTYPE, b"x")]
    path = write_tar(tmp_path / "set-a.tar.gz", *others, *plain)
    assert list(members(path)) == [("1.txt", b"one"), ("2.txt", b"two")]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("1.txt", LINK, "it is a link"),
        ("1.txt", HARD, "it is a link"),
        ("1.txt", PIPE, "it is not a file"),
        ("1\n2.txt", tarfile.REGTYPE, "control characters"),
        ("1\x1b[2J.txt", tarfile.REGTYPE, "control characters"),
        ("\u202etxt.1.txt", tarfile.REGTYPE, "control characters"),
        ("1" * 300 + ".txt", tarfile.REGTYPE, "more than 255 bytes"),
    ],
)
def test_an_odd_member_is_refused_by_name(name: str, kind: bytes, said: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set-a.tar.gz", (name, kind, b""))
    with pytest.raises(DataError) as caught:
        list(members(path))
    text = str(caught.value)
    assert said in text and str(path) in text and len(text) < 500
    assert text.replace("\n  why:  ", "").replace("\n  next: ", "").isprintable()


def test_a_sparse_member_is_refused_before_it_is_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("1.txt")
    header.size, header.pax_headers = 0, {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
    with tarfile.open(tmp_path / "set-a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(header)
    with pytest.raises(DataError, match="it is a sparse file of 1,099,511,627,776 bytes"):
        list(members(tmp_path / "set-a.tar.gz"))


def test_a_bomb_is_refused_within_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "set-a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 2_000_000
    with pytest.raises(DataError, match="more than 8 MiB, unpacked"):
        list(read_tar(path, ".txt", limit=8 << 20))
    with pytest.raises(DataError, match="more than 8 MiB"):
        unpack(path, 8 << 20)
    assert len(unpack(path, 300 << 20)) == 200 << 20


def test_errors_show_names_as_they_are_and_change_nothing_on_the_terminal() -> None:
    assert escape_unprintable("Zürich, 3 µm²\tok\n") == "Zürich, 3 µm²\tok\n"
    assert escape_unprintable("a\x1b]0;b\u202ec\udcff\r") == "a\\x1b]0;b\\u202ec\\udcff\\r"
    assert (
        str(RaylabError("no \x07file", "because\u2028of", "do")) == "no \\x07file\n  why:  because\\u2028of\n  next: do"
    )
