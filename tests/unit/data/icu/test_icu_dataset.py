import json

import numpy as np
import polars as pl
import pytest
import torch

from raylab.data.icu.dataset import load_icu, tensorise
from raylab.data.icu.prepare import prepare_icu
from raylab.errors import DataError, UsageError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("ards") / "out"
    prepare_icu("ards", "synthetic", None, out, patients=200)
    return out


def test_layout_by_hand():
    rows = pl.DataFrame({"row": [0, 1], "age": [60.0, None]})
    table = pl.DataFrame(
        {
            "row": [0, 0, 0, 1, 1, 1],
            "hr": [None, 90.0, None, None, None, None],
            "hr__mask": [False, True, False, False, False, False],
            "hr__since": [None, 0.5, 1.5, None, None, None],
        }
    )
    spec = {
        "features": ["peep", "hr"], "static": ["age", "sex"], "hours": 3,
        "mean": [5.0, 80.0], "std": [1.0, 10.0], "static_mean": [50.0, 0.5], "static_std": [20.0, 0.5],
    }  # fmt: skip
    x, absent = tensorise(rows, table, spec)
    #                values  masks  since      statics
    assert x[0] == pytest.approx(
        np.array([[0, 0, 0, 0, 1, 1, 0.5, 0], [0, 1, 0, 1, 1, 0.5 / 3, 0.5, 0], [0, 1, 0, 0, 1, 0.5, 0.5, 0]])
    )
    assert x[1] == pytest.approx(np.array([[0, 0, 0, 0, 1, 1, 0, 0]] * 3))
    assert absent == ["peep", "sex"]


def test_a_value_that_cannot_be_used_ends_the_carry():
    table = pl.DataFrame(
        {"row": [0] * 4, "hr": [90.0, None, None, 70.0], "hr__mask": [True, False, False, True],
         "hr__since": [0.5, 1.5, None, 0.5]}
    )  # fmt: skip
    spec = {"features": ["hr"], "static": [], "hours": 4, "mean": [80.0], "std": [10.0]}
    x, _ = tensorise(pl.DataFrame({"row": [0]}), table, spec | {"static_mean": [], "static_std": []})
    assert x[0] == pytest.approx(np.array([[1, 1, 0.125], [1, 0, 0.375], [0, 0, 1], [-1, 1, 0.125]]))


def test_samples_protocol(directory):
    samples = load_icu(directory, "train")
    spec, n = samples.spec, len(samples)
    f, s = len(spec["features"]), len(spec["static"])
    index = np.array([3, 0, 5])
    x = samples.batch(index)
    assert x.shape == (3, 12, 3 * f + s) and x.dtype == torch.float32 and torch.isfinite(x).all()
    assert torch.equal(x, samples.batch(index, augment=(1, 2)))
    assert samples.y.dtype == np.int64 and samples.group.dtype == np.int64
    assert {len(a) for a in (samples.y, samples.group, samples.source, samples.ids)} == {n}
    assert spec["kind"] == "icu-hourly" and json.loads(json.dumps(spec)) == spec
    assert set(samples.source) == {"synthetic"} and samples.absent == [] and samples.meta.task == "ards"


def test_train_values_are_standardised(directory):
    samples = load_icu(directory, "train")
    f = len(samples.spec["features"])
    x = samples.batch(np.arange(len(samples))).numpy()
    value, mask = x[:, :, :f], x[:, :, f : 2 * f] == 1
    i = samples.spec["features"].index("hr")
    measured = value[:, :, i][mask[:, :, i]]
    assert measured.mean() == pytest.approx(0, abs=1e-4) and measured.std() == pytest.approx(1, abs=1e-4)
    since = x[:, :, 2 * f : 3 * f]
    assert since.min() >= 0 and since.max() <= 1


def test_splits_and_cohorts(directory):
    parts = {split: load_icu(directory, split) for split in ("train", "val", "test")}
    everything = load_icu(directory, "all")
    assert sum(map(len, parts.values())) == len(everything)
    assert len({int(g) for p in parts.values() for g in np.unique(p.group)}) == len(everything)
    subset = load_icu(directory, "all", cohort="ventilated_pf")
    assert 0 < len(subset) < len(everything)
    assert len(subset) == everything.meta.cohorts["ventilated_pf"]["n"]


