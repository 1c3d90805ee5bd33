"""What figures and reports say of their runs, and what is said of files that say nothing."""

import io
import struct
import zipfile
import zlib

import pytest
from PIL import Image

from raylab.errors import DataError
from tests.unit.tracking.test_report import frame, row
from tracking import plots
from tracking.provenance import Provenance, read_provenance, render, save_png
from tracking.report import Extras, shrink, write_report

PARENT = Provenance(name="first", weights_sha256="ab" * 32)
RUN = Provenance(name="Zweiter 'Lauf' <&> é", recipe={"seed": 3}, cpus=("A, AVX2",), parent=PARENT)


def figure():
    return plots.learning({"a": ([1, 2], [0.5, 0.4])}, "val/loss", "a")


def test_a_figure_keeps_its_provenance(tmp_path):
    path = tmp_path / "figure.png"
    save_png(figure(), path, [RUN, PARENT], dpi=40)
    assert read_provenance(path) == (RUN, PARENT)


def test_a_figure_that_another_program_wrote_again_is_refused(tmp_path):
    save_png(figure(), tmp_path / "figure.png", [RUN], dpi=40)
    Image.open(tmp_path / "figure.png").convert("RGB").save(tmp_path / "again.png")
    with pytest.raises(DataError, match="does not say from which runs"):
        read_provenance(tmp_path / "again.png")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", b"\x89PNG and more", bytes(range(256))])
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_provenance(path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_figure_that_would_fill_the_memory_is_refused(tmp_path):
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IEND", b""))
    with pytest.raises(DataError, match="could not be read as PNG"):
        read_provenance(tmp_path / "huge.png")


def test_a_declaration_that_no_browser_accepts_is_no_report(tmp_path):
    (tmp_path / "page.html").write_bytes(b"<![\x00odd[")
    with pytest.raises(DataError, match="does not say from which runs"):
        read_provenance(tmp_path / "page.html")


def test_a_research_object_with_damaged_bytes_is_refused(tmp_path):
    path = tmp_path / "x.crate.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("provenance.json", render([RUN, PARENT]))
    content = bytearray(path.read_bytes())
    content[60:90] = bytes(30)
    path.write_bytes(content)
    with pytest.raises(DataError, match="could not be read as a zip archive"):
        read_provenance(path)


@pytest.mark.parametrize("text", ["", "{}", '[{"run_id": 1}]', '[{"name": "a", "recipe": 3}]'])
def test_damaged_provenance_is_refused(text, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(f"<meta name=raylab content='{text}'>")
    with pytest.raises(DataError, match="is damaged"):
        read_provenance(path)


def test_a_report_has_the_provenance_of_its_runs_and_of_their_parents(tmp_path):
    hashes = {"tag/lock_hash": "l", "tag/weights_sha256": "w", "tag/ledger_sha256": "h", "tag/cpus": "A, AVX2; B, AVX2"}
    one = row("one", data_hash="d", split_hash="s", code_revision="c", **hashes)
    two = row("two", **{"tag/parent": one["run_id"], "tag/parent_name": "one"})
    three = row("three", **{"tag/parent": "gone", "tag/parent_name": "zero"})
    extras = {one["run_id"]: Extras(recipe='{"seed": 7}')}
    write_report(tmp_path / "r.html", frame(one, two, three), {}, extras, "A <title>")
    found = {origin.name: origin for origin in read_provenance(tmp_path / "r.html")}
    first = found["one"]
    assert (first.recipe, first.data_hash, first.split_hash, first.code_revision) == ({"seed": 7}, "d", "s", "c")
    assert (first.lock_hash, first.weights_sha256, first.ledger_sha256) == ("l", "w", "h")
    assert (first.run_id, first.kind, first.task, first.synthetic) == (one["run_id"], "train", "ards", False)
    assert first.cpus == ("A, AVX2", "B, AVX2")
    assert found["two"].parent == first
    assert found["three"].parent == Provenance(name="zero", run_id="gone")


def test_the_smaller_copy_of_a_figure_keeps_its_provenance(tmp_path):
    png = io.BytesIO()
    save_png(figure(), png, [RUN], dpi=200)
    small = tmp_path / "small.png"
    small.write_bytes(shrink(png.getvalue()))
    assert small.stat().st_size < len(png.getvalue())
    assert read_provenance(small) == (RUN.model_copy(update={"recipe": None}),)


def test_names_do_not_leave_the_meta_element(tmp_path):
    path = tmp_path / "page.html"
    write_report(path, frame(row('x"><script>alert(1)</script>')), {}, {}, "t")
    assert "<script>" not in path.read_text()
    assert read_provenance(path)[0].name == 'x"><script>alert(1)</script>'


def test_the_text_of_a_figure_is_ascii():
    render([RUN]).encode("ascii")
    save_png(figure(), io.BytesIO(), [RUN], dpi=40)
