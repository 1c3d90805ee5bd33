from pathlib import Path

import polars as pl
import pytest

from raylab.data.icu import prepare
from raylab.data.icu.concepts import SourceData
from raylab.data.icu.dataset import load_icu
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.prepare import prepare_icu
from raylab.data.icu.resplit import Split, parse, resplit, sum_counts
from raylab.data.icu.sources import synthetic
from raylab.errors import DataError, UsageError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """200 virtual patients in two hospitals and two periods; some patients have a stay in both."""
    extract = synthetic.read(200, 0)
    number = pl.col("stay_id").str.tail(5).cast(pl.Int64)
    two = pl.when(number < 20).then(pl.format("p{}", number % 10)).otherwise("stay_id")
    stays = extract.stays.with_columns(
        subject_id=two,
        source=pl.when(number % 2 == 0).then(pl.lit("north")).otherwise(pl.lit("south")),
        period=pl.when(number < 150).then(pl.lit("2010")).otherwise(pl.lit("2011")),
    )
    stays = stays.with_columns(source=pl.when(number == 10).then(pl.lit("south")).otherwise("source"))
    events = extract.events.with_columns(subject_id=two)
    out = tmp_path_factory.mktemp("ards") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.SOURCES, "synthetic", lambda raw: SourceData(events, stays))
        prepare_icu("ards", "synthetic", None, out)
    return out


def rows(directory: Path) -> pl.DataFrame:
    return pl.read_parquet(directory / "samples.parquet")


def test_folds_test_every_patient_once(directory, tmp_path):
    tested = []
    for fold in range(3):
        meta = resplit([directory], tmp_path / str(fold), Split("patient", fold, 3), seed=1)
        table = rows(tmp_path / str(fold))
        assert table.group_by("subject_id").agg(pl.col("split").n_unique())["split"].max() == 1
        assert set(table["split"]) == {"train", "val", "test"} and meta.split["rows_left_out"] == 0
        tested += table.filter(pl.col("split") == "test")["stay_id"].to_list()
        train = load_icu(tmp_path / str(fold), "train")
        f, hr = len(train.spec["features"]), train.spec["features"].index("hr")
        measured = train.x[..., hr][train.x[..., f + hr] == 1]
        assert float(measured.mean()) == pytest.approx(0, abs=1e-4)  # statistics of this fold's train
    assert sorted(tested) == sorted(rows(directory)["stay_id"])


def test_a_later_period_is_held_out(directory, tmp_path):
    meta = resplit([directory], tmp_path / "out", parse("temporal"))
    table = rows(tmp_path / "out")
    assert set(table.filter(pl.col("split") == "test")["period"]) == {"2011"}
    assert set(table.filter(pl.col("split") != "test")["period"]) == {"2010"}
    assert meta.split["held_out"] == "period 2011"


def test_a_patient_in_two_hospitals_leaves_train(directory, tmp_path):
    meta = resplit([directory], tmp_path / "out", parse("site:south"))
    table = rows(tmp_path / "out")
    test, rest = (table.filter((pl.col("split") == "test") == flag) for flag in (True, False))
    assert set(test["source"]) == {"south"} and not set(test["subject_id"]) & set(rest["subject_id"])
    assert meta.split["rows_left_out"] >= 1
    assert len(table) == len(rows(directory)) - meta.split["rows_left_out"]
    assert meta.attrition[-1]["stays"] == len(table)


def test_counts_of_values_add_up():
    metas = [
        IcuMeta.model_construct(out_of_range={"fio2": 2, "hr": 1}, converted={"temp": {"degF": 3}}),
        IcuMeta.model_construct(out_of_range={"fio2": 3}, converted={"temp": {"degF": 4, "K": 1}, "k": {"mg/dL": 1}}),
        IcuMeta.model_construct(),  # prepared before they were counted
    ]
    assert sum_counts(metas, "out_of_range") == {"fio2": 5, "hr": 1}
    assert sum_counts(metas, "converted") == {"k": {"mg/dL": 1}, "temp": {"degF": 7, "K": 1}}


def test_several_directories_are_pooled(directory, tmp_path, monkeypatch):
    monkeypatch.setitem(prepare.SOURCES, "yaib", lambda raw: synthetic.read(100, 3))
    prepare_icu("ards", "yaib", tmp_path, tmp_path / "other")
    with pytest.raises(DataError, match="in two of the directories"):
        resplit([directory, directory], tmp_path / "out", Split("patient"))
    with pytest.raises(DataError, match="cannot be held out"):
        resplit([directory, tmp_path / "other"], tmp_path / "out", parse("site:mimic-iii"))
    meta = resplit([directory, tmp_path / "other"], tmp_path / "out", parse("site:synthetic"))
    table = rows(tmp_path / "out")
    assert len(table) == len(rows(directory)) + len(rows(tmp_path / "other")) and table["row"].is_unique().all()
    assert meta.counts["test"]["n"] == len(rows(tmp_path / "other"))
    assert len(load_icu(tmp_path / "out", "test")) == meta.counts["test"]["n"]


def test_what_cannot_be_split_is_refused(directory, tmp_path):
    prepare_icu("ards", "synthetic", None, tmp_path / "six", patients=100, landmark=6)
    with pytest.raises(DataError, match="differ in landmark_h: 12, 6"):
        resplit([directory, tmp_path / "six"], tmp_path / "out", Split("patient"))
    with pytest.raises(DataError, match="have no period"):
        resplit([tmp_path / "six"], tmp_path / "out", parse("temporal"))
    with pytest.raises(DataError, match="source 'east' cannot be held out"):
        resplit([directory], tmp_path / "out", parse("site:east"))
    for text in ("patient", "patient:5/5", "site", "random"):
        with pytest.raises(UsageError, match="is not a split"):
            parse(text)
    with pytest.raises(UsageError, match="1 folds"):
        resplit([directory], tmp_path / "out", Split("patient", 0, 1))
