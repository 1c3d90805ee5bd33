"""The leakage check counts real patients: the split's own, another draw's, and those of data prepared anew."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from PIL import Image

from raylab.data import prepared
from raylab.data.icu import prepare
from raylab.data.icu.concepts import SourceData
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.resplit import Split, resplit
from raylab.data.icu.sources import synthetic
from raylab.data.images.prepare import prepare_images
from raylab.data.lung import sweep_dataset
from raylab.data.prepared import read_meta
from raylab.errors import DataError
from raylab.evaluation.overlap import describe_sources, in_words, leakage
from raylab.physiology import sweep


def test_the_runs_own_splits_share_nobody(ards_data, covidnet_data):
    for task, data in (("ards", ards_data), ("covidnet", covidnet_data)):
        for split in ("val", "test"):
            found = leakage(task, data, data, split)
            assert found["checked"] and found["shared"] == 0 and found["patients"] > 0
        assert leakage(task, data, data, "all")["shared"] > 0


def test_data_prepared_anew_with_other_splits_is_noticed(set_a, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.SOURCES, "physionet2012", lambda raw: set_a)
    for seed in (0, 1):
        prepare_icu("ards", "physionet2012", tmp_path, tmp_path / str(seed), seed=seed)
    found = leakage("ards", tmp_path / "0", tmp_path / "1", "test")
    assert 0.7 * found["patients"] < found["shared"] < 0.9 * found["patients"]  # train and val hold .8 of all
    # Data of an earlier raylab does not say its numbering, and its rows name the set that a record is from.
    earlier = copied(tmp_path / "0", tmp_path / "earlier", numbering=None, patient_ids=None)
    assert leakage("ards", earlier, tmp_path / "1", "test") == found
    assert leakage("ards", tmp_path / "1", earlier, "all")["shared"] > 0


def test_another_draw_is_other_patients_and_absent_data_is_said(ards_data, tmp_path):
    prepare_icu("ards", "synthetic", None, tmp_path / "other", patients=200, seed=9)
    assert leakage("ards", ards_data, tmp_path / "other", "all")["shared"] == 0
    assert leakage("ards", tmp_path / "gone", ards_data, "test") == {
        "checked": False,
        "why": f"the training data is no longer at {tmp_path / 'gone'}",
    }


def test_copies_of_images_are_noticed_across_sources(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for n in range(8):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).resize((120, 120))
        coarse.save(tmp_path / "images" / f"{n}.png")
    for name, numbers in (("a", range(6)), ("b", range(5, 8))):  # image 5 stands in both, under two patients
        rows = [f"{name}{n} {n}.png {('normal', 'pneumonia', 'COVID-19')[n % 3]} {name}" for n in numbers]
        (tmp_path / f"{name}.txt").write_text("\n".join(rows))
    prepare_images(
        "covidnet", tmp_path / "A", tmp_path / "images", tmp_path / "a.txt", tmp_path / "b.txt", None, size=64
    )
    prepare_images("covidnet", tmp_path / "B", tmp_path / "images", None, None, tmp_path / "b.txt", size=64)
    found = leakage("covidnet", tmp_path / "A", tmp_path / "B", "test")
    assert (found["shared"], found["copies"]) == (3, 3)  # the val list of A is B's test list
    prepare_images(
        "covidnet", tmp_path / "A", tmp_path / "images", tmp_path / "a.txt", None, None, size=64, replace=True
    )
    found = leakage("covidnet", tmp_path / "A", tmp_path / "B", "test")
    assert (found["shared"], found["copies"]) == (0, 1)


def copied(directory: Path, out: Path, **meta: object) -> Path:
    """A prepared directory with other entries in its meta.json; None leaves one out."""
    shutil.copytree(directory, out)
    changed = json.loads((out / "meta.json").read_text()) | meta
    (out / "meta.json").write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))
    return out


@pytest.mark.parametrize("kind", ["ards", "covidnet", "surrogate"])
def test_a_new_task_has_the_check_without_a_line(kind, request, tmp_path):
    directory = copied(request.getfixturevalue(f"{kind}_data"), tmp_path / "new", task="new")
    own, every = (leakage("new", directory, directory, split) for split in ("test", "all"))
    assert own["checked"] and own["shared"] == 0 and own["patients"] > 0 and in_words(own).startswith("none, no p")
    assert every["shared"] > 0 and in_words(every).startswith("WARNING")


def test_data_of_an_older_raylab_is_searched_for_its_patients(ards_data, tmp_path):
    old = copied(ards_data, tmp_path / "old", patient_ids=None)
    assert leakage("ards", old, ards_data, "all")["shared"] > 0


def test_why_patients_cannot_be_compared_is_the_true_reason(ards_data, surrogate_data, tmp_path):
    none = copied(ards_data, tmp_path / "none", patient_ids={"none": "rows are weeks, not patients"})
    found = leakage("ards", none, ards_data, "test")
    assert not found["checked"] and found["why"] == f"{none} does not name its patients: rows are weeks, not patients"
    older = copied(surrogate_data, tmp_path / "older", patient_ids=None)
    (older / "points.parquet").unlink()
    files = json.loads((older / "meta.json").read_text())["files"]
    older = copied(older, tmp_path / "sweep", files={k: v for k, v in files.items() if k != "points.parquet"})
    assert "no table there has the columns" in leakage("surrogate", older, surrogate_data, "test")["why"]
    nobody = copied(ards_data, tmp_path / "nobody", patient_ids={"table": "samples.parquet", "column": "icu_type"})
    pl.read_parquet(nobody / "samples.parquet").with_columns(icu_type=None).write_parquet(nobody / "samples.parquet")
    hashed = {**files, "samples.parquet": prepared.sha256(nobody / "samples.parquet")}
    nobody = copied(nobody, tmp_path / "empty", files={"samples.parquet": hashed["samples.parquet"]})
    found = leakage("ards", nobody, nobody, "test")
    assert not found["checked"] and "names its patient" in found["why"]
    wrong = copied(ards_data, tmp_path / "wrong", patient_ids={"table": "samples.parquet", "column": "who"})
    with pytest.raises(DataError, match="no column who"):
        leakage("ards", ards_data, wrong, "test")


def test_training_data_that_has_changed_since_is_not_compared(ards_data, tmp_path):
    trained_on = json.loads((ards_data / "meta.json").read_text())["data_hash"]
    assert leakage("ards", ards_data, ards_data, "test", trained_on)["checked"]
    anew = leakage("ards", ards_data, ards_data, "test", "0" * 64)
    assert not anew["checked"] and "is no longer what the model was trained on" in anew["why"]
    damaged = copied(ards_data, tmp_path / "damaged", format=1)
    assert "cannot be read" in leakage("ards", damaged, ards_data, "test")["why"]


def test_points_that_two_sweeps_share_are_found(surrogate_data, tmp_path):
    ranges = {"shunt": "uniform(.05,.3)", "fio2": "uniform(.3,1)", "rate_per_min": "uniform(12,30)"}
    for seed in (0, 1):
        made = sweep.recipe("patient", ranges, size=256, seed=seed)
        for path, argument in sweep.begin(made, tmp_path / str(seed)).items():
            sweep.write_chunk(argument, path)
        sweep_dataset.finish(made, tmp_path / str(seed), "surrogate")
    first = leakage("surrogate", surrogate_data, tmp_path / "0", "all")  # the first half of the same Sobol sequence
    assert first["unit"] == "point of the design" and 0.8 < first["shared"] / first["patients"] < 1
    other = leakage("surrogate", surrogate_data, tmp_path / "1", "all")
    assert other["checked"] and other["shared"] == 0 and other["patients"] > 0


def test_another_split_or_pool_of_the_same_patients_is_noticed(ards_data, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.SOURCES, "yaib", lambda raw: synthetic.read(100, 3))
    prepare_icu("ards", "yaib", tmp_path, tmp_path / "yaib")
    resplit([ards_data], tmp_path / "fold", Split("patient", 0, 3), seed=7)
    resplit([ards_data, tmp_path / "yaib"], tmp_path / "pool", Split("patient", 0, 3), seed=7)
    everybody = {name: len(pl.read_parquet(path / "samples.parquet")["subject_id"].unique())
                 for name, path in (("ards", ards_data), ("yaib", tmp_path / "yaib"))}  # fmt: skip
    for fitted, scored, patients in (
        (ards_data, tmp_path / "fold", everybody["ards"]),
        (tmp_path / "fold", ards_data, everybody["ards"]),
        (tmp_path / "pool", ards_data, everybody["ards"]),
        (tmp_path / "pool", tmp_path / "yaib", everybody["yaib"]),
        (ards_data, tmp_path / "pool", sum(everybody.values())),
    ):
        found = leakage("ards", fitted, scored, "all")
        assert found["checked"] and found["patients"] == patients, (fitted.name, scored.name, found)
        assert 0.4 * min(everybody.values()) < found["shared"] < patients
    assert "another source" in leakage("ards", ards_data, tmp_path / "yaib", "all")["why"]


def x_rays(folder, seed, rows):
    """Prepared images of their own for (patient, source) rows, all of them test."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = ["path,label,patient,source,split"]
    for n, (patient, source) in enumerate(rows):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).resize((120, 120))
        coarse.save(folder / "images" / f"{n}.png")
        split, label = "train" if seed == 0 else "test", ("normal", "pneumonia", "COVID-19")[n % 3]
        lines.append(f"{n}.png,{label},{patient},{source},{split}")
    (folder / "m.csv").write_text("\n".join(lines))
    prepare_images("covidnet", folder / "out", folder / "images", None, None, None, size=64, manifest=folder / "m.csv")
    return folder / "out"


