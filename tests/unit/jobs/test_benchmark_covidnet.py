"""The tables of the COVID-Net benchmark, from results as `evaluate` and `tune` give them; its steps are done once."""

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.common import benchmark_covidnet
from jobs.common.benchmark_covidnet import Benchmark, markdown, measure_search
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
    assert [row["name"] for row in bench.networks()] == ["vgg19", "covidnet-masked"]
    assert [row["name"] for row in bench.transfers()] == ["before transfer", "scratch", "lp-ft"]
