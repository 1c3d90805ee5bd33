"""The leakage check counts real patients: the split's own, another draw's, and those of data prepared anew."""

from raylab.data.icu import prepare_ards
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
