"""Marked patients, file names, DICOM tags and passwords, followed through every verb with a team's MLflow server.

docs/security.md says where a mark may be found. A new verb joins STEPS, or EXEMPT with a reason.
"""

import contextlib
import gzip
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pydicom
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from jobs import cli
from raylab.data.icu.concepts import by_id
from raylab.data.icu.prepare import SOURCES, Raw
from tests.team import Team

pytestmark = pytest.mark.timeout(1800)  # the whole story is the first test's setup

PATIENT = "8675309141"  # in ids of patients and stays, numbers in PhysioNet's form, and in names of files
TAG = "CANARYTAG9X"  # in what files say of themselves and nobody needs
PASSWORD = "CANARYPW5Zx4"  # of the login, of a proxy, of keys

# What each verb is asked. {x}: paths of `Story.places`. The order is that of a user's work.
STEPS: dict[str, list[str]] = {
    "prepare": [
        "ards --source physionet2012 --path {icu} --out {ards}",
        "covidnet --path {xrays} --domain a --size 32 --skip-bad --out {cxr}",
    ],
    "concepts": ["--data {ards}"],
    "train": [
        "ards --data {ards} --smoke --name icu --set loop.epochs=1",
        "covidnet --data {cxr} --smoke --name lungs --set loop.epochs=1 data.size=32",
    ],
    "resume": ["icu"],
    "transfer": ["covidnet --from lungs --data {cxr} --name lungs-b"],
    "rerun": ["icu --name icu-again"],
    "verify": ["icu --samples 1"],
    "export": ["icu --out {out}/icu.raylab", "icu --crate --out {out}/icu.crate.zip"],
    "evaluate": [
        "ards --run icu --data {ards} --split test",
        "covidnet --run lungs --data {cxr} --split test",
        "covidnet --run lungs --data {handed} --split test",
    ],
    "explain": ["ards --run icu --data {ards} --rows 24"],
    "predict": [
        "ards --run icu --data {ards} --out {predicted}/ards.parquet",
        "covidnet --run lungs --data {cxr} --split val --explain --out {predicted}/cxr.parquet",
    ],
    "tune": ["ards --data {ards} --smoke --trials 2 --name search --set loop.epochs=1"],
    "benchmark": [
        "ards --source physionet2012 --path {icu} --landmarks 6 --folds 2 --trials 1 --members 1 "
        "--models last_pf boosting --set model.trees=5 --out {benchmark}"
    ],
    "simulate": ["view --set shunt=0.25"],
    "fit": ["--source physionet2012 --path {few} --hours 12 --out {fits}"],
    "estimate": ["train ards --data {ards} --smoke --set loop.epochs=1"],
    "cost": [""],
    "compare": ["--out {out}/report.html"],
    "sync": [""],
    "runs": [""],
    "rm": ["", "icu --only logs"],
    "ui": [""],
    "notebook": ["--site local"],
    "cluster": ["up --site local --dry-run"],
    "doctor": ["--site local"],
}
EXEMPT = {
    "completion": "prints what a shell needs and reads nothing",
    "federate": "tests/unit/federation searches all that leaves a site",
    "demo": "it calls prepare, train, transfer, tune, evaluate and compare, each of which is here",
    "models": "it reads no data and no run",
    "recipe": "it reads no data and no run",
    "site": "it reads no data and no run",
    "warm": "it reads no data and no run",
}
ELSEWHERE = ("cluster", "doctor")  # they start processes on other nodes
WITH_RAY = ("tune",)  # a test of their own: Ray takes long to start, and its environment would stay in this process
PLACES = ("ards", "cxr", "predicted", "benchmark", "fits")  # where the page expects patients


@dataclass
class Story:
    """Where things lie, and what was said: `codes` of every command, by its words."""

    root: Path
    team: Path
    codes: dict[str, int] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, Path]:
        names = ("icu", "few", "xrays", "handed", "out", "home", *PLACES)
        return {name: self.root / name for name in names}

    def individuals(self) -> set[str]:
        return {path.name for path in (self.root / "home" / "runs").glob("*/individuals/**/*.png")}