def test_the_same_number_is_the_same_patient_within_a_source_only(tmp_path):
    fitted = x_rays(tmp_path / "a", 0, [(n, "h1") for n in range(12)])
    found = leakage("covidnet", fitted, x_rays(tmp_path / "b", 1, [(n, "h2") for n in range(4)]), "test")
    assert found["patients"] is None and found["shared"] == 0 and "another source (h1; h2)" in found["why"]
    found = leakage("covidnet", fitted, x_rays(tmp_path / "c", 2, [("1.0", "H1"), (2, "h2"), (99, "h1")]), "test")
    assert (found["patients"], found["shared"]) == (3, 1) and "why" not in found
    found = leakage("covidnet", fitted, x_rays(tmp_path / "d", 3, [(1, ""), (2, ""), (99, "")]), "test")
    assert (found["patients"], found["shared"]) == (3, 2) and "by their number alone" in found["why"]


def extract(numbering, numbers):
    """Virtual patients under other numbers."""
    drawn = synthetic.read(150, 0)
    number = pl.col("stay_id").str.tail(5).cast(pl.Int64) + numbers
    ids = {name: number.cast(pl.String) for name in ("stay_id", "subject_id")}
    return SourceData(drawn.events.with_columns(**ids), drawn.stays.with_columns(**ids), numbering=numbering)


