"""Figures, the table and the page, from frames made here."""

import io
import json
import pickle
import re
import socket
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest
from PIL import Image

from raylab.tasks import TASKS
from tests.wait import wait_for
from tracking import compare, plots, report, svg
from tracking.importance import parameter_importance
from tracking.outbox import Outbox, read
from tracking.report import Extras, choose_styles, write_report
from tracking.system import NodeSampler, SystemMonitor, append_sample, open_gpus, sample


def row(name: str, task: str = "ards", **more: object) -> dict:
    known = TASKS.get(task)
    return {
        "primary": None if known is None else list(known.primary),
        "secondary": None if known is None else list(known.secondary),
        "name": name,
        "kind": "train",
        "task": task,
        "data_source": "icu",
        "synthetic": False,
        "status": "FINISHED",
        "started": datetime(2026, 1, 2, tzinfo=UTC),
        "run_id": f"{name:0>32}",
    } | more


def frame(*rows: dict) -> pl.DataFrame:
    names = dict.fromkeys(n for r in rows for n in r if n not in compare.FIXED)
    schema = compare.FIXED | {n: pl.String if n.startswith(("param/", "tag/")) else pl.Float64 for n in names}
    return pl.DataFrame([{n: r.get(n) for n in schema} for r in rows], schema=schema)


def score(value: float, name: str = "test/auroc") -> dict:
    return {name: value, f"{name}_low": value - 0.02, f"{name}_high": value + 0.02}


TABLE = """\
ards
run   kind   status    split  auroc              auprc  n    seed  run id
----  -----  --------  -----  -----------------  -----  ---  ----  --------
icu aaaaaaaa:
low   train  finished  test   0.700 [.680,.720]  -      516  0     00000000
high  train  finished  val*   0.900 [.880,.920]  0.410  -    -     00000000
mid   train  running   val*   0.800              -      -    -     00000000
none  train  finished  -      -                  -      -    -     00000000
dead  train  failed    val*   0.990              -      -    -     00000000
icu bbbbbbbb:
b     train  finished  test   0.600 [.580,.620]  -      -    -     00000000
toy cccccccc SYNTHETIC:
toy   train  finished  test   0.970 [.950,.990]  -      -    -     00000000

covidnet
run  kind      status    split  macro_recall  accuracy           n  seed  run id
---  --------  --------  -----  ------------  -----------------  -  ----  --------
covidx aaaaaaaa:
x    transfer  finished  test   0.500         0.700 [.680,.720]  -  -     00000000

* val: these scores were used to choose the model; expect lower ones on the test split

(1 trials not shown)"""


def test_the_table_ranks_within_task_and_data_set_and_shows_each_run_on_its_best_known_split() -> None:
    a = {"data_hash": "a" * 64}
    text = compare.table(
        frame(
            row("dead", status="FAILED", **a, **{"val/auroc": 0.99}),
            row("none", **a),
            row("mid", status="RUNNING", **a, **{"val/auroc": 0.8, "val/loss": 0.1}),
            row("high", **a, **score(0.9, "val/auroc"), **{"val/auprc": 0.41}),
            row("low", seed="0", **a, **score(0.7), **score(0.1, "test/brier"), **{"test/n": 516.0, "val/auroc": 1.0}),
            row("toy", synthetic=True, data_source="toy", data_hash="c" * 64, **score(0.97)),
            row("b", data_hash="b" * 64, **score(0.6)),
            row("x", kind="transfer", task="covidnet", data_source="covidx", **a, **score(0.7, "test/accuracy"))
            | {"test/macro_recall": 0.5, "test/auroc": 0.9},
            row("t1", kind="trial", **score(0.95)),
        )
    )
    assert text == TABLE


def test_the_table_fits_a_terminal() -> None:
    scored = {k: v for n in ("auroc", "auprc", "ventilated_pf/auroc") for k, v in score(0.8, f"test/{n}").items()}
    name = "ards-undisturbed-20261123-133352"
    rows = frame(row(name, **scored, **{"test/n": 5160.0}), row("second", **scored))
    assert max(map(len, compare.table(rows).splitlines())) <= 140
    narrow = compare.table(rows, 100)
    assert max(map(len, narrow.splitlines())) <= 100 and narrow.count("    auroc                0.800 [.780,.820]") == 2
    assert compare.table(rows, 200) == compare.table(rows)
    assert compare.table(frame()) == ""


