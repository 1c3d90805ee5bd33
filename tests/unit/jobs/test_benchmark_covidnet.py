"""The tables of the COVID-Net benchmark, from results as `evaluate` and `tune` give them; its steps are done once."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.common import benchmark_covidnet, predictions
from jobs.common.benchmark_covidnet import Benchmark, markdown, measure_search
from jobs.common.predictions import KeptPredictions
from raylab.errors import UsageError
from raylab.files import write_json


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def scored(name: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "split": "test", "n": 9, "macro_recall": score(0.8), "minus_border": score(0.05),
        "ece": score(0.1),
        "sensitivity/normal": score(0.7), "sensitivity/pneumonia": {"value": None, "why": "no row"},
        "sensitivity/COVID-19": score(0.9),
        "within_source": [{"source": "nih", "classes": ["pneumonia", "normal"], "auroc": score(0.6), "border": None}],
        **more,
    }  # fmt: skip


def test_the_tables_hold_controls_and_published_figures() -> None:
    attrition = [{"step": "listed", "images": 5}, {"step": "without copies", "images": 3}]
    data = {"folder": "x", "counts": {"train": {"normal": 3}}, "attrition": attrition}
    data |= {"differs": ["train: 3 normal, the lecture counts 198"]}
    result = {
        "size": 64, "epochs": 2, "trials": 3, "data": {"a": data}, "networks": [scored("vgg19")],
        "transfer": [scored("lp-ft", seed=1)],
        "schedulers": [{"name": "asha", "best_val": 0.7, "hours": 0.5, "seconds_to_best": 9.0, "score": scored("s")}],
        "scaling": [{"workers": 1, "samples_per_s": 10.0}, {"workers": 2, "samples_per_s": 15.0}],
    }  # fmt: skip
    text = markdown(result)
    assert "| vgg19 | test | 9 | 0.800 [0.700, 0.900] | 0.050 [-0.050, 0.150] | 0.70/-/0.90 |" in text
    assert "nih pneumonia from normal 0.60 [0.50, 0.70]" in text and "| 83.0 |" in text
    assert "lp-ft, seed 1" in text and "the lecture counts 198" in text and "without copies: 3 images" in text
    assert "| asha | 0.700 | 0.50 | 9 | 0.800 [0.700, 0.900] (test) |" in text and "| 2 | 15.0 | 1.50 |" in text


def test_what_a_search_spent(tmp_path: Path) -> None:
    for number, (begin, end, objective) in enumerate(
        [(100, 160, 0.5), (110, 200, 0.4), (120, 300, 0.7), (130, 310, None)]
    ):
        folder = tmp_path / "trials" / f"{number:03d}"
        folder.mkdir(parents=True)
        write_json(folder / "params.json", {})
        write_json(folder / "end.json", {"how": "planned", "objective": objective})
        os.utime(folder / "params.json", (begin, begin))
        os.utime(folder / "end.json", (end, end))
    found = measure_search(tmp_path)
    assert found["curve"] == [(60, 0.5), (200, 0.7)] and found["seconds_to_best"] == 200
    assert found["hours"] == pytest.approx((60 + 90 + 180 + 180) / 3600)
    os.utime(tmp_path / "trials" / "000" / "end.json", (40, 40))
    assert measure_search(tmp_path)["hours"] == pytest.approx((90 + 180 + 180) / 3600), "its clock was set back"


def test_a_step_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    bench = Benchmark(argparse.Namespace(size=64, epochs=1, set=[], quiet=True), tmp_path)
    calls = []
    for _ in range(2):
        assert bench.step("one", lambda: {"call": calls.append(1) or len(calls)}) == {"call": 1}


def test_a_benchmark_needs_its_data() -> None:
    args = argparse.Namespace(parts=["networks"], path=None)
    with pytest.raises(UsageError, match="--path"):
        benchmark_covidnet.main(args)
    with pytest.raises(UsageError, match="unknown part 'network'"):
        benchmark_covidnet.main(argparse.Namespace(parts=["network"], path=None))


def test_rows_are_called_by_what_they_are_and_not_by_their_run(tmp_path: Path) -> None:
    """A step gives what `evaluate` gives, the run's name among it."""
    (tmp_path / "steps").mkdir()
    args = argparse.Namespace(size=64, epochs=1, set=[], quiet=True, seeds=1, networks=["vgg19"])
    bench = Benchmark(args, tmp_path)
    bench.evaluate_run = lambda name, run, data: scored(f"out-{name}")  # type: ignore[method-assign]
    bench.run = lambda name, verb, *words: {"name": f"out-{name}"}  # type: ignore[method-assign]
    variants = ["covidnet-masked", "covidnet-lungs", "covidnet-erased"]
    assert [row["name"] for row in bench.networks()] == ["vgg19", *variants]
    whole = ["before transfer", "scratch", "lp-ft", "full", "probe", "lp-ft, batch norm of A"]
    assert [row["name"] for row in bench.transfers()] == [
        *whole, *(f"{name}{suffix}" for suffix in ("-lungs", "-erased") for name in whole[:4])
    ]  # fmt: skip


def test_gains_are_means_over_the_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two seeds one finds two classes, the other those and most of the third; the runs from scratch find one."""
    y = np.repeat([0, 1, 2], 30)
    most = np.where(np.arange(90) < 80, y, 0)
    most, two, one = np.eye(3)[most], np.eye(3)[np.minimum(y, 1)], np.eye(3)[np.zeros_like(y)]
    p = {"full-0": most, "full-1": two, "scratch-0": one, "scratch-1": one}
    monkeypatch.setattr(benchmark_covidnet, "read_meta", lambda *_: SimpleNamespace(data_hash="d"))
    monkeypatch.setattr(
        predictions, "read", lambda run, *_: KeptPredictions(y, p[run.name], np.arange(90), "rows", list("abc"))
    )
    bench = Benchmark(argparse.Namespace(size=64, epochs=1, set=[], quiet=True, seeds=2), tmp_path)
    recalls = {"full-0": 8 / 9, "full-1": 2 / 3, "scratch-0": 1 / 3, "scratch-1": 1 / 3}
    rows = [
        {"name": name, "seed": seed, "run": f"{name}-{seed}", "split": "val", "against": "scratch",
         "macro_recall": {"value": recalls[f"{name}-{seed}"]}}
        for name in ("scratch", "full") for seed in (0, 1)
    ]  # fmt: skip
    nothing, gain = bench.gains([{"name": "before transfer", "macro_recall": {"value": 0.1}}, *rows])
    assert nothing["gain"]["value"] == 0 and gain["gain"]["value"] == pytest.approx(4 / 9)
    assert gain["name"] == "full" and gain["macro_recall"] == [8 / 9, 2 / 3]
    data = {"folder": "x", "counts": {}, "attrition": [], "differs": []}
    result = {"size": 64, "epochs": 2, "trials": 3, "data": {"a": data}, "gains": [nothing, gain]}
    assert "| full | 0.778 | 0.889, 0.667 | +0.444 [+0.4" in markdown(result)
    assert "| scratch | 0.333 | 0.333, 0.333 |  |" in markdown(result)