def test_a_models_spec_rules(directory):
    own = load_icu(directory, "test")
    spec = json.loads(json.dumps(own.spec))
    # the model knows a concept that is never measured here, has other statistics, and ignores all else
    spec |= {"features": ["nimap", "hr"], "mean": [75.0, 0.0], "std": [10.0, 1.0], "static": ["age"]}
    spec |= {"static_mean": [0.0], "static_std": [1.0]}
    other = load_icu(directory, "test", spec=spec)
    x = other.batch(np.arange(len(other))).numpy()
    assert x.shape == (len(own), 12, 7) and other.absent == ["nimap"] and other.spec == spec
    assert (x[:, :, [0, 2]] == 0).all() and (x[:, :, 4] == 1).all()
    i = own.spec["features"].index("hr")
    f = len(own.spec["features"])
    mine = own.batch(np.arange(len(own))).numpy()
    measured = mine[:, :, f + i] == 1
    raw = mine[:, :, i] * own.spec["std"][i] + own.spec["mean"][i]
    assert x[:, :, 1][measured] == pytest.approx(raw[measured], rel=1e-4)


def test_a_spec_of_another_landmark_or_kind_is_refused(directory):
    spec = load_icu(directory, "test").spec
    with pytest.raises(DataError, match="landmark 12 h, the model for 6 h"):
        load_icu(directory, "test", spec=spec | {"landmark_h": 6, "hours": 6})
    with pytest.raises(DataError, match="kind 'image'"):
        load_icu(directory, "test", spec={"kind": "image", "classes": []})


def test_wrong_names_and_empty_splits(directory, tmp_path):
    with pytest.raises(UsageError, match="unknown split 'tests'"):
        load_icu(directory, "tests")
    with pytest.raises(UsageError, match="unknown cohort 'ventilator'"):
        load_icu(directory, "test", cohort="ventilator")
    with pytest.raises(UsageError, match="unknown fill 'zero'"):
        load_icu(directory, "test", fill="zero")
    with pytest.raises(DataError, match="no data directory"):
        load_icu(tmp_path / "absent", "test")


def test_an_empty_cohort_of_a_split_is_an_error(directory, monkeypatch):
    read = pl.read_parquet
    monkeypatch.setattr(pl, "read_parquet", lambda path: read(path).with_columns(ventilated_pf=pl.lit(False))
                        if path.name == "samples.parquet" else read(path))  # fmt: skip
    with pytest.raises(DataError, match="no row in split 'test', cohort 'ventilated_pf'"):
        load_icu(directory, "test", cohort="ventilated_pf")


def test_fills_show_less_and_less(directory):
    mask, forward, mean = (load_icu(directory, "val", fill=fill) for fill in ("mask", "forward", "mean"))
    f = len(mask.spec["features"])
    x, y, z = (samples.batch(np.arange(len(samples))) for samples in (mask, forward, mean))
    measured = x[..., f : 2 * f] == 1
    assert torch.equal(y[..., :f], x[..., :f]) and (y[..., f : 3 * f] == 0).all()
    assert torch.equal(z[..., :f][measured], x[..., :f][measured]) and (z[..., :f][~measured] == 0).all()
    assert all(torch.equal(t[..., 3 * f :], x[..., 3 * f :]) for t in (y, z))


def test_rolling_rows_see_the_hours_before_their_prediction(tmp_path):
    prepare_icu("ards", "synthetic", None, tmp_path / "landmark", patients=100, landmark=6)
    prepare_icu("ards", "synthetic", None, tmp_path / "rolling", patients=100, landmark=6, framing="rolling", until=30)
    fixed, rolling = (load_icu(tmp_path / name, "all") for name in ("landmark", "rolling"))
    assert rolling.rows["at_h"].min() == 6 and rolling.rows["at_h"].max() == 30
    assert rolling.rows.filter(pl.col("onset_h") <= pl.col("at_h")).is_empty()  # until onset
    first = rolling.rows.with_row_index("i").filter(pl.col("at_h") == 6)
    assert first["stay_id"].to_list() == fixed.rows["stay_id"].to_list()
    # the same hours, whose statistics differ because rolling rows see more of them
    f, hr = len(rolling.spec["features"]), rolling.spec["features"].index("hr")
    ours = rolling.batch(first["i"].to_numpy())[..., hr] * rolling.spec["std"][hr] + rolling.spec["mean"][hr]
    theirs = fixed.batch(np.arange(len(fixed)))[..., hr] * fixed.spec["std"][hr] + fixed.spec["mean"][hr]
    known = fixed.batch(np.arange(len(fixed)))[..., f + hr].cumsum(1) > 0
    assert torch.allclose(ours[known], theirs[known], atol=1e-3)
    # a row at 7 sees what the row at 6 saw, one hour further
    stay = rolling.rows.with_row_index("i").filter(pl.col("stay_id") == first["stay_id"][0])
    at_6, at_7 = (rolling.batch(stay.filter(pl.col("at_h") == at)["i"].to_numpy()) for at in (6, 7))
    assert torch.equal(at_6[:, 1:], at_7[:, :-1])
