"""The leakage check counts real patients: the split's own, another draw's, and those of data prepared anew."""

import numpy as np
from PIL import Image

from raylab.data.icu import prepare_ards
from raylab.data.images import prepare_covidnet
from raylab.data.overlap import leakage


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