def test_stays_of_two_hospitals_pooled_and_apart(tmp_path, monkeypatch):
    """Both number their patients from 0: they are pooled as other people, and compared as such, also with the pool."""
    sets = ("eicu", "eicu", 0), ("hirid", "hirid", 0), ("later", "eicu", 100), ("last", "eicu", 900)
    for name, of, numbers in sets:
        monkeypatch.setitem(prepare.SOURCES, "yaib", lambda raw, n=of, at=numbers: extract(f"yaib {n}", at))
        prepare_icu("ards", "yaib", tmp_path, tmp_path / name)
    eicu, hirid, later, last = (tmp_path / name for name in ("eicu", "hirid", "later", "last"))
    found = leakage("ards", eicu, hirid, "all")
    assert found["shared"] == 0 and "another source (yaib eicu; yaib hirid)" in found["why"]
    assert 0 < leakage("ards", eicu, later, "all")["shared"] < leakage("ards", eicu, eicu, "all")["shared"]
    pool = resplit([eicu, hirid], tmp_path / "pool", Split("patient"))
    assert pool.numbering == ["yaib eicu", "yaib hirid"]
    assert pool.counts["test"]["n"] + pool.counts["val"]["n"] + pool.counts["train"]["n"] == sum(
        read_meta(path, "ards").cohorts["all"]["n"] for path in (eicu, hirid)
    )
    found = leakage("ards", tmp_path / "pool", hirid, "all")
    assert 0.7 * found["patients"] < found["shared"] < 0.9 * found["patients"]
    with pytest.raises(DataError, match="these identifiers have the same scope: yaib eicu"):
        resplit([eicu, later], tmp_path / "twice", Split("patient"))
    assert resplit([eicu, last], tmp_path / "one", Split("patient")).numbering == ["yaib eicu"]
    found = leakage("ards", tmp_path / "one", last, "all")  # parts of one numbering keep their identifiers
    assert 0.7 * found["patients"] < found["shared"] < 0.9 * found["patients"]


def test_only_codes_of_mimic_name_its_hospital():
    """MEDS is a form of many hospitals' data, so its source alone does not say whose patients they are."""
    metas = [SimpleNamespace(source="meds"), SimpleNamespace(source="mimic3")]
    assert "both hold patients" in describe_sources(metas, [{"mimic-iv-meds"}, {"mimic3"}])
    assert "other patients" in describe_sources(metas, [{"eicu"}, {"mimic3"}])
    assert "other tiles" in describe_sources(metas, [{"eicu"}, {"mimic3"}], "tile")
