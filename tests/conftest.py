"""What all tests share: small synthetic data, a home of their own, and no way to anybody's tracking server."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The same examples every time, and no time limit for one: a busy machine must not fail a test
hypothesis.settings.register_profile("raylab", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("raylab")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of the caller's MLflow or runs is seen or touched; a test that needs its own home sets it again."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("RAYLAB_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("GIT_PYTHON_REFRESH", "quiet")  # MLflow looks for git and complains where there is none
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    at = tmp_path / "disk"
    at.mkdir()
    with mount_tmpfs(at, "1m"):
        yield at


@contextmanager
def mount_tmpfs(at: Path, size: str) -> Iterator[None]:
    """A real file system of this size at the directory `at`; the test is skipped where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


@pytest.fixture(scope="session")
def ards_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 virtual patients, prepared. Read only: a test that changes it copies it first."""
    from raylab.data.icu.prepare import prepare_icu

    out = tmp_path_factory.mktemp("data") / "ards"
    prepare_icu("ards", "synthetic", None, out, patients=200)
    return out


@pytest.fixture(scope="session")
def mortality_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 200 virtual patients, of whom those with the highest first creatinine die. Read only."""
    import polars as pl

    from raylab.data.icu import prepare
    from raylab.data.icu.sources import synthetic
    from raylab.tasks import mortality

    drawn = synthetic.read(200, 0)
    first = drawn.events.filter(pl.col("concept") == "creatinine").sort("time").group_by("stay_id").first().collect()
    rank = first.select("stay_id", dies=pl.col("value").rank() > 0.8 * pl.len())
    stays = drawn.stays.drop("died").join(rank, "stay_id", "left").with_columns(died=pl.col("dies").fill_null(False))
    source = replace(drawn, stays=stays.drop("dies"))
    out = tmp_path_factory.mktemp("data") / "mortality"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.SOURCES, "synthetic", lambda raw: source)
        prepare.prepare_icu("mortality", "synthetic", None, out, rule=mortality.LABELS["in-hospital-death"])
    return out


@pytest.fixture(scope="session")
def covidnet_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 phantoms of 64 px, prepared. Read only: a test that changes it copies it first."""
    from raylab.data.images.prepare import prepare_images

    out = tmp_path_factory.mktemp("data") / "covidnet"
    prepare_images("covidnet", out, None, None, None, None, source="synthetic", size=64, patients=60)
    return out


@pytest.fixture(scope="session")
def landcover_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 drawn scenes of 16 px in four bands, prepared. Read only."""
    from raylab.data.images.scenes.prepare import prepare_scenes
    from raylab.data.images.scenes.scene import SceneRequest
    from raylab.data.images.scenes.sources import synthetic

    out = tmp_path_factory.mktemp("data") / "landcover"
    prepare_scenes("landcover", out, synthetic.read(SceneRequest(None, 0, 160, 19)), seed=0)
    return out


@pytest.fixture(scope="session")
def landcover_multilabel_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes with one or two labels. Read only."""
    from dataclasses import replace

    from raylab.data.images.scenes.prepare import prepare_scenes
    from raylab.data.images.scenes.scene import SceneRequest
    from raylab.data.images.scenes.sources import synthetic

    out = tmp_path_factory.mktemp("data") / "landcover-multilabel"
    source = synthetic.read(SceneRequest(None, 0, 160, 19))
    scenes = [replace(scene, labels=tuple(sorted({*scene.labels, at % 4}))) for at, scene in enumerate(source.scenes)]
    prepare_scenes("landcover-multilabel", out, replace(source, scenes=scenes, several_labels=True), seed=0)
    return out


@pytest.fixture(scope="session")
def sections_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn sections, in patches of 16 px, prepared. Read only."""
    from raylab.data.images.sections.prepare import Cutting, prepare_sections
    from raylab.data.images.sections.section import SectionRequest
    from raylab.data.images.sections.sources import synthetic

    out = tmp_path_factory.mktemp("data") / "sections"
    source = synthetic.read(SectionRequest(None, None, "depth", 0, 0, 40, 16))
    prepare_sections("sections", out, source, Cutting(size=16))
    return out


@pytest.fixture(scope="session")
def sections_pretraining_data(sections_data: Path) -> Path:
    """The same directory: pretraining reads pairs of its patches."""
    return sections_data


@pytest.fixture(scope="session")
def surrogate_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep of the lung model over three inputs. Read only."""
    from raylab.data.lung.sweep_dataset import finish
    from raylab.physiology import sweep

    out = tmp_path_factory.mktemp("data") / "sweep"
    ranges = {"shunt": "uniform(.05,.3)", "fio2": "uniform(.3,1)", "rate_per_min": "uniform(12,30)"}
    made = sweep.recipe("patient", ranges, size=512)
    for path, argument in sweep.begin(made, out).items():
        sweep.write_chunk(argument, path)
    finish(made, out, "surrogate")
    return out


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A team's MLflow server with accounts (tests/team.py)."""
    from tests.team import serve

    with serve(tmp_path_factory.mktemp("team")) as made:
        yield made


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Where the real data lies; the test is skipped where there is none."""
    path = Path(os.environ.get("RAYLAB_DATA") or ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set RAYLAB_DATA to its directory")
    return path


@pytest.fixture(scope="session")
def set_a(real_data: Path) -> Any:
    """Set a of PhysioNet 2012, a SourceData: reading it takes half of a preparation."""
    from raylab.data.icu.sources import physionet2012

    path = real_data / "icu" / "physionet-2012"
    if not path.is_dir():
        pytest.skip(f"no PhysioNet 2012 at {path}")
    return physionet2012.read(path)
