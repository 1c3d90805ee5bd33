"""A model leaves a site as a signed bundle, and comes back as aggregates: no row, no identifier, no small count."""

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs import cli, export
from jobs.common import bundle_evaluation
from jobs.common.model_inputs import inputs_of
from raylab.data.icu.contributors import count_contributors
from raylab.data.icu.meta import IcuMeta
from raylab.data.icu.prepare import prepare_icu
from raylab.data.prepared import read_meta
from raylab.errors import DataError, UsageError
from raylab.evaluation.site_report import LIMIT, SiteReport, check_report, find_few, tell_count
from raylab.tasks import find_task
from raylab.training import bundle as bundles


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def exported(ards_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(bundle, result of the export) of a run in a home of its own."""
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYLAB_HOME", str(place / "home"))
        short = ("--smoke", "--quiet", "--set", "loop.epochs=1")
        assert raylab("train", "ards", "--data", ards_data, "--name", "first", *short) == 0
        yield place / "first.raylab", export.export("first", out=place / "first.raylab", quiet=True)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of another site."""
    out = tmp_path_factory.mktemp("site") / "ards"
    prepare_icu("ards", "synthetic", None, out, patients=150, seed=5)
    return out


def test_a_bundle_is_signed_complete_and_reproducible(exported, tmp_path):
    path, told = exported
    bundle, sha256, signer, contents = bundles.read_bundle(path, told["signer"])
    assert (sha256, signer, bundle.name, bundle.task) == (told["sha256"], told["signer"], "first", "ards")
    assert bundle.hashes["weights_sha256"]
    assert list(bundle.concepts) == told["concepts"]
    assert contents[bundles.CARD].decode().startswith("# Model card: first") and b"SYNTHETIC" in contents[bundles.CARD]
    export.export("first", out=tmp_path / "again.raylab", quiet=True)
    assert (tmp_path / "again.raylab").read_bytes() == path.read_bytes()
    key = Path(path.parent / "home" / "keys" / "bundles")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_text().strip().encode() not in path.read_bytes()


def test_scores_are_told_if_val_has_enough_patients_of_each_class(exported, tmp_path, capsys):
    """The val split of this data has not: neither the scores nor the counts behind them are in the bundle."""
    bundle, _, _, contents = bundles.read_bundle(exported[0])
    card = contents[bundles.CARD].decode()
    assert bundle.scores == {} and "Left out: they rest on fewer than 10 patients" in card and "auroc" not in card
    assert raylab("export", "first", "--out", tmp_path / "few.raylab") == 0
    assert "scores on val are left out: " in capsys.readouterr().out
    (file,) = (exported[0].parent / "home" / "runs" / "first" / "scores").glob("val-*.json")
    before = file.read_text()
    many = {"n": 90, "patients": 90, "classes": {"no onset": 70, "onset": 20}}
    file.write_text(json.dumps(json.loads(before) | many))
    try:
        assert raylab("export", "first", "--out", tmp_path / "many.raylab") == 0
    finally:
        file.write_text(before)
    scores = bundles.read_bundle(tmp_path / "many.raylab")[0].scores
    assert scores["auroc"]["value"] == json.loads(before)["auroc"]["value"]
    assert "left out" not in capsys.readouterr().out


def test_the_card_says_what_was_spent_of_a_privacy_budget(exported, tmp_path):
    directory = exported[0].parent / "home" / "runs" / "first"
    before = (directory / "run.json").read_text()
    record = json.loads(before)
    record["tags"]["raylab.privacy"] = "epsilon 7.9 of 8, delta 1e-05"
    (directory / "run.json").write_text(json.dumps(record))
    try:
        export.export("first", out=tmp_path / "private.raylab", quiet=True)
    finally:
        (directory / "run.json").write_text(before)
    bundle, _, _, contents = bundles.read_bundle(tmp_path / "private.raylab")
    assert bundle.privacy == "epsilon 7.9 of 8, delta 1e-05"
    assert "epsilon 7.9 of 8, delta 1e-05. The unit is all rows of one patient" in contents[bundles.CARD].decode()


def test_only_an_earlier_bundle_is_replaced(exported, tmp_path, capsys):
    place, other = tmp_path / "place.raylab", tmp_path / "other.raylab"
    place.mkdir()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("thesis.txt", "all of it")
    before = other.read_bytes()
    for out, why in ((place, "is a directory"), (other, "is not a bundle file of raylab")):
        assert raylab("export", "first", "--out", out) == 2
        assert why in capsys.readouterr().err
    assert other.read_bytes() == before and not [*place.iterdir()]
    path, _ = exported
    assert raylab("export", "first", "--out", path) == 0


def test_no_patient_is_in_a_bundle_or_a_report(exported, elsewhere, ards_data, tmp_path):
    path, _ = exported
    report = tmp_path / "report.json"
    assert raylab("evaluate", path, "--data", elsewhere, "--split", "all", "--quiet", "--json", report) == 0
    found = [path.read_bytes(), report.read_bytes()]
    for data in (ards_data, elsewhere):
        rows = pl.read_parquet(data / "samples.parquet")
        for name in ("subject_id", "stay_id"):
            for id in rows[name].unique().to_list():
                assert not any(f'"{id}"'.encode() in content for content in found)
        assert not any(str(data).encode() in content for content in found)
    counts = [n for of in bundles.read_bundle(path)[0].counts.values() for n in of.values()]
    assert counts and all(n is None or n == 0 or n >= LIMIT for n in counts) and any(counts)


def test_the_report_of_a_site_has_scores_coverage_shift_and_recalibration(exported, elsewhere, tmp_path):
    path, told = exported
    words = ("--signer", told["signer"], "--data", elsewhere, "--split", "all", "--recalibrate", 60)
    assert raylab("evaluate", path, *words, "--json", tmp_path / "report.json") == 0
    content = json.loads((tmp_path / "report.json").read_text())
    classes = content["classes"]
    report = check_report(content, told["concepts"], classes, "ards", told["sha256"])
    assert sum(classes.values()) == report.rows
    assert report.rows == read_meta(elsewhere, "ards", IcuMeta).counts["train"]["n"] + sum(
        read_meta(elsewhere, "ards", IcuMeta).counts[split]["n"] for split in ("val", "test")
    )
    assert 0 <= report.scores["auroc"].low <= report.scores["auroc"].value <= 1
    assert report.coverage["hr"] > 0.5 and abs(report.shift["hr"]) < 2
    assert report.recalibration.patients == 60 and report.recalibration.after["brier"].value is not None


@pytest.mark.parametrize("member", bundles.MEMBERS)
def test_a_bundle_with_a_changed_member_is_refused(member, exported, tmp_path):
    with zipfile.ZipFile(exported[0]) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    changed = bytearray(contents[member])
    changed[len(changed) // 2] ^= 1
    with zipfile.ZipFile(tmp_path / "b", "w") as archive:
        for name, content in (contents | {member: bytes(changed)}).items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match="is not a model bundle of raylab, or is damaged"):
        bundles.read_bundle(tmp_path / "b")


def test_a_bundle_that_somebody_else_signed_again_is_refused_by_its_signer(exported, tmp_path):
    path, told = exported
    bundle, _, _, contents = bundles.read_bundle(path)
    forged = contents | {bundles.CARD: b"fit for care"}
    bundles.write_bundle(tmp_path / "b", bundle, forged, bundles.read_key(tmp_path / "own key"))
    assert bundles.read_bundle(tmp_path / "b")[2] != told["signer"]
    with pytest.raises(DataError, match="not from the expected sender"):
        bundles.read_bundle(tmp_path / "b", told["signer"])


@pytest.mark.parametrize("more", [{"../escape": b""}, {"model/code.py": b""}, None])
def test_other_members_and_other_files_are_refused(more, exported, tmp_path):
    if more is None:
        (tmp_path / "b").write_bytes(exported[0].read_bytes()[:-200])
    else:
        with zipfile.ZipFile(exported[0]) as archive, zipfile.ZipFile(tmp_path / "b", "w") as other:
            for name, content in ({name: archive.read(name) for name in archive.namelist()} | more).items():
                other.writestr(name, content)
    with pytest.raises(DataError):
        bundles.read_bundle(tmp_path / "b")
    assert raylab("evaluate", tmp_path / "b", "--data", tmp_path) == 2


def test_a_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "keys" / "key"
    bundles.read_key(key)
    key.chmod(0o644)
    with pytest.raises(DataError, match="can be read by others"):
        bundles.read_key(key)
    key.chmod(0o600)
    key.write_text("no key")
    with pytest.raises(DataError, match="holds no signing key"):
        bundles.read_key(key)


def test_a_statistic_over_few_patients_does_not_leave(ards_data):
    patients = count_contributors(ards_data)
    train = pl.read_parquet(ards_data / "samples.parquet").filter(pl.col("split") == "train")
    assert patients["hr"] == train["subject_id"].n_unique() > patients["pao2"] > LIMIT
    export.check_statistics(patients, ("hr",), LIMIT)
    with pytest.raises(DataError, match=r"may tell of single patients: hr"):
        export.check_statistics(patients | {"hr": LIMIT - 1}, ("hr", "pao2"), LIMIT)
    spec = {"features": ["hr", "pao2"], "static": [], "static_mean": [], "static_std": []}
    spec |= {"hours": 12, "landmark_h": 12.0, "label": {}}
    inputs = inputs_of(find_task("ards"), spec | {"mean": [80.0, 90.0], "std": [10.0, 20.0]})
    meta = read_meta(ards_data, "ards", IcuMeta)
    shift = bundle_evaluation.describe_shift(inputs, meta, patients | {"pao2": LIMIT - 1})
    assert shift["pao2"] is None and shift["hr"] == pytest.approx((meta.statistics["hr"]["mean"] - 80) / 10)


def test_counts_that_tell_of_few_are_suppressed():
    assert bundles.suppress({"n": 50, "positive": 9, "patients": 50}) == {"n": 50, "positive": None, "patients": 50}
    assert bundles.suppress({"n": 50, "positive": 45}) == {"n": 50, "positive": None}, "the others are few"
    assert bundles.suppress({"n": 50, "positive": 0}) == {"n": 50, "positive": 0}
    assert bundles.suppress({"n": 5, "positive": 5}) == {"n": None, "positive": None}


def valid(**more: Any) -> dict[str, Any]:
    one = {"value": 0.5, "low": None, "high": None}
    content = {"format": 2, "bundle": "0" * 64, "task": "t", "synthetic": True, "split": "all", "rows": 50}
    content |= {"patients": "<10", "classes": {"ill": 20}, "scores": {"auroc": one, "ppv/ill": one}}
    content |= {"coverage": {"hr": None}}
    return content | {"shift": {"hr": 0.1}, "recalibration": None} | more


@pytest.mark.parametrize(
    "more",
    [
        {"p": [0.1, 0.2]},
        {"rows": [1, 2]},
        {"rows": "many"},
        {"scores": {"auroc": [0.1]}},
        {"scores": {"auroc": {"value": 1.0, "low": None, "high": None, "why": "patient 7"}}},
        {"scores": {"Miller, Anna": {"value": 1.0, "low": None, "high": None}}},
        {"scores": {f"s{n}": {"value": 1.0, "low": None, "high": None} for n in range(70)}},
        {"scores": {"ppv/Miller": {"value": 1.0, "low": None, "high": None}}},
        {"classes": {"Miller, Anna": 1}},
        {"coverage": {"patient-7": 1.0}},
        {"shift": {"hr": float("nan")}},
        {"split": "patients"},
        {"bundle": "1" * 64},
        {"task": "u"},
    ],
)
def test_a_report_has_no_place_for_rows_and_text(more):
    assert check_report(valid(), ["hr"], ["ill"], "t", "0" * 64)
    with pytest.raises(DataError, match="not a report that may leave"):
        check_report(valid(**more), ["hr"], ["ill"], "t", "0" * 64)


def test_the_schema_of_reports_has_no_array():
    assert '"array"' not in json.dumps(SiteReport.model_json_schema())


def test_small_counts_and_small_data_do_not_leave(exported, tmp_path):
    assert [tell_count(n) for n in (0, 1, LIMIT - 1, LIMIT)] == [0, "<10", "<10", LIMIT]
    small = tmp_path / "small"
    prepare_icu("ards", "synthetic", None, small, patients=30, seed=2)
    with pytest.raises(DataError, match="too few rows for scores that may leave"):
        bundle_evaluation.evaluate_bundle(exported[0], small, "val", None, None, True)
    with pytest.raises(UsageError, match="fewer than 10 patients"):
        bundle_evaluation.evaluate_bundle(exported[0], small, "all", 9, None, True)


def test_what_is_too_few_for_scores_is_named():
    assert find_few(50, 40, {"well": 30, "ill": 20, "never": 0}) == []
    assert find_few(50, 9, {"well": 41, "ill": 9}) == [
        "9 patients",
        "9 rows of class ill",
        "9 rows of other classes than well",
    ]
    assert find_few(50, 50, {"well": 50, "ill": 0}) == ["rows of one class alone"]
    assert find_few(500, 500, {}) == [], "a regression has no classes"