def patients(folder: Path, count: int) -> None:
    """Virtual patients in PhysioNet's form, as if they were real: text files named after marked ids."""
    names = {concept: name for name, concept in by_id("physionet2012").items()}
    with tempfile.TemporaryDirectory() as scratch:
        parts = SOURCES["synthetic"](Raw(Path(), Path(scratch), count, 0)).parts()
        events = pl.concat([part.collect() if isinstance(part, pl.LazyFrame) else part for part in parts])
    (folder / "set-a").mkdir(parents=True)
    known = events.filter(pl.col("concept").is_in(list(names))).sort("stay_id", "time")
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for number, part in enumerate(known.partition_by("stay_id", maintain_order=True)):
        name = f"{PATIENT}{number:03}"
        lines = ["Time,Parameter,Value"]
        for time, concept, value in part.select("time", "concept", "value").iter_rows():
            lines.append(f"{int(time):02}:{int(time % 1 * 60):02},{names[concept]},{value:.4f}")
        (folder / "set-a" / f"{name}.txt").write_text("\n".join(lines) + "\n")
        outcomes.append(f"{name},6,1,5,-1,{number % 2}")
    (folder / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n")


def radiographs(folder: Path, prepared: Path, broken: bool) -> None:
    """Phantoms as PNG and DICOM files with marked names and tags, one of them `broken` or none, and their manifest."""
    pixels = np.load(prepared / "images.npy")
    rng = np.random.default_rng(0)
    # a pattern of its own for each, or they would be taken for copies of one another
    patterns = np.kron(rng.integers(0, 160, (len(pixels), 8, 8), dtype=np.uint8), np.ones((1, 8, 8), np.uint8))
    pixels = pixels // 4 + patterns
    (folder / "images").mkdir(parents=True)
    rows = ["path,label,source,split,patient,group,view,domain"]
    for at, label, split in pl.read_parquet(prepared / "index.parquet").select("row", "class", "split").iter_rows():
        name = f"{PATIENT}-{at}.{'dcm' if at % 2 else 'png'}"
        (dicom if at % 2 else png)(folder / "images" / name, pixels[at])
        rows.append(f"images/{name},{label},clinic,{split},{PATIENT}-p{at},{PATIENT}-g{at},PA,a")
    if broken:
        (folder / "images" / f"{PATIENT}-broken.png").write_text(f"no image of {TAG}")
        rows.append(f"images/{PATIENT}-broken.png,normal,clinic,train,{PATIENT}-x,{PATIENT}-gx,PA,a")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


def png(path: Path, pixels: np.ndarray) -> None:
    said = PngInfo()
    said.add_text("Description", TAG)
    Image.fromarray(pixels).save(path, pnginfo=said)


def dicom(path: Path, pixels: np.ndarray) -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for keyword in ("PatientName", "PatientID", "AccessionNumber", "InstitutionName", "ReferringPhysicianName"):
        setattr(data, keyword, TAG)
    data.private_block(0x000B, TAG, create=True).add_new(1, "LO", TAG)
    data.PatientBirthDate, data.StudyDescription, data.SeriesDescription = "19500101", TAG, TAG
    data.Modality, data.ViewPosition = "DX", "PA"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelData = 7, pixels.tobytes()
    data.save_as(path, enforce_file_format=True)
    assert TAG in str(pydicom.dcmread(path).PatientName)


@contextlib.contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Standard output and error, of this process and of what it starts, go to the file `path`."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            for number, before in zip((1, 2), kept, strict=True):
                os.dup2(before, number)
                os.close(before)


@pytest.fixture(scope="module")
def story(team: Team, covidnet_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Every verb has been run, with a password in the address, in a proxy's and in keys of the environment."""
    made = Story(tmp_path_factory.mktemp("story"), team.directory)
    patients(made.places["icu"], 90)
    patients(made.places["few"], 6)
    radiographs(made.places["xrays"], covidnet_data, broken=True)
    radiographs(made.places["handed"], covidnet_data, broken=False)
    for name in ("out", "predicted"):
        made.places[name].mkdir()
    team.add("marie", PASSWORD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(made.root / "home"))
        patch.setenv("XDG_CONFIG_HOME", str(made.root / "config"))
        patch.setenv("JUPYTER_DATA_DIR", str(made.root / "jupyter"))
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_EXPERIMENT_NAME"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("HTTPS_PROXY", f"http://marie:{PASSWORD}@127.0.0.1:9")
        patch.setenv("PIP_INDEX_URL", f"https://marie:{PASSWORD}@127.0.0.1:9/packages")
        patch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
        for verb, asked in STEPS.items():
            for words in asked if verb not in WITH_RAY else ():
                # a shell in which the address with the password was exported; other nodes need a name that they know
                uri = "http://mlflow.invalid:5000" if verb in ELSEWHERE else team.uri
                with pytest.MonkeyPatch.context() as other:
                    other.setenv("MLFLOW_TRACKING_URI", uri.replace("//", f"//marie:{PASSWORD}@"))
                    if verb in ELSEWHERE:
                        other.setenv("PATH", "/nowhere")  # whatever Slurm this machine has
                    run(made, verb, words)
                patch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)  # which benchmark sets
        patch.setenv("MLFLOW_TRACKING_URI", team.uri.replace("//", f"//marie:{PASSWORD}@"))
        for verb, words in (
            ("explain", f"ards --run icu --data {{ards}} --stay {PATIENT}-none"),
            ("predict", "ards --run icu --data {xrays} --out {out}/none.parquet"),
            ("evaluate", "covidnet --run lungs --data {icu}"),
        ):
            run(made, verb, words)
            assert made.codes.pop(f"{verb} {words}") == 2
        words = "covidnet --path {xrays} --domain a --size 32 --out {out}/none"  # a file to correct: it is named
        run(made, "prepare", words, "errors.txt")
        assert made.codes.pop(f"prepare {words}") == 2
        yield made


def run(made: Story, verb: str, words: str, said: str = "said.txt") -> None:
    told = [verb, *words.format(**made.places).split(), "--json", str(made.root / "out" / f"{len(made.codes)}.json")]
    with written_to(made.root / "out" / said):
        if verb in WITH_RAY:
            code = subprocess.run([sys.executable, "-m", "jobs.cli", *told], stdin=subprocess.DEVNULL).returncode
        else:
            try:
                code = cli.main(told)
            except SystemExit as end:
                code = int(end.code or 0)
    made.codes[f"{verb} {words}"] = code


def contents(path: Path) -> Iterator[bytes]:
    """What a file holds: its name, its bytes, and what is packed in it."""
    yield str(path).encode()
    raw = path.read_bytes()
    yield raw
    if path.suffix == ".parquet":
        yield pl.read_parquet(path).select(pl.all().cast(pl.String, strict=False)).write_csv().encode()
    elif raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            for name in packed.namelist():
                yield name.encode() + packed.read(name)


def found(root: Path) -> dict[str, set[Path]]:
    """mark -> files that have it, of all below `root`."""
    files = {path: b"\n".join(contents(path)) for path in root.rglob("*") if path.is_file()}
    return {mark: {path for path, text in files.items() if mark.encode() in text} for mark in (PATIENT, TAG, PASSWORD)}


def look(story: Story) -> None:
    """Fail where a mark is in a place that the page does not name."""
    home, out = story.root / "home", story.places["out"]
    for root in (home, out, story.team, *(story.places[name] for name in PLACES)):
        assert any(root.rglob("*"))
        files = found(root)
        assert not files[TAG] and not files[PASSWORD], root
        if root in (home, out, story.team):
            strays = {path for path in files[PATIENT] if home / "prepared" not in path.parents}
            assert strays <= {out / "errors.txt"}, "errors about raw data name the file, and nothing else does"


def test_every_verb_is_here_or_exempt() -> None:
    assert set(STEPS) | set(EXEMPT) == set(cli.VERBS) and not set(STEPS) & set(EXEMPT)


def test_every_verb_was_run(story: Story) -> None:
    said = (story.root / "out" / "said.txt").read_text()
    failed = {words: code for words, code in story.codes.items() if code and not words.startswith("doctor")}
    assert not failed, said[-4000:]
    assert "Traceback" not in said


def test_the_search_finds_patients_where_they_belong(story: Story) -> None:
    for name in PLACES:
        assert found(story.places[name])[PATIENT], name
    assert found(story.root / "home" / "prepared")[PATIENT]
    assert found(story.places["xrays"])[TAG]


def test_marks_are_only_where_the_page_says(story: Story) -> None:
    look(story)


def test_a_search_leaves_none_either(story: Story, team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.uri.replace("//", f"//marie:{PASSWORD}@"))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for verb in WITH_RAY:
        for words in STEPS[verb]:
            run(story, verb, words)
            assert story.codes[f"{verb} {words}"] == 0, (story.places["out"] / "said.txt").read_text()[-3000:]
    look(story)


def test_pictures_of_single_patients_stay_with_their_owner(story: Story) -> None:
    assert "explain-one.png" in story.individuals() and any(n.startswith("gradcam-") for n in story.individuals())
    for folder in (story.root / "home" / "runs").glob("*/individuals"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*.png"))
    logged = {path.name for path in (story.team / "artifacts").rglob("*.png")}
    assert "explain-average.png" in logged and "val-confusion.png" in logged
    assert not {name for name in logged if name == "explain-one.png" or name.startswith("gradcam")}


def test_shared_on_purpose_they_go_to_mlflow(story: Story, team: Team, tmp_path: Path) -> None:
    words: list[Any] = ["predict", "covidnet", "--run", "lungs", "--data", story.places["cxr"], "--split", "val"]
    words += ["--explain", "--share-individuals", "--out", tmp_path / "p.parquet", "--quiet"]
    with team.acting("marie"):
        assert cli.main([str(word) for word in words]) == 0
    assert [path for path in (story.team / "artifacts").rglob("gradcam-*.png")]