OTHER_HOSPITAL = {
    "data_hash": "b" * 64,
    "data_source": "elsewhere",
    "cohort": "all",
    "kind": "evaluate",
    "tag/parent": "f" * 32,
    "tag/parent_name": "first",
}
ELSEWHERE = """\
elsewhere bbbbbbbb:
first-on-b evaluate finished all (3 reads) all 0.700 [.680,.720] 0.400 [.380,.420] 516 - 00000000
first-on-b-v evaluate finished val all 0.600 [.580,.620] - - - 00000000
icu aaaaaaaa:
benchmark-gru benchmark finished folds all 0.900 [.880,.920] - - - 00000000
first train finished val* gas 0.800 [.780,.820] - 200 - 00000000"""


def elsewhere() -> pl.DataFrame:
    a = {"data_hash": "a" * 64}
    return frame(
        row("first", cohort="gas", **a, **score(0.8, "best/val/auroc"), **{"val/auroc": 0.1, "best/val/n": 200.0}),
        row("first-on-b", **OTHER_HOSPITAL, **score(0.7, "all/auroc"), **score(0.4, "all/auprc"))
        | {"all/n": 516.0, "tag/test_reads": "3"},
        row("first-on-b-v", **OTHER_HOSPITAL, **score(0.6, "val/auroc")),
        row("benchmark", kind="benchmark", cohort="all", **a),
        row("benchmark-gru", kind="benchmark", cohort="all", parent_run_id=f"{'benchmark':0>32}", **a)
        | score(0.9, "folds/auroc"),
    )


def test_scores_elsewhere_of_folds_and_of_the_kept_epoch_have_their_rows() -> None:
    text = re.sub(r" +", " ", compare.table(elsewhere()))
    assert "run kind status split cohort auroc auprc n seed run id" in text and ELSEWHERE in text
    told = {row["name"]: row for row in compare.to_json_rows(elsewhere())}
    assert told["first-on-b"]["split"] == "all" and told["first-on-b"]["data"] == "elsewhere bbbbbbbb"
    assert (told["first-on-b"]["cohort"], told["first-on-b"]["n"], told["first-on-b"]["test_reads"]) == ("all", 516, 3)
    assert told["first-on-b"]["scores"]["auroc"] == pytest.approx({"value": 0.7, "low": 0.68, "high": 0.72})
    assert told["first"]["split"] == "val" and told["first"]["scores"]["auroc"]["value"] == 0.8


def test_the_page_shows_scores_elsewhere_with_their_cohort_and_reads(tmp_path: Path) -> None:
    page = write_report(tmp_path / "report.html", elsewhere(), {}, {}, "t").read_text()
    summary, details = page.split('<h2 id="runs">')
    assert "<td>all (3 reads)</td>" in summary and "0.700<small>[0.680, 0.720]</small>" in summary
    assert "<td>all</td>" in summary and "<td>gas</td>" in summary and "<td>folds</td>" in summary
    assert "<td>val</td>" in summary  # of other data: it has chosen nothing
    assert '<td class="val" title="used to choose the model">val</td>' in summary
    assert "0.100" not in details and "0.800 [0.780, 0.820]" in details  # the kept epoch's, not the last one's


def test_of_evaluations_of_a_model_on_one_data_set_and_split_the_newest_is_kept() -> None:
    def evaluated(name: str, day: int, **more: object) -> dict:
        return row(name, started=datetime(2026, 1, day, tzinfo=UTC), **{**OTHER_HOSPITAL, "tag/split": "all", **more})

    rows = [
        evaluated("new", 3, **score(0.7, "all/auroc")),
        evaluated("failed", 4, status="FAILED"),
        evaluated("old", 2, **score(0.6, "all/auroc")),
        evaluated("of-test", 1, **{"tag/split": "test"}, **score(0.6)),
        evaluated("elsewhere", 1, data_hash="c" * 64, **score(0.6, "all/auroc")),
        evaluated("of-another", 1, **{"tag/parent": "e" * 32}, **score(0.6, "all/auroc")),
        row("train", data_hash="b" * 64),
        row("train-again", data_hash="b" * 64),
    ]
    kept = [row["name"] for row in compare._drop_old_evaluations(rows)]
    assert kept == ["new", "of-test", "elsewhere", "of-another", "train", "train-again"]


