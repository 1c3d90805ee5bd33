"""Data and results that users write into a clone: git does not see them, and Ray uploads none with a job."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from raylab.data import prepared
from raylab.files import keep_out_of_git_and_uploads
from tests.conftest import ROOT

CHOSEN = ("own.parquet", "patients.csv", "labs.csv.gz", "x.npz", "x.npy", "chest.dcm", "film.png", "film.jpg", "a.jpeg",
          "scan.tiff", "scan.nii.gz", "table.xlsx", "spss.sav", "store.h5", "notes.json", "page.html", "weights.pt",
          "looked-at.ipynb", "all.zip", "raw.tar.gz", "kept.db", "model.safetensors", "first.raylab")  # fmt: skip
NAMELESS = ("IM000001", "data.xyz", "list.txt")  # kinds that a git rule cannot know


def git(clone: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.excludesFile=/dev/null")
    return subprocess.run(["git", *identity, *words], cwd=clone, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the tracked files of this one."""
    here = tmp_path / "clone"
    here.mkdir()
    if not (ROOT / ".git").exists():
        pytest.skip("the tracked files are known in a git checkout only")
    for name in git(ROOT, "ls-files", "-z").split("\0")[:-1]:
        if (ROOT / name).is_file():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, here / name)
    git(here, "init", "-q")
    git(here, "add", "-A")
    git(here, "commit", "-qm", "all")
    return here


def packed(clone: Path, include_gitignore: bool) -> set[str]:
    """The files that Ray's own code packs of a working directory, with its usual excludes."""
    from ray._private.runtime_env.packaging import create_package

    package = clone.with_name(f"package-{include_gitignore}.zip")
    create_package(str(clone), package, include_gitignore=include_gitignore, excludes=[".git", ".venv"])
    return {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}


def publish(out: Path) -> None:
    def write(work: Path) -> prepared.Meta:
        pl.DataFrame({"split": ["train"], "subject_id": ["1"]}).write_parquet(work / "samples.parquet")
        (work / "IM000001").write_text("a file without a kind")
        facts = {"task": "new", "source": "drawn", "synthetic": True, "seed": 0, "split_hash": ""}
        return prepared.Meta.model_validate({**facts, "counts": {}, "attrition": []})

    prepared.publish(out, write, "new")


def test_what_the_examples_write_is_ignored(clone):
    text = "".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    written = {name for name in re.findall(r"--(?:out|json) ([a-z][\w./-]*)", text) if not name.endswith("/.")}
    assert {"prepared/ards", "probabilities.parquet", "scores.json", "sweeps/living", "report.html"} <= written
    for name in written:
        assert git(clone, "check-ignore", name, f"{name}/inside" if "." not in name else name), name


def test_git_sees_no_data_and_ray_uploads_none(clone):
    tracked = set(git(clone, "ls-files", "-z").split("\0"))
    for folder in (".", "mine", "raylab/data", "jobs"):
        (clone / folder).mkdir(exist_ok=True)
        for name in CHOSEN:
            (clone / folder / name).write_text("patient")
    for folder in ("prepared/ards", "our-cohort", "raylab/here"):
        publish(clone / folder)
    (clone / "home").mkdir()
    keep_out_of_git_and_uploads(clone / "home")
    (clone / "home" / "runs.txt").write_text("patient")
    assert git(clone, "status", "--porcelain", "--untracked-files=all") == ""

    for folder in (".", "mine"):
        for name in NAMELESS:
            (clone / folder / name).write_text("patient")
    (clone / "own_task.py").write_text("")  # code is uploaded
    for include_gitignore in (True, False):  # the latter: RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1
        names = packed(clone, include_gitignore)
        assert names <= tracked | {"own_task.py"} and "own_task.py" in names
        assert {
            "jobs/train.py",
            "raylab/data/icu/concepts.toml",
            "cluster/sites.toml",
            "tracking/report.html.j2",
        } <= names
        assert {Path(name).suffix for name in names} <= {".py", ".toml", ".j2", ".sh"}


def test_the_packed_code_runs(clone, tmp_path):
    """Nothing that the library reads beside its modules is left out."""
    packed(clone, True)
    with zipfile.ZipFile(clone.with_name("package-True.zip")) as package:
        package.extractall(tmp_path / "job")
    code = (
        "from raylab.data.icu.concepts import CONCEPTS; from raylab.data.icu.sources import meds;"
        "from cluster import sites;"
        "assert meds.SHIPPED.is_file() and sites.SHIPPED.is_file(); import raylab; print(raylab.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "job", capture_output=True, text=True)
    assert done.returncode == 0 and str(tmp_path / "job") in done.stdout, done.stderr
