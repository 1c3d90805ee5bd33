"""Published directories: what may be replaced, what a failure leaves, how they name patients and hide from git."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from raylab.data import prepared
from raylab.data.lung.meta import SweepMeta
from raylab.data.prepared import Meta, PatientIds
from raylab.errors import DataError
from raylab.files import keep_out_of_git_and_uploads

META = {
    "task": "new", "source": "test", "synthetic": True, "seed": 0, "split_hash": "0" * 64,
    "counts": {"train": {"n": 1}}, "attrition": [{"step": "all", "rows": 1}],
}  # fmt: skip


def write(text: str = "one", columns: tuple[str, ...] = ("split", "subject_id"), **meta: object):
    def fill(work: Path) -> Meta:
        (work / "rows.txt").write_text(text)
        pl.DataFrame({name: ["a"] for name in columns}).write_parquet(work / "samples.parquet")
        return Meta.model_validate({**META, **meta})

    return fill


def outline(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_prepared_data_is_replaced_only_when_asked(tmp_path):
    first = prepared.publish(tmp_path / "out", write(), "new")
    before = outline(tmp_path)
    with pytest.raises(DataError, match="already holds prepared data") as refused:
        prepared.publish(tmp_path / "out", write("two"), "new")
    assert "--replace" in refused.value.do and outline(tmp_path) == before
    again = prepared.publish(tmp_path / "out", write("two"), "new", replace=True)
    assert again.data_hash != first.data_hash and prepared.read_meta(tmp_path / "out", "new") == again
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_data(tmp_path, monkeypatch):
    prepared.publish(tmp_path / "out", write(), "new")
    before = outline(tmp_path)

    def fail(work: Path) -> Meta:
        (work / "half").write_text("")
        assert outline(tmp_path / "out")  # the old is there while the new is made
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        prepared.publish(tmp_path / "out", fail, "new", replace=True)
    assert outline(tmp_path) == before

    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if target == tmp_path / "out" and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared.publish(tmp_path / "out", write("two"), "new", replace=True)
    assert outline(tmp_path) == before


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    def slow(work: Path) -> Meta:
        prepared.publish(tmp_path / "out", write("quick"), "new")
        return write()(work)

    with pytest.raises(DataError, match="already"):
        prepared.publish(tmp_path / "out", slow, "new")
    assert (tmp_path / "out" / "rows.txt").read_text() == "quick"


def mine(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def foreign_meta(out: Path) -> None:
    (out / "meta.json").write_text(json.dumps({"task": "new", "format": 2}))


def link(out: Path) -> None:
    (out / "link").symlink_to(out.parent)


@pytest.mark.parametrize(("change", "says"), [
    (mine, "do not belong to its prepared data: notes.txt"),
    (link, "do not belong to its prepared data: link"),
    (foreign_meta, "is not prepared data"),
    (lambda out: (out / "meta.json").write_text("{"), "is not prepared data"),
    (lambda out: (out / "meta.json").unlink(), "is not prepared data"),
])  # fmt: skip
def test_what_is_not_raylabs_is_never_removed(tmp_path, change, says):
    prepared.publish(tmp_path / "out", write(), "new")
    change(tmp_path / "out")
    before = outline(tmp_path)
    with pytest.raises(DataError, match=says):
        prepared.publish(tmp_path / "out", write(), "new", replace=True)
    assert outline(tmp_path) == before


def test_data_of_another_task_is_not_replaced_and_other_versions_are(tmp_path):
    prepared.publish(tmp_path / "out", write(), "new")
    with pytest.raises(DataError, match="prepared for 'new', not for 'newer'"):
        prepared.publish(tmp_path / "out", write(), "newer", replace=True)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    prepared.publish(tmp_path / "out", write("two"), "new", replace=True)
    assert prepared.read_meta(tmp_path / "out", "new").format == prepared.FORMAT


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for text, replace in (("one", False), ("two", True)):
        prepared.publish(tmp_path / "out", write(text), "new", replace=replace)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "rows.txt").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} == {"out", "disk"}


def test_no_error_suggests_to_prepare_over_a_directory_that_holds_something(tmp_path, ards_data):
    with pytest.raises(DataError) as refused:
        prepared.read_meta(ards_data, "covidnet")
    assert refused.value.do == "raylab prepare covidnet ... --out OTHER_DIR"
    shutil.copytree(ards_data, tmp_path / "ards")
    (tmp_path / "ards" / "samples.parquet").write_bytes(b"")
    for task in ("ards", "surrogate", "new"):
        with pytest.raises(DataError) as refused:
            prepared.read_meta(tmp_path / "ards", task)
        assert refused.value.do.endswith("OTHER_DIR")
    with pytest.raises(DataError) as refused:
        prepared.read_meta(tmp_path / "none", "surrogate", SweepMeta)
    assert refused.value.do == f"raylab simulate living --out {tmp_path / 'none'}"


def test_patients_are_found_by_their_column_or_their_absence_is_said(tmp_path):
    named = prepared.publish(tmp_path / "a", write(), "new").patient_ids
    assert named == PatientIds(table="samples.parquet", column="subject_id")
    own = PatientIds(table="rows.parquet", column="who")
    assert prepared.publish(tmp_path / "b", write(patient_ids=own), "new").patient_ids == own
    for k, columns in enumerate([("split", "who"), ("subject_id",)]):
        none = prepared.publish(tmp_path / f"c{k}", write(columns=columns), "new").patient_ids
        assert "no table there has the columns split and subject_id" in none.none


def test_ignore_files_are_no_part_of_the_data_and_nobodys_own_are_overwritten(tmp_path):
    meta = prepared.publish(tmp_path / "out", write(), "new")
    assert not {".gitignore", ".rayignore"} & meta.files.keys()
    for name in (".gitignore", ".rayignore"):
        assert (tmp_path / "out" / name).read_text().endswith("\n*\n")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ".gitignore").write_text("x\n")
    keep_out_of_git_and_uploads(tmp_path / "own")
    assert (tmp_path / "own" / ".gitignore").read_text() == "x\n"
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    keep_out_of_git_and_uploads(tmp_path / "repository")
    assert not (tmp_path / "repository" / ".gitignore").exists()


def changed(directory: Path, **changes: object) -> Path:
    """The directory with other entries in its meta.json; None leaves one out."""
    path = directory / "meta.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    return directory


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split_hash": None}, "split_hash: Field required"),
        ({"counts": {"train": {"n": "many"}}}, "counts.train.n: Input should be a valid integer"),
        ({"files": ["rows.txt"]}, "files: Input should be a valid dictionary"),
        ({"data_hash": None}, "data_hash: Field required"),
    ],
)
def test_a_damaged_meta_file_names_itself_and_the_field(changes, said, tmp_path):
    prepared.publish(tmp_path / "out", write(), "new")
    with pytest.raises(DataError) as refused:
        prepared.read_meta(changed(tmp_path / "out", **changes), "new")
    assert str(tmp_path / "out" / "meta.json") in refused.value.what and said in refused.value.why


def test_directories_of_earlier_and_later_versions_are_read(tmp_path):
    meta = prepared.publish(tmp_path / "out", write(numbering=["new"], warnings=["careful"]), "new")
    changed(tmp_path / "out", numbering=None, warnings=None, patient_ids=None, later={"field": 1})
    read = prepared.read_meta(tmp_path / "out", "new")
    assert (read.numbering, read.warnings, read.patient_ids, read.data_hash) == ([], [], None, meta.data_hash)
    assert read.to_json()["later"] == {"field": 1}


def test_what_could_not_be_read_again_is_not_published(tmp_path):
    def fill(work: Path) -> Meta:
        return write()(work).model_copy(update={"counts": None})

    with pytest.raises(ValidationError, match="counts"):
        prepared.publish(tmp_path / "out", fill, "new")
    assert list(tmp_path.iterdir()) == []
