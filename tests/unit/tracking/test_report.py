"""Figures, the table and the page, from frames made here."""

import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tracking import compare, plots
from tracking.outbox import Outbox, read
from tracking.report import Extras, write_report
from tracking.system import SystemMonitor, sample


def row(name: str, **more: object) -> dict:
    return {
        "name": name,
        "kind": "train",
        "task": "ards",
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


def test_the_table_is_ranked_within_task_and_data_and_leaves_trials_out() -> None:
    text = compare.table(
        frame(
            row("low", **score(0.7)),
            row("high", **score(0.9)),
            row("none"),
            row("toy", synthetic=True, **score(0.99)),
            row("t1", kind="trial", **score(0.95)),
        )
    )
    lines = text.splitlines()
    assert [line.split()[2] for line in lines[2:5]] == ["high", "low", "none"]
    assert "0.900 [0.880, 0.920]" in lines[2] and "SYNTHETIC" in lines[5] and "1 trials not shown" in lines[6]


def test_scores_prefer_the_test_split() -> None:
    assert compare.scores(frame(row("a", **{"val/auroc": 0.8}))) == ["val/auroc"]
    both = frame(row("a", **{"val/auroc": 0.8}, **score(0.7), **score(0.2, "test/brier")))
    assert compare.scores(both) == ["test/auroc", "test/brier"]
    assert compare.scores(frame(row("a"))) == []


def test_two_runs_of_one_name_are_told_apart() -> None:
    same = frame(row("a"), row("a", run_id="b" * 32), row("c"))
    assert sorted(compare.labels(same).values()) == ["a (000000)", "a (bbbbbb)", "c"]


def test_the_page_stands_alone_and_is_honest(tmp_path: Path) -> None:
    runs = [
        row("real", **score(0.8), **{"test/n": 100.0, "test/positives": 9.0, "param/optim.lr": "0.1"}),
        row("toy <script>", synthetic=True, split_hash="other", **score(0.9)),
        *[
            row(
                f"t{i}", kind="trial", parent_run_id="p", **{"val/auroc": 0.5 + i / 10, "param/optim.lr": str(10.0**-i)}
            )
            for i in range(4)
        ],
    ]
    curves = {"train/loss": {"real": ([1, 2], [0.5, 0.4])}}
    extras = {runs[0]["run_id"]: Extras({"plots/roc.png": b"png"}, [{"step": "all", "patients": 5}], "{}")}
    path = write_report(tmp_path / "report.html", frame(*runs), curves, extras, "A <title>")
    page = path.read_text()
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "<script" not in page and "url(" not in page
    assert "Synthetic data." in page and "0.800 [0.780, 0.820]" in page and "<td>100</td><td>9</td>" in page
    assert "4 trials" in page and "patients</th>" in page and "<strong>test</strong>" in page
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_page_without_any_run_can_be_written(tmp_path: Path) -> None:
    assert "No run has a score yet" in write_report(tmp_path / "r.html", frame(), {}, {}, "empty").read_text()


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
        plots.forest(["a", "b"], [0.5, 0.6], [0.4, None], [0.6, None], "AUROC"),
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
    assert sample()["system_memory_usage_megabytes"] > 0
    monitor = SystemMonitor(Outbox(tmp_path), interval=0.02, node="n1")
    while not list(read(tmp_path)):
        pass
    monitor.stop()
    first = next(record for _, record in read(tmp_path) if record)
    assert "system/n1/cpu_utilization_percentage" in first["values"]