def test_work_without_scores_has_no_columns_for_them() -> None:
    text = compare.table(frame(row("living", task="sweep", kind="simulate", rows=256.0)))
    assert text.splitlines()[1].split() == ["run", "kind", "status", "seed", "run", "id"]


def test_a_task_without_known_scores_shows_what_has_an_interval() -> None:
    shown = compare.ranked(frame(row("a", task="new", **score(0.7, "val/z"), **score(0.1, "val/k"), **{"val/y": 1.0})))
    assert compare.primary(shown.to_dicts()) == ["k", "z"] and shown["split"].to_list() == ["val"]
    assert compare.primary([]) == [] and compare.primary(compare.ranked(frame(row("b"))).to_dicts()) == []


@pytest.mark.parametrize("split", ["test", "best/val", "folds"])
def test_a_score_of_too_few_patients_says_so_in_the_table_and_on_the_page(split: str, tmp_path: Path) -> None:
    why = "too few: 2 patients with the outcome; an interval needs 10 of each"
    without = {f"tag/no_interval.{split}": json.dumps({why: ["auroc", "brier"]})}
    few = row("few", **without, **{f"{split}/auroc": 1.0, f"{split}/brier": 0.1, f"{split}/n": 4.0})
    for shown in (few, few | {f"{split}/auroc_low": 1.0, f"{split}/auroc_high": 1.0}):  # of an evaluation of long ago
        assert "1.000 (too few)" in compare.table(frame(shown, row("many", **score(0.8))))
        assert str(compare.find_score(shown, split, "auroc")) == f"1.000 ({why})"
        assert compare.scores(shown, split) == ["auroc", "brier"]
    (told,) = compare.to_json_rows(frame(few))
    assert told["scores"]["auroc"] == {"value": 1.0, "low": None, "high": None, "why": why}
    page = write_report(tmp_path / "r.html", frame(few), {}, {}, "title").read_text()
    assert (
        page.count("1.000 (too few)") == 1
        and page.count(why) == 1
        and "no_interval" not in page
        and "no interval." not in page
    )


def test_an_interval_of_some_width_never_looks_as_if_it_had_none() -> None:
    close = {"test/auroc": 0.99985, "test/auroc_low": 0.9997, "test/auroc_high": 0.9999}
    assert compare.interval(close, "test/auroc") == "0.9999 [0.9997, 0.9999]"


def test_two_runs_of_one_name_are_told_apart() -> None:
    same = frame(row("a"), row("a", run_id="b" * 32), row("c"))
    assert sorted(compare.labels(same).values()) == ["a (000000)", "a (bbbbbb)", "c"]


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "white").save(file, format="png")
    return file.getvalue()


PNG = png()


def test_the_page_stands_alone_and_is_honest(tmp_path: Path) -> None:
    runs = [
        row("real", **score(0.8), **score(0.1, "test/brier"), **score(0.6, "test/prevalence"), **{"test/n": 1000.0}),
        row("same", **score(0.7, "val/auroc"), **{"tag/parent": f"{'real':0>32}", "tag/parent_name": "real"}),
        row("toy <script>", synthetic=True, split_hash="other", **score(0.9)),
        row("s", kind="tune", **{"val/auroc": 0.8, "tag/best_run": f"{'t3':0>32}"}),
        *[
            row(
                f"t{i}",
                kind="trial",
                stopped="stopped by asha" if i < 5 else "planned",
                parent_run_id=f"{'s':0>32}",
                **{"val/auroc": 0.5 + i / 100, "param/optim.lr": str(0.1 + i)},
            )
            for i in range(7)
        ],
    ]
    curves = {"train/loss": {"real": ([1, 2], [0.5, 0.4]), "same": ([1, 2], [0.5, 0.4])}}
    told = {
        "attrition": [{"step": "all", "patients": 5000}],
        "label": {"title": "a <label>", "pf": 300.0},
        "counts": {"train": {"n": 1677}},
    }
    pictures = {"plots/val-roc.png": PNG, "plots/test-roc.png": PNG}
    extras = {runs[0]["run_id"]: Extras(pictures, told, "{}"), runs[1]["run_id"]: Extras({"plots/val-roc.png": PNG})}
    path = write_report(tmp_path / "report.html", frame(*runs), curves, extras, "A <title>")
    page = path.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page
    assert not re.search(r"url\((?!#)|@import|https?://", page) and len(page) < 2_000_000
    assert "Synthetic data." in page and "7 trials" in page and path.stat().st_mode & 0o777 == 0o600
    summary, details = page.split('<h2 id="runs">')
    assert "0.800<small>[0.780, 0.820]</small>" in summary and "<th>brier</th>" in summary
    assert "prevalence" not in summary and "<td>prevalence</td>" in details and "0.800 [0.780, 0.820]" in details
    assert '<td class="val" title="used to choose the model">val</td>' in summary and "<td>1,000</td>" in summary
    assert "5,000</td>" in summary and "1,677</td>" in summary and "a &lt;label&gt;" in summary and "300.0" not in page
    assert summary.count("stopped by asha") == 3 and "t3 (kept)" in summary and "t1<" not in summary  # the top 5
    assert f'started from</dt><dd><a href="#{"real":0>32}">real</a>' in details
    assert details.index('alt="test roc"') < details.index("Plots of the val split") < details.index('alt="val roc"')


