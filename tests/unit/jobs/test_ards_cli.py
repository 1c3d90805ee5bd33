"""Sources, labels and splits through the command line: what it prints, and exit code 2 with nothing left behind."""

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from jobs import cli
from jobs.common import scores
from raylab.data.icu.meta import IcuMeta
from raylab.files import read_lines

SHARE = ("--share-individuals",)


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))


def raylab(*words: object) -> int:
    return cli.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert raylab(*words) == 2
    return capsys.readouterr().err


def test_start_up_loads_only_what_tables_need():
    heavy = "{'torch', 'pyarrow', 'pandas', 'sqlalchemy', 'mlflow', 'ray'}"
    code = f"import sys, jobs.prepare, raylab.data.icu.prepare; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def yaib(folder: Path, stays: int = 60, hours: int = 40) -> Path:
    """eICU's form; every third stay has an onset at hour 20."""
    rows = [
        (s, timedelta(hours=h), 50.0, 90.0 if s % 3 == 0 and h >= 20 else 200.0, 80.0 + s % 7)
        for s in range(stays)
        for h in range(0, hours, 2)
    ]
    folder.mkdir()
    pl.DataFrame(rows, schema=["stay_id", "time", "fio2", "po2", "hr"], orient="row").write_parquet(
        folder / "dyn.parquet"
    )
    pl.DataFrame({"stay_id": range(stays), "age": [60.0 + s % 30 for s in range(stays)]}).write_parquet(
        folder / "sta.parquet"
    )
    return folder


def test_a_model_trained_elsewhere_is_scored_on_yaib_data(tmp_path, ards_data, capsys):
    assert (
        raylab("train", "ards", "--data", ards_data, "--smoke", "--name", "far", "--quiet", "--set", "loop.epochs=1")
        == 0
    )
    assert (
        raylab("prepare", "ards", "--source", "yaib", "--path", yaib(tmp_path / "eicu"), "--out", tmp_path / "y") == 0
    )
    said = capsys.readouterr().out
    assert "ventilation is not recorded here" in said and "outcomes of the rows" in said
    words = ["evaluate", "ards", "--run", "far", "--data", tmp_path / "y", "--split", "all", "--recalibrate", 20]
    assert raylab(*words, "--json", tmp_path / "scores.json") == 0
    said = capsys.readouterr().out
    assert "ventilation: the model's invasive, this data's None" in said and "never measured in this data" in said
    scored = json.loads((tmp_path / "scores.json").read_text())
    assert scored["n"] == 60 and scored["auroc"]["low"] is not None and scored["cohorts"]["ventilated"]["n"] == 0
    assert {"ici", "decision_curve", "subgroups", "recalibrated", "notes"} <= scored.keys()
    assert "another source" in scored["leakage"]["why"]
    assert "temporal" in refused(
        capsys, "prepare", "ards", "--from", tmp_path / "y", "--split-by", "year", "--out", "x"
    )
    assert (
        raylab("prepare", "ards", "--from", tmp_path / "y", "--split-by", "patient:1/3", "--out", tmp_path / "f") == 0
    )
    assert "fold 2 of 3" in capsys.readouterr().out
    assert raylab("concepts", "--data", tmp_path / "y", "--json", tmp_path / "concepts.json") == 0
    covered = {row["name"]: row for row in json.loads((tmp_path / "concepts.json").read_text())["concepts"]}
    assert covered["pao2"]["stays"] == covered["pao2"]["rows"] == 1 and covered["peep"]["rows"] == 0
    for data, more, kept in (
        (ards_data, (), []),
        (tmp_path / "y", (), ["one", "average"]),
        (tmp_path / "y", SHARE, []),
    ):
        words = ["explain", "ards", "--run", "far", "--data", data, "--rows", 8, *more]
        assert raylab(*words, "--json", tmp_path / "plots.json") == 0
        plots = json.loads((tmp_path / "plots.json").read_text())
        private = [Path(path) for path in plots["private"]]
        assert sorted(path.stem for path in private) == sorted(f"explain-{name}" for name in kept), data
        assert all(path.parent.name == "individuals" and path.stat().st_mode & 0o777 == 0o600 for path in private)
        assert len(plots["plots"]) == 2 and all(Path(path).stat().st_size > 10_000 for path in plots["plots"])
    records = read_lines(tmp_path / "home" / "runs" / "far" / "outbox" / "outbox.jsonl")
    sent = [record["path"] for record in records if record["kind"] == "artifact" and "explain-" in record["path"]]
    assert len(sent) == 4 and not [path for path in sent if "individuals" in path], "synthetic, and shared on purpose"


