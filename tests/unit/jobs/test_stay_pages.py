"""Pages of single stays: what they say, that they are private, and that pages of real patients need a flag."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jobs import cli
from jobs.common.stay_pages import Ward, describe, nice_ticks, risk_top, spread, words, write_index, write_page
from raylab.data.icu.concepts import CONCEPTS
from raylab.data.icu.meta import IcuMeta
from raylab.evaluation.stay_course import Course, Moment, Push, Reading
from raylab.score import Score
from tests.unit.jobs.test_ards_cli import yaib
from tracking.provenance import Provenance, read_provenance

LABEL = {"onset": "first P/F <= 300", "title": "AHRF", "population": "adults", "at_risk": "no onset before 12 h"}
META = IcuMeta.model_construct(
    label=LABEL, landmark_h=12, horizon_h=24, gap_h=0, until_h=48, synthetic=True, source="synthetic", raylab="0",
    counts={"train": {"n": 100, "positive": 16, "patients": 9}},
)  # fmt: skip
SHARE = Score(value=0.5, low=0.3, high=0.7)
ORIGIN = (Provenance(name="<b>run</b>", recipe={"seed": 1}),)
WARD = Ward("<b>run</b>", "gru", "rolling", "val", META, 0.4, "given", SHARE, SHARE, 2, 1.0, ORIGIN)


def course(onset: float | None = 20.5, alarms: tuple[int, ...] = (14, 18), ahead: bool = True) -> Course:
    at = np.arange(12.0, 21)
    moved = (
        Push("pf", np.log(1.8), Reading(310.0, 9.5), Reading(240.0, 13.3)),
        Push("fio2", -0.2, Reading(), Reading(0.4, 13.3)),
        Push("lactate", 0.1, Reading(2.0, 1.0), Reading()),
    )
    return Course(
        stay_id="secret-17",
        at=at,
        risk=np.linspace(0.1, 0.6, 9),
        alarm=np.isin(at, alarms),
        ahead=np.full(9, ahead),
        onset_h=onset,
        outcome="onset",
        moments=(Moment(14.0, 0.5, True, 12.0, 0.1, moved, -0.1),),
        readings={"pf": (np.array([9.5, 13.3, 20.5]), np.array([310.0, 240.0, 180.0]))},
        static={"age": 61.0, "sex": 1.0},
    )


def test_a_page_says_when_what_and_why(tmp_path):
    line = write_page(tmp_path / "stay-1.html", course(), 1, WARD)
    write_index(tmp_path / "index.html", [line], WARD)
    for page in ("stay-1.html", "index.html"):
        assert read_provenance(tmp_path / page) == ORIGIN
    page, index = ((tmp_path / name).read_text() for name in ("stay-1.html", "index.html"))
    for text in ("Onset at 20.5 h", "at 14 h, 6.5 h before it", "310 → 240 mmHg", "13.3 h (0.7 h before)", "× 1.80",
                 "40 %, first value", "no usable value any more (2 mmol/L before)", "200: moderate", "61 years", "male",
                 "Never measured in this stay", "average risk 16%", "Synthetic patient",
                 "first P/F &lt;= 300"):  # fmt: skip
        assert text in page, text
    assert page.count('<path class="flag"') == 3, "two alarms and the key"
    assert 'href="stay-1.html"' in index and "6.5 h" in index
    for text in (page, index):
        assert "secret-17" not in text and "<b>run" not in text and "&lt;b&gt;run" in text
        assert not re.search(r"<script|https?:|src=|url\(|@import", text), "offline"
        assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("onset", "alarms", "ahead", "said"),
    [
        (None, (), False, "There was no alarm."),
        (None, (14,), False, "one alarm, at 14 h, and no onset followed it"),
        (None, (14, 18), False, "2 alarms, and no onset followed any"),
        (20.5, (), True, "no alarm before it"),
        (60.0, (14, 18), False, "All 2 came more than 24 h before the onset: too early"),
        (60.0, (14,), False, "The only alarm came at 14 h, more than 24 h before the onset: too early"),
    ],
)
def test_the_headline(onset, alarms, ahead, said):
    assert said in " ".join(describe(course(onset, alarms, ahead), WARD))


def test_drawings():
    assert risk_top(0.11) == 0.2 and risk_top(0.99) == 1.0
    assert nice_ticks(65, 103) == [70, 80, 90, 100] and len(nice_ticks(7.3, 7.45)) in (2, 3, 4)
    assert spread([(50, "b", ""), (45, "a", "")]) == [(45, "a", ""), (58, "b", "")]
    assert words("fio2", 0.405) == "40.5 %" and words("mech_vent", 1.0) == "yes" and words("vp_shunt", 0.123) == "0.12"
    assert words("compliance", 38.8) == "38.8 mL/cmH₂O"
    assert all(concept.title for concept in CONCEPTS.values())
    assert len({concept.title for concept in CONCEPTS.values()}) == len(CONCEPTS)


def raylab(*given: object) -> int:
    return cli.main([str(word) for word in given])


def test_explain_writes_pages_of_real_stays_only_on_request(tmp_path, monkeypatch, capsys, ards_data):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    data = tmp_path / "rolling"
    prepare = ("prepare", "ards", "--source", "yaib", "--path", yaib(tmp_path / "raw"), "--out", data, "--quiet")
    assert raylab(*prepare, "--rolling", "--until", 22) == 0
    small = ("--smoke", "--set", "loop.epochs=1", "model.hidden=4", "--workers", 0, "--quiet")
    assert raylab("train", "ards", "--data", data, "--name", "roll", *small) == 0
    capsys.readouterr()
    explain = ("explain", "ards", "--run", "roll", "--data", data, "--rows", 4, "--json", tmp_path / "explain.json")
    for options, why in (
        (("--pages",), "--share-individuals"),
        (("--pages", -1, "--share-individuals"), "from 1"),
        (("--pages", "--share-individuals", "--threshold", 2), "not a probability"),
        (("--threshold", 0.5), "add --pages"),
    ):
        assert raylab(*explain, *options) == 2 and why in capsys.readouterr().err
        assert not (tmp_path / "home/runs/roll/individuals").exists() and not (tmp_path / "explain.json").exists()
    assert raylab("explain", "ards", "--run", "roll", "--data", ards_data, "--pages") == 2
    assert "one prediction per stay" in capsys.readouterr().err

    assert raylab(*explain, "--pages", 3, "--share-individuals") == 0
    folder = Path(json.loads((tmp_path / "explain.json").read_text())["pages"]).parent
    pages = sorted(folder.glob("stay-*.html"))
    assert folder == tmp_path / "home/runs/roll/individuals/stays" and len(pages) == 3
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600} and folder.stat().st_mode & 0o77 == 0
    assert "A real patient" in pages[0].read_text() and "recalls 80% of the onsets" in pages[0].read_text()
    stay = (folder / "stays.csv").read_text().splitlines()[1].split(",")[1]
    outbox = (tmp_path / "home/runs/roll/outbox/outbox.jsonl").read_text()
    assert "individuals" not in outbox and "stay-" not in outbox
    assert raylab(*explain, "--pages", "--share-individuals", "--stay", stay, "--threshold", 0.5) == 0
    assert [file.name for file in folder.glob("stay-*.html")] == ["stay-1.html"]
    assert "given on the command line" in (folder / "index.html").read_text()