def test_an_evaluation_elsewhere_stands_with_that_data_and_names_its_model(tmp_path: Path) -> None:
    parent = {"tag/parent": "f" * 32, "tag/parent_name": "cova", "kind": "evaluate"}
    runs = [
        row("b", task="covidnet", data_hash="b" * 64, **{"val/macro_recall": 0.7, "val/sensitivity/normal": 0.4}),
        row("a-on-b", task="covidnet", data_hash="b" * 64, **parent, **score(0.6, "test/macro_recall")),
    ]
    page = write_report(tmp_path / "report.html", frame(*runs), {}, {}, "t").read_text()
    assert page.count("<h2") == 2 and "covidnet on icu bbbbbbbb" in page
    assert "model of cova" in page and f'cova <span class="mono">{"f" * 32}</span>' in page
    assert page.index(">a-on-b<") < page.index(">b<")


def test_data_whose_name_has_changed_is_one_data_set_and_its_warnings_stand_with_the_scores(tmp_path: Path) -> None:
    a, later = {"data_hash": "a" * 64}, datetime(2026, 1, 3, tzinfo=UTC)
    runs = [
        row("old", data_source="covidx", **a, **score(0.7)),
        row("new", data_source="covidx 8", started=later, **a, **score(0.8)),
        row("unnamed", data_source="covidx", **score(0.6)),
    ]
    text = compare.table(frame(*runs))
    assert text.count("covidx 8 aaaaaaaa:") == 1 and "covidx aaaaaaaa" not in text and "\ncovidx:\n" in text
    told = "the original split is not one by place"
    extras = {run["run_id"]: Extras(data={"attrition": [], "warnings": [told]}) for run in runs[:2]}
    page = write_report(tmp_path / "r.html", frame(*runs), {}, extras, "t").read_text()
    assert page.count('<h2 id="group') == 2 and page.count(told) == 1
    assert page.index("covidx 8 aaaaaaaa</h2>") < page.index(told) < page.index('id="runs"')


def test_a_page_without_any_run_can_be_written(tmp_path: Path) -> None:
    assert "No run has a score yet" in write_report(tmp_path / "r.html", frame(), {}, {}, "empty").read_text()


DETAILS = {
    "test": {
        "calibration": [{"predicted": 0.1, "observed": 0.2, "low": 0.1, "high": 0.3, "n": 30}] * 2,
        "decision": [
            {"threshold": at, "model": {"value": 0.1, "low": None, "high": None}, "everybody": 0.05}
            for at in (0.1, 0.2)
        ],
        "cohorts": {"gas": {"n": 20, "positives": 5, "auroc": {"value": 0.66, "low": 0.6, "high": 0.7}}},
    }
}


