"""The leakage check counts real patients: the split's own, another draw's, and those of data prepared anew."""

import numpy as np
import polars as pl
import pytest
from PIL import Image

from raylab.data import icu
from raylab.data.concepts import Extract
from raylab.data.icu import prepare_ards
from raylab.data.images import prepare_covidnet
from raylab.data.overlap import leakage
from raylab.data.prepared import read_meta
from raylab.data.resplit import Split, resplit
from raylab.data.sources import synthetic_icu
from raylab.errors import DataError


def test_the_runs_own_splits_share_nobody(ards_data, covidnet_data):
    for task, data in (("ards", ards_data), ("covidnet", covidnet_data)):
        for split in ("val", "test"):
            found = leakage(task, data, data, split)
            assert found["checked"] and found["shared"] == 0 and found["patients"] > 0
        assert leakage(task, data, data, "all")["shared"] > 0


def test_data_prepared_anew_with_other_splits_is_noticed(real_data, tmp_path):
    path = real_data / "icu" / "physionet-2012"
    for seed in (0, 1):
        prepare_ards("physionet2012", path, tmp_path / str(seed), seed=seed)
    found = leakage("ards", tmp_path / "0", tmp_path / "1", "test")
    assert 0.7 * found["patients"] < found["shared"] < 0.9 * found["patients"]  # train and val hold .8 of all


def test_another_draw_is_other_patients_and_absent_data_is_said(ards_data, tmp_path):
    prepare_ards("synthetic", None, tmp_path / "other", patients=200, seed=9)
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
    prepare_covidnet(tmp_path / "A", tmp_path / "images", tmp_path / "a.txt", tmp_path / "b.txt", None, size=64)
    prepare_covidnet(tmp_path / "B", tmp_path / "images", None, None, tmp_path / "b.txt", size=64)
    found = leakage("covidnet", tmp_path / "A", tmp_path / "B", "test")
    assert (found["shared"], found["copies"]) == (3, 3)  # the val list of A is B's test list
    prepare_covidnet(tmp_path / "A", tmp_path / "images", tmp_path / "a.txt", None, None, size=64)
    found = leakage("covidnet", tmp_path / "A", tmp_path / "B", "test")
    assert (found["shared"], found["copies"]) == (0, 1)


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
    prepare_covidnet(folder / "out", folder / "images", None, None, None, size=64, manifest=folder / "m.csv")
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
    drawn = synthetic_icu.read(150, 0)
    number = pl.col("stay_id").str.tail(5).cast(pl.Int64) + numbers
    ids = {name: number.cast(pl.String) for name in ("stay_id", "subject_id")}
    return Extract(drawn.events.with_columns(**ids), drawn.stays.with_columns(**ids), numbering=numbering)


def test_stays_of_two_hospitals_pooled_and_apart(tmp_path, monkeypatch):
    """Both number their patients from 0: they are pooled as other people, and compared as such, also with the pool."""
    for name, numbers in (("eicu", 0), ("hirid", 0), ("later", 100)):
        monkeypatch.setitem(
            icu.SOURCES, "yaib", lambda raw, n=name, at=numbers: extract(f"yaib {n}".replace("later", "eicu"), at)
        )
        prepare_ards("yaib", tmp_path, tmp_path / name)
    eicu, hirid, later = (tmp_path / name for name in ("eicu", "hirid", "later"))
    found = leakage("ards", eicu, hirid, "all")
    assert found["shared"] == 0 and "another source (yaib eicu; yaib hirid)" in found["why"]
    assert 0 < leakage("ards", eicu, later, "all")["shared"] < leakage("ards", eicu, eicu, "all")["shared"]
    pool = resplit([eicu, hirid], tmp_path / "pool", Split("patient"))
    assert pool["numbering"] == ["yaib eicu", "yaib hirid"]
    assert pool["counts"]["test"]["n"] + pool["counts"]["val"]["n"] + pool["counts"]["train"]["n"] == sum(
        read_meta(path, "ards")["cohorts"]["all"]["n"] for path in (eicu, hirid)
    )
    found = leakage("ards", tmp_path / "pool", hirid, "all")
    assert 0.7 * found["patients"] < found["shared"] < 0.9 * found["patients"]
    with pytest.raises(DataError, match="their identifiers have one numbering: yaib eicu"):
        resplit([eicu, later], tmp_path / "twice", Split("patient"))