def test_a_label_of_an_earlier_version_is_compared():
    """A directory that was prepared before labels had a least age does not say one."""
    mine = {"name": "ahrf", "min_age": 18.0, "onset": "in words", "population": "in words"}
    framing = {"framing": "landmark", "horizon_h": 24, "gap_h": 0}
    meta = IcuMeta.model_construct(label={"name": "ahrf", "onset": "others"}, **framing)
    found = scores.differences({"label": mine, **framing}, meta)
    assert found == ["min_age: the model's 18.0, this data's not recorded"]


def test_rolling_predictions_are_scored_by_events(tmp_path, capsys):
    drawn = ["prepare", "ards", "--source", "synthetic", "--patients", 80, "--rolling", "--landmark", 6, "--until", 20]
    assert raylab(*drawn, "--horizon", 12, "--gap", 1, "--out", tmp_path / "r") == 0
    assert (
        raylab("train", "ards", "--data", tmp_path / "r", "--quiet", "--name", "roll", "--set", "model.name=last_pf")
        == 0
    )
    capsys.readouterr()
    assert raylab("evaluate", "ards", "--run", "roll", "--data", tmp_path / "r", "--json", tmp_path / "s.json") == 0
    assert "a patient-day" in capsys.readouterr().out
    rows = json.loads((tmp_path / "s.json").read_text())["alarms"]
    assert [row["event_recall_at_least"] for row in rows] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert rows[0]["event_recall"]["value"] >= 0.5 and rows[0]["lead_h"]["value"] > 1


@pytest.mark.parametrize(
    ("change", "words", "text"),
    [
        (lambda d: d.drop("po2"), [], "no plausible value of pao2"),
        (lambda d: d.with_columns(pl.col("po2") / 30), [], "values of pao2 cannot be in the concept's unit"),
        (lambda d: d.filter(pl.col("time") < timedelta(hours=10)), [], "empty after 'at least one record beyond 12 h'"),
        (lambda d: d.with_columns(po2=pl.lit(300.0)), [], "one class only"),
        (lambda d: d.with_columns(po2=pl.lit(90.0)), [], "empty after 'no onset at or before 12 h'"),
        (lambda d: d, ["--label", "berlin-oxygenation"], "no plausible value of peep"),
        (lambda d: d, ["--label", "berlin"], "unknown label 'berlin'"),
        (lambda d: d, ["--label-set", "persist=8"], "unknown label parameter 'persist'"),
        (lambda d: d, ["--mapping", "m.toml"], "takes no mapping"),
        (lambda d: d, ["--gap", "-1"], "cannot be used"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, capsys, change, words, text):
    folder = yaib(tmp_path / "eicu")
    change(pl.read_parquet(folder / "dyn.parquet")).write_parquet(folder / "dyn.parquet")
    said = refused(capsys, "prepare", "ards", "--source", "yaib", "--path", folder, "--out", tmp_path / "y", *words)
    assert text in said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["eicu"]


def test_disorder_is_put_right(tmp_path, capsys):
    """Duplicate rows, rows out of order and negative times change nothing but the counts."""
    folder = yaib(tmp_path / "eicu")
    table = pl.read_parquet(folder / "dyn.parquet")
    assert raylab("prepare", "ards", "--source", "yaib", "--path", folder, "--out", tmp_path / "a", "--quiet") == 0
    early = table.head(3).with_columns(time=pl.lit(timedelta(hours=-2)))
    pl.concat([table, table.head(5), early]).sample(fraction=1, shuffle=True, seed=0).write_parquet(
        folder / "dyn.parquet"
    )
    assert raylab("prepare", "ards", "--source", "yaib", "--path", folder, "--out", tmp_path / "b") == 0
    assert "negative time 9" in capsys.readouterr().out
    for name in ("samples.parquet", "hours.parquet"):
        a, b = (pl.read_parquet(tmp_path / d / name).sort("stay_id") for d in "ab")
        assert a.equals(b)


@pytest.mark.parametrize(("task", "label"), [("mortality", "ahrf"), ("ards", "in-hospital-death")])
def test_a_label_belongs_to_its_task(task, label, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["prepare", task, "--source", "synthetic", "--label", label, "--out", str(out)]) == 2
    assert f"unknown label '{label}'" in capsys.readouterr().err and not out.exists()


def test_an_option_of_another_kind_of_data_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--source", "synthetic", "--domain", "B", "--skip-bad", "--out", str(out)]
    assert cli.main(["prepare", "ards", *words]) == 2
    assert "unknown option of prepare ards 'domain'" in capsys.readouterr().err and not out.exists()
    assert cli.main(["prepare", "ards", "--source", "synthetic", "--patients", "0", "--out", str(out)]) == 2
    assert "prepare ards: patients: " in capsys.readouterr().err and not out.exists()