def test_a_model_has_one_colour_and_its_scores_elsewhere_are_beside_its_own(tmp_path: Path) -> None:
    a, b = {"data_hash": "a" * 64}, {"data_hash": "b" * 64}
    rows = [
        row("gru", **a, **score(0.8)),
        row("lstm", **a, **score(0.7)),
        row("lstm-on-b", kind="evaluate", **b, **{"tag/parent": f"{'lstm':0>32}", "tag/parent_name": "lstm"})
        | score(0.6, "all/auroc"),
        row("other", **b, **score(0.65)),
    ]
    shown = compare.ranked(frame(*rows))
    styles = choose_styles(shown)
    own, elsewhere = styles[rows[1]["run_id"]], styles[rows[2]["run_id"]]
    assert own == elsewhere and len({styles[r["run_id"]] for r in rows}) == 3
    extras = {r["run_id"]: Extras(details=DETAILS) for r in rows[:2]}
    curves = {"val/auroc": {"lstm": ([1, 2], [0.5, 0.6]), "gru": ([1, 2], [0.6, 0.7])}}
    page = write_report(tmp_path / "r.html", frame(*rows), curves, extras, "t").read_text()
    assert '<td>gas/auroc</td><td class="score">0.660 [0.600, 0.700]</td>' in page
    external = page.split('id="external"')[1].split('id="runs"')[0]
    assert external.index("0.700") < external.index("0.600") and "own data" in external and "other data" in external
    assert ">gru<" not in external and "other</td>" not in external
    for figure in re.findall(r'<svg role="img" aria-label="(?:Calibration|Decision curves|val/auroc).*?</svg>', page):
        lines = re.findall(r"stroke: (#[0-9a-f]{6})", figure)
        assert styles[rows[0]["run_id"]][0].lower() in lines and own[0].lower() in lines
    assert page.count('aria-label="Calibration, test split: ards on icu aaaaaaaa"') == 1
    assert page.count('aria-label="Decision curves, test split: ards on icu aaaaaaaa"') == 1


def test_the_page_stays_small_and_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (150, 150, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format="png")
    runs = [row(f"r{k}", **score(0.7)) for k in range(4)]
    extras = {r["run_id"]: Extras({"plots/test-roc.png": file.getvalue(), "plots/test-x.png": b"text"}) for r in runs}
    without = len(write_report(tmp_path / "r.html", frame(*runs), {}, {}, "t").read_text())
    monkeypatch.setattr(report, "PAGE_BYTES", without + 60_000)
    page = write_report(tmp_path / "r.html", frame(*runs), {}, extras, "t").read_text()
    kept = page.count("data:image/png")
    assert 0 < kept < 4 and f"{4 - kept} plot" in page and len(page) < without + 61_000


def test_the_page_has_colours_for_dark_screens_and_light_ones_in_print(tmp_path: Path) -> None:
    page = write_report(
        tmp_path / "r.html", frame(row("a", **score(0.7)), row("b", **score(0.6))), {}, {}, "t"
    ).read_text()
    assert "@media screen and (prefers-color-scheme: dark)" in page and "@media print" in page
    (figure,) = re.findall(r"<svg.*?</svg>", page)
    assert "var(--ink)" in figure and "#000000" not in figure and ">auroc, 95% CI</text>" in figure


def test_equal_figures_are_equal_text_and_names_are_escaped() -> None:
    curve = {"a <b>": ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])}
    one, other = (svg.draw(plots.learning(curve, "x"), 'a "name" <b>') for _ in range(2))
    assert one == other and 'aria-label="a &#34;name&#34; &lt;b&gt;"' in one and "<b>" not in one
    assert "0.812 [0.760, 0.861]" in svg.draw(plots.forest(["a"], [0.812], [0.76], [0.861], "auroc"), "")


