"""Chest X-rays through the command line: raw folders, transfer, weights, and what is refused on the way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from safetensors.torch import load_file
from test_cli import own_home, raylab, refused, same_signals  # noqa: F401  (fixtures)

from jobs.common import home
from tracking import models, runs

CLASSES = ("normal", "pneumonia", "COVID-19")


@pytest.fixture(scope="module")
def trained(covidnet_data: Path, own_home: Path) -> str:  # noqa: F811
    """The name of one small finished run."""
    code, _, err = raylab(
        "train", "covidnet", "--data", covidnet_data, "--smoke", "--name", "lungs", "--set", "loop.epochs=1"
    )
    assert code == 0, err
    return "lungs"


@pytest.fixture
def folder(covidnet_data: Path, tmp_path: Path) -> Path:
    """A data set as it is handed over: images/, labels/test_X.txt and manifest.csv, of 12 drawn images of 2 classes."""
    pixels = np.load(covidnet_data / "images.npy")
    drawn = pl.read_parquet(covidnet_data / "index.parquet").filter(pl.col("label") < 2).head(12)
    root = tmp_path / "handed"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    lines, rows = [], ["path,label,source,split,patient,view"]
    for row, name, label in drawn.select("row", "patient", "class").iter_rows():
        Image.fromarray(pixels[row]).resize((200, 180)).save(root / "images" / f"{row}.png")
        lines.append(f"{name} {row}.png {label} site")
        rows.append(f"images/{row}.png,{label},site,test,{name},AP")
    (root / "labels" / "test_X.txt").write_text("\n".join(lines))
    (root / "manifest.csv").write_text("\n".join(rows))
    return root


def rewrite(path: Path, as_dicom: bool) -> None:
    """The same picture as an inverted DICOM, or as a PNG with an alpha channel that hides nothing."""
    pixels = np.asarray(Image.open(path))
    if not as_dicom:
        Image.fromarray(np.stack([pixels, np.full_like(pixels, 255)], axis=-1), "LA").save(path)
        return
    data = FileDataset(str(path), {}, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PixelRepresentation, data.PhotometricInterpretation = 1, 0, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit = 8, 8, 7
    data.PixelData = (255 - pixels).tobytes()
    data.save_as(path)


def result(*words: Any, tmp_path: Path) -> dict[str, Any]:
    code, _, err = raylab(*words, "--json", tmp_path / "result.json")
    assert code == 0, err
    found: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    return found


def test_evaluate_takes_a_folder_as_it_was_handed_over(trained, folder, tmp_path):
    words = ("evaluate", "covidnet", "--run", trained, "--data", folder)
    code, said, err = raylab(*words, "--json", tmp_path / "result.json")
    assert code == 0, err
    assert said.count("next:") == 1, "it does not say what to do with the data that it prepares on its way"
    scored: dict[str, Any] = json.loads((tmp_path / "result.json").read_text())
    assert scored["n"] == 12 and scored["classes"]["COVID-19"] == 0 and set(scored["confusion_by_source"]) == {"site"}
    # a class without rows is undefined, not zero, and says why
    assert scored["sensitivity/COVID-19"]["value"] is None and "no row" in scored["sensitivity/COVID-19"]["why"]
    assert scored["macro_recall"]["value"] is not None and "no rows of COVID-19" in scored["macro_recall"]["note"]
    assert scored["minus_border"]["value"] == pytest.approx(
        scored["macro_recall"]["value"] - scored["border_macro_recall"]["value"]
    )
    assert scored["temperature"]["fitted_on"] == "val" and scored["ece_calibrated"]["value"] >= 0
    assert [w["source"] for w in scored["within_source"]] == ["site"] and set(scored["confusion_by_view"]) == {"AP"}
    (folder / "labels" / "test_X.txt").unlink()  # now the manifest alone, and the same pixels in other files
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        rewrite(path, as_dicom=number % 2 == 0)
    again = result(*words, tmp_path=tmp_path)
    assert again["confusion"] == scored["confusion"]
    (folder / "manifest.csv").unlink()
    assert "no label list and no manifest.csv" in refused(*words)


def prepared_images(folder: Path, names: list[str], tmp_path: Path) -> np.ndarray:
    """Images of `folder`/images at 96 px, as `prepare` stores them."""
    lines = [f"{n} {name} normal x" for n, name in enumerate(names)]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    words = ("--images", folder / "images", "--test", tmp_path / "test.txt", "--size", 96, "--out", tmp_path / "out")
    result("prepare", "covidnet", *words, tmp_path=tmp_path)
    return np.load(tmp_path / "out" / "images.npy").astype(int)


@pytest.fixture
def cases() -> Path:
    path = Path(__file__).parents[4] / "shared" / "cases"
    if not path.is_dir():
        pytest.skip(f"no cases at {path}")
    return path


def test_padding_does_not_decide_the_contrast(cases, tmp_path):
    names = ["unpadded.dcm", "padded_high.dcm", "padded_low.dcm"]
    plain, high, low = prepared_images(cases / "dicom-padding", names, tmp_path)
    assert (high == low).all() and (high[:, :10] == 0).all() and (high[:, -10:] == 0).all()
    middle = np.s_[:, 16:-16]
    assert len(np.unique(high[middle])) > 250 and np.abs(high[middle] - plain[middle]).mean() < 2


def test_sixteen_bit_colour_and_alpha_are_like_grey(cases, tmp_path):
    names = ["grey16.png", "rgb16.png", "greyalpha16.png", "rgba16.png"]
    grey, *others = prepared_images(cases / "png-16-bit-colour", names, tmp_path)
    assert len(np.unique(grey)) > 250
    for name, other in zip(names[1:], others, strict=True):
        assert (other == grey).all(), name


def test_prepare_from_a_folder(folder, tmp_path):
    out = result("prepare", "covidnet", "--path", folder, "--size", 64, "--out", tmp_path / "out", tmp_path=tmp_path)
    assert set(out["counts"]) == {"test"} and sum(out["counts"]["test"].values()) == 12
    assert out["attrition"][0]["step"] == "lines in the lists" and out["warnings"] == []
    (folder / "labels" / "test_X.txt").unlink()  # the manifest alone, which has no domains
    said = refused("prepare", "covidnet", "--path", folder, "--domain", "Y", "--out", tmp_path / "none", "--size", 64)
    assert "domain" in said and not (tmp_path / "none").exists()


def test_a_class_without_training_rows_is_refused(folder, tmp_path):
    (folder / "labels" / "test_X.txt").rename(folder / "labels" / "train_X.txt")
    result("prepare", "covidnet", "--path", folder, "--size", 64, "--out", tmp_path / "out", tmp_path=tmp_path)
    said = refused("train", "covidnet", "--data", tmp_path / "out", "--smoke")
    assert "no row of class COVID-19 in the training data" in said


@pytest.mark.parametrize("mode", ["scratch", "probe", "full"])
def test_transfer_modes(mode, trained, covidnet_data, own_home, tmp_path):  # noqa: F811
    name = f"from-lungs-{mode}"
    words = ["--set", f"transfer.mode={mode}", "loop.epochs=1", "seed=1", "transfer.reestimate=false"]
    done = result(
        "transfer", "covidnet", "--from", trained, "--data", covidnet_data, "--name", name, *words, tmp_path=tmp_path
    )
    assert done["parent"] == trained
    tags = home.note(own_home / "runs" / name).tags
    assert tags["raylab.kind"] == "transfer" and tags["raylab.parent_name"] == trained
    before, after = (load_file(own_home / "runs" / n / "model" / "model.safetensors") for n in (trained, name))
    same = [n for n in before if (before[n] == after[n]).all() and "num_batches" not in n]
    body = [n for n in before if not n.startswith("head.") and "num_batches" not in n]
    if mode == "probe":
        assert set(same) >= set(body) and "head.weight" not in same
    else:
        assert "stem.0.weight" not in same


def test_weights_of_a_registered_model(trained, covidnet_data, own_home, tmp_path):  # noqa: F811
    described = home.note(own_home / "runs" / trained)
    version = models.register(described.uri, described.run_id, "lung-net", 0.5, 0.5).version
    words = ["--smoke", "--set", "loop.epochs=1", "transfer.mode=probe", "transfer.reestimate=false"]
    for given in (f"models:/lung-net/{version}", "models:/lung-net@best"):
        done = result("train", "covidnet", "--data", covidnet_data, *words, f"model.weights={given}", tmp_path=tmp_path)
        before = load_file(own_home / "runs" / trained / "model" / "model.safetensors")
        after = load_file(Path(done["directory"]) / "model" / "model.safetensors")
        assert (before["stem.0.weight"] == after["stem.0.weight"]).all()
        recipe = json.loads((Path(done["directory"]) / "recipe.json").read_text())
        assert Path(recipe["model"]["weights"]).is_file()  # what a resumed run starts from
    said = refused("train", "covidnet", "--data", covidnet_data, *words, "model.weights=models:/none/1")
    assert "no registered model models:/none/1" in said
    assert runs.address(own_home).startswith("sqlite")


def test_weights_that_do_not_fit_are_refused_before_a_run_exists(trained, covidnet_data, own_home):  # noqa: F811
    before = sorted(p.name for p in (own_home / "runs").iterdir())
    weights = own_home / "runs" / trained / "model" / "model.safetensors"
    said = refused(
        "train", "covidnet", "--data", covidnet_data, "--smoke", "--set", "model.width=0.5", f"model.weights={weights}"
    )
    assert "do not fit the network" in said and "stem.0.weight" in said
    assert sorted(p.name for p in (own_home / "runs").iterdir()) == before


def test_models_lists_published_figures_beside_ours(tmp_path):
    listed = result("models", "--size", 32, "--batch", 2, "--names", "covidnet", "resnet18", tmp_path=tmp_path)
    ours, other = listed["models"]
    assert ours["published_parameters"] == 11.7e6 and ours["parameters"] < 2e6 and ours["images_per_s"] > 0
    assert other["published_macs"] is None and other["macs"] > 8e9
    assert "unknown model 'resnet_18'" in refused("models", "--names", "resnet_18")


def test_the_model_card_tells_of_controls_and_of_other_data(trained, folder, own_home, tmp_path):  # noqa: F811
    result("evaluate", "covidnet", "--run", trained, "--data", folder, tmp_path=tmp_path)
    card = (own_home / "runs" / trained / "model_card.md").read_text()
    for said in ("SYNTHETIC DATA", "reconstruction", "minus the border probe", "val, own data", "test, data", "Wilson"):
        assert said in card, said
    assert "undefined: no row of class COVID-19" in card and "{{" not in card
    artifacts = runs.client(runs.address(own_home)).list_artifacts(home.note(own_home / "runs" / trained).run_id)
    assert "model_card.md" in {a.path for a in artifacts}


def test_predict_explains(trained, covidnet_data, tmp_path, own_home):  # noqa: F811
    words = ("--data", covidnet_data, "--split", "val", "--out", tmp_path / "p.parquet")
    out = result("predict", "covidnet", "--run", trained, *words, "--explain", tmp_path=tmp_path)
    share = pl.read_parquet(tmp_path / "p.parquet")["outside"]
    assert share.is_between(0, 1).all() and 0 < out["outside"] < 1
    assert out["sheets"] and all(Path(path).stat().st_size > 10_000 for path in out["sheets"])
