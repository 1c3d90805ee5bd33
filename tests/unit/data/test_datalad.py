"""DataLad datasets by git alone: repositories made here by git, with git-annex's links and pointers written by hand."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from raylab.data import datalad, prepared
from raylab.errors import DataError

ID = "4f1d5c1e-8c7a-4f8e-9d53-1f2a3b4c5d6e"
KEY = "SHA256E-s5--2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824.parquet"


def git(root: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run(
        ["git", "-C", str(root), *identity, *words], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A dataset with the annexed, absent file `raw/a.parquet` and the plain file `raw/note.txt`."""
    root = tmp_path / "data set"
    (root / ".datalad").mkdir(parents=True)
    (root / ".datalad" / "config").write_text(f'[datalad "dataset"]\n\tid = {ID}\n')
    (root / "raw").mkdir()
    link = root / "raw" / "a.parquet"
    link.symlink_to(f"../.git/annex/objects/xx/yy/{KEY}/{KEY}")
    (root / "raw" / "note.txt").write_text("text\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    return root


def deliver(root: Path) -> None:
    """What `datalad get` does."""
    content = root / ".git" / "annex" / "objects" / "xx" / "yy" / KEY / KEY
    content.parent.mkdir(parents=True)
    content.write_text("hello")


def test_the_state_of_a_dataset(dataset):
    state = datalad.read_state(dataset / "raw")
    assert (state.id, state.commit, state.path) == (ID, git(dataset, "rev-parse", "HEAD").strip(), "raw")
    assert (state.is_dirty, state.annexed) == (False, 1)
    assert datalad.read_keys(dataset / "raw") == {"raw/a.parquet": KEY}
    (dataset / "elsewhere.txt").write_text("not below raw")
    assert not datalad.read_state(dataset / "raw").is_dirty
    (dataset / "raw" / "note.txt").write_text("changed")
    assert datalad.read_state(dataset / "raw").is_dirty


def test_an_unlocked_file_is_a_pointer(dataset):
    pointer = dataset / "raw" / "b.parquet"
    pointer.write_text(f"/annex/objects/{KEY}\n")
    git(dataset, "add", "-A")
    git(dataset, "commit", "-qm", "unlocked")
    assert datalad.read_keys(dataset)["raw/b.parquet"] == KEY and datalad.is_absent(pointer)
    pointer.write_text("hello")
    assert not datalad.is_absent(pointer)


def test_keys_change_the_hash_of_a_state(dataset):
    before = datalad.read_state(dataset / "raw")
    link = dataset / "raw" / "a.parquet"
    link.unlink()
    link.symlink_to(f"../.git/annex/objects/xx/yy/{KEY}/MD5-s5--0")
    git(dataset, "commit", "-qam", "another")
    after = datalad.read_state(dataset / "raw")
    assert (after.annexed, after.is_dirty) == (1, False)
    assert after.keys_sha256 != before.keys_sha256 and after.commit != before.commit


def test_a_dataset_without_a_commit(tmp_path):
    (tmp_path / ".datalad").mkdir()
    (tmp_path / ".datalad" / "config").write_text(f'[datalad "dataset"]\n\tid = {ID}\n')
    git(tmp_path, "init", "-q")
    state = datalad.read_state(tmp_path)
    assert (state.commit, state.is_dirty, state.annexed) == ("", True, 0)


def test_a_plain_repository_and_a_plain_directory_are_no_datasets(tmp_path):
    assert datalad.read_state(tmp_path) is None and datalad.read_keys(tmp_path) == {}
    git(tmp_path, "init", "-q")
    assert datalad.find_root(tmp_path / "not" / "yet") is None
    datalad.check_content(tmp_path)


def test_absent_content_is_refused_with_the_command_that_fetches_it(dataset):
    with pytest.raises(DataError) as error:
        datalad.check_content(dataset / "raw")
    assert error.value.do == f"datalad get '{dataset}/raw'" and "a.parquet" in error.value.why
    deliver(dataset)
    datalad.check_content(dataset / "raw")


def test_git_that_fails_is_named(dataset):
    (dataset / ".datalad" / "config").write_text("[datalad")
    with pytest.raises(DataError, match="git config failed in the DataLad dataset"):
        datalad.read_state(dataset)


def annexed(source: Path, root: Path) -> Path:
    """A copy of the prepared directory `source` in the dataset `root`, with its tables in an annex without content."""
    copy = Path(shutil.copytree(source, root / "prepared"))
    for path in copy.glob("*.parquet"):
        path.unlink()
        path.symlink_to(f"../.git/annex/objects/xx/yy/{KEY}/{KEY}")
    git(root, "add", "-Af")
    git(root, "commit", "-qm", "prepared")
    return copy


def test_a_prepared_directory_without_its_content_is_refused(dataset, ards_data):
    copy = annexed(ards_data, dataset)
    with pytest.raises(DataError) as error:
        prepared.read_meta(copy, "ards")
    assert error.value.do == f"datalad get '{copy}'" and "2 annexed files" in error.value.what


def test_publish_records_the_raw_data_and_lets_the_dataset_have_the_result(dataset, tmp_path):
    deliver(dataset)

    def write(work: Path) -> prepared.Meta:
        (work / "table.txt").write_text("x")
        facts = {"task": "t", "source": "s", "synthetic": True, "seed": 0, "split_hash": ""}
        return prepared.Meta(**facts, counts={}, attrition=[])

    out = dataset / "out"
    meta = prepared.publish(out, write, "t", inputs=[dataset / "raw", tmp_path])
    assert [state.path for state in meta.inputs] == ["raw"] and not meta.inputs[0].is_dirty
    read = prepared.read_meta(out, "t")
    assert (read.inputs, read.data_hash) == (meta.inputs, meta.data_hash)
    assert (out / ".rayignore").is_file() and "out/" in git(dataset, "status", "--porcelain")
    elsewhere = prepared.publish(tmp_path / "out", write, "t", inputs=[tmp_path])
    assert "inputs" not in json.loads((tmp_path / "out" / "meta.json").read_text())
    assert elsewhere.data_hash == meta.data_hash and (tmp_path / "out" / ".gitignore").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ("datalad", "git-annex", "raylab"))), reason="needs datalad on PATH")
def test_datalad_rerun_and_raylab_rerun_end_with_the_same_weights():
    script = Path(__file__).parents[3] / "scripts" / "datalad_demo.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("all the same")