def test_a_long_name_leaves_room_for_its_plot() -> None:
    """The name that an evaluation on other data has by itself."""
    name = "shapes-on-theirs-532e6de694cf-20261127-110828-a2d3"
    figure = plots.forest([name, "b"], [0.5, 0.6], [0.4, None], [0.6, None], "auroc", "auroc: covidnet on synthetic")
    figure.draw_without_rendering()
    axes = figure.axes[0].get_window_extent()
    title = figure.axes[0].title.get_window_extent()
    assert axes.width > 0.4 * figure.bbox.width and title.x1 < figure.bbox.width
    ticks = [label.get_window_extent() for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert all(one.x1 < two.x0 for one, two in pairwise(ticks))
    logarithmic = svg.draw(plots.search({"lr": ["1e-5", "1e-1"]}, [0.5, 0.6], [True, False], "val/auroc"), "")
    ElementTree.fromstring(logarithmic)
    assert re.search(
        r'transform="translate[^>]*><text><tspan [^>]*>1</tspan><tspan [^>]*>0</tspan>', logarithmic
    )  # 10^k


def test_importance_finds_the_parameter_that_matters() -> None:
    random = np.random.default_rng(0)
    lr, width = 10 ** random.uniform(-4, -1, 30), random.choice(["8", "16"], 30)
    found = parameter_importance(
        {"lr": lr.astype(str).tolist(), "width": width.tolist(), "fixed": [1] * 30}, np.log(lr)
    )
    assert set(found) == {"lr", "width"} and found["lr"] > 0.9 and sum(found.values()) == pytest.approx(1)
    kinds = parameter_importance({"model": ["a", "b"] * 5}, [0.5, 0.7] * 4 + [0.5, float("nan")])
    assert kinds == {"model": pytest.approx(1)}
    assert parameter_importance({"lr": [1, 2, 3]}, [0.1, 0.2, 0.3]) == {}  # too few trials
    assert parameter_importance({"lr": [1, 2, 3, 4]}, [0.1] * 4) == {}
    assert parameter_importance({}, [0.1, 0.2, 0.3, 0.4]) == {}


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.random(300) < 0.2
    return labels, np.clip(0.3 * labels + random.normal(0.3, 0.2, 300), 0, 1)


@pytest.mark.parametrize("draw", [plots.roc, plots.precision_recall, plots.calibration])
def test_curves_of_a_binary_label(draw, labelled, tmp_path: Path) -> None:
    figure = draw(*labelled, synthetic=True)
    assert "SYNTHETIC" in figure.axes[0].get_title()
    figure.savefig(tmp_path / "f.png")


def test_the_other_figures_draw_odd_input(tmp_path: Path) -> None:
    figures = [
        plots.confusion([[5, 0, 1], [0, 0, 0], [2, 2, 2]], ["a", "b", "c"]),
        plots.learning({f"r{i}": ([1], [float("nan")]) for i in range(9)}, "train/loss"),
        plots.learning({"a" * 40: ([1, 2], [1, 0])}, "train/loss"),
        plots.forest(["a", "b"], [0.5, 0.6], [0.4, None], [0.6, None], "AUROC"),
        plots.forest(["a", "b"], [0.5, 0.6], [0.4, None], [0.6, None], "AUROC", splits=["val", "test"]),
        plots.search({"lr": ["1e-5", "1e-1"], "model": ["gru", None]}, [0.5, 0.6], [True, False], "val/auroc"),
        plots.search({}, [], [], "val/auroc"),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "f.png")


def test_wilson_agrees_with_the_book() -> None:
    low, high = plots.wilson([0.0, 0.5, 1.0], [10, 10, 10])
    np.testing.assert_allclose(low, [0.0, 0.2366, 0.7225], atol=1e-3)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1.0], atol=1e-3)


def test_the_system_is_sampled_under_mlflows_names(tmp_path: Path) -> None:
    assert 0 < sample()["system_memory_usage_percentage"] <= 100
    monitor = SystemMonitor(Outbox(tmp_path), interval=0.02)
    wait_for(lambda: list(read(tmp_path)), 60, "a sample")
    monitor.stop()
    first = next(record for _, record in read(tmp_path) if record)
    assert "system/cpu_utilization_percentage" in first["values"]


def test_other_nodes_are_sampled_under_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = NodeSampler(interval=0)
    assert sampler() == sampler() == {}, "SystemMonitor samples the node of the verb"
    monkeypatch.setattr(socket, "gethostname", lambda: "n7")
    there = pickle.loads(pickle.dumps(sampler))
    assert there() == {}, "utilisation is of a time between two calls"
    values = there()
    assert values["n7.system_memory_usage_percentage"] > 0 and "n7.cpu_utilization_percentage" in values
    append_sample(Outbox(tmp_path), values)
    record = next(record for _, record in read(tmp_path) if record)
    assert "system/n7.system_memory_usage_percentage" in record["values"] and record["step"] == 0
    there.interval = 3600
    assert there() == {}, "the interval has not passed"


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_its_metrics_are_absent() -> None:
    assert open_gpus()() == {}
