"""The scaling benchmark: the model's arithmetic, its points in this process, and what it refuses."""

import json
import re
from argparse import Namespace

import pytest

from jobs import cli
from jobs.common import benchmark_scaling, scaling_figures, scaling_points, scaling_report
from jobs.common.scaling_model import Network, StepModel, Sum, busiest_samples, fit_network
from jobs.common.scaling_points import Point, check_undisturbed, choose_steps, mean_score, measure
from raylab.config.overrides import override
from raylab.data.sampler import shards_of
from raylab.errors import RunError, UsageError
from raylab.tasks.recipes import shipped_recipe
from raylab.training.process_group import ProcessGroup

RECIPE = override(shipped_recipe("ards", smoke=True), {"loop.shards": 4, "loop.checkpoint_steps": None})
TRUE = Network(alpha=2e-5, beta=1e-9, error=0.0)


def test_the_constants_of_a_network_are_found_again():
    sums = [Sum(n, size, TRUE.sum_seconds(n, size)) for n in (2, 4, 8) for size in (1_000, 100_000, 40_000_000)]
    found = fit_network(sums)
    assert found is not None
    assert found.alpha == pytest.approx(TRUE.alpha, rel=1e-6) and found.beta == pytest.approx(TRUE.beta, rel=1e-6)
    assert found.error < 1e-9


def test_neither_constant_is_negative_and_the_error_says_how_far_off_the_fit_is():
    found = fit_network([Sum(2, 1_000, 1e-3), Sum(2, 100_000_000, 0.5e-3)])
    assert found is not None and found.alpha > 0 and found.beta == 0 and 0.2 < found.error < 1


@pytest.mark.parametrize("sums", [[], [Sum(1, 8, 0.1), Sum(1, 80, 0.1)], [Sum(2, 8, 0.1), Sum(4, 8, 0.2)]])
def test_without_two_sizes_between_workers_there_is_no_network(sums):
    assert fit_network(sums) is None


@pytest.mark.parametrize(("batch", "shards", "workers"), [(64, 4, 1), (64, 4, 3), (30, 4, 4), (7, 5, 2), (64, 64, 64)])
def test_the_busiest_worker_is_that_of_the_loop(batch, shards, workers):
    _, rows = shards_of(0, 1000, batch, shards, seed=0)
    group = ProcessGroup()
    group.size = workers
    most = max(sum(len(rows[shard]) for shard in group.own_shards(shards, rank)) for rank in range(workers))
    assert busiest_samples(batch, shards, workers) == most


def test_the_model_interpolates_computation_and_never_goes_beyond_what_was_measured():
    model = StepModel({64: 0.64, 4: 0.10}, TRUE, gradient=1_000_000)
    assert model.step_seconds(1, 64) == pytest.approx(0.64)
    assert model.step_seconds(2, 34) == pytest.approx(0.37 + 2 * TRUE.alpha + 1e-3)
    assert model.covers(4) and model.covers(64) and not model.covers(3) and not model.covers(72)


def test_a_worker_with_a_few_samples_more_than_the_batch_takes_longer_in_proportion():
    model = StepModel({64: 0.64, 4: 0.10}, TRUE, gradient=0)
    assert model.covers(66) and model.step_seconds(1, 66) == pytest.approx(0.66)


def test_steps_that_end_an_epoch_are_not_measured():
    assert choose_steps(1000, 3) == [11, 12, 13]
    assert choose_steps(3, 4) == [11, 13, 14, 16]
    assert choose_steps(2, 3) == [11, 13, 15]


def test_the_interval_of_a_mean_holds_it():
    score = mean_score([1.0, 2.0, 3.0, 10.0])
    assert score.value == 4.0 and score.low is not None and score.high is not None
    assert 1.0 <= score.low < 4.0 < score.high <= 10.0


def test_a_point_is_measured_in_this_process(ards_data, tmp_path):
    point = measure(RECIPE, ards_data, tmp_path, 124, 100, 3, "process")
    assert (point.workers, point.steps, point.nodes, point.sums) == (0, 3, 1, {})
    assert point.batch == point.busiest == RECIPE.loop.global_batch_size
    parts = point.parts
    assert point.seconds == pytest.approx(parts.seconds)
    assert parts.communication == parts.waiting == 0.0 and parts.compute > 0 and parts.input > 0 and parts.cpu > 0
    with pytest.raises(RunError, match="on 2 worker"):
        check_undisturbed(tmp_path, [], 2)


def point(scaling: str, workers: int, batch: int, seconds: float, **more) -> Point:
    fields = {
        "shards": 4, "busiest": batch if scaling != "strong" else batch // workers, "steps": 20,
        "step": {"value": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds},
        "parts": {
            "compute": 0.8 * seconds, "communication": 0.1 * seconds, "waiting": 0.05 * seconds,
            "input": 0.05 * seconds, "cpu": seconds, "joules": {},
        },
        "cores": 2, "cores_used": max(1, workers), "nodes": 1, "load": 0.1, "sums": {},
    }  # fmt: skip
    return Point.model_validate({"scaling": scaling, "workers": workers, "batch": batch, **fields, **more})


SUMS = {size: TRUE.sum_seconds(2, size) for size in (400, 40_000)}
POINTS = [
    point("process", 0, 64, 0.64),
    point("process", 0, 16, 0.16),
    point("process", 0, 4, 0.04),
    point("strong", 1, 64, 0.64),
    point("strong", 2, 64, 0.40, sums=SUMS),
    point("strong", 4, 64, 0.50, sums={size: TRUE.sum_seconds(4, size) for size in SUMS}),
    point("weak", 2, 128, 0.80, busiest=64, sums=SUMS),
]


def test_rates_cost_and_errors_of_the_points():
    recipe = override(RECIPE, {"loop.global_batch_size": 64})
    result = scaling_report.summarise(recipe, 10_000, True, POINTS)
    rows = {(row["scaling"], row["workers"], row["batch"]): row for row in result["points"]}
    two = rows["strong", 2, 64]
    assert two["samples_per_s"] == pytest.approx(160) and two["speed_up"] == pytest.approx(1.6)
    assert two["efficiency"] == pytest.approx(0.8)
    assert two["core_hours_per_million"] == pytest.approx(2 * 0.40 / 64 * 1e6 / 3600)
    assert rows["weak", 2, 128]["efficiency"] == pytest.approx(0.8)
    assert rows["process", 0, 64]["efficiency"] is None
    # the computation of 32 samples, interpolated: 0.8 + 0.05 of 0.32 s, and one sum
    assert two["model_error"] == pytest.approx((0.85 * 0.32 + TRUE.sum_seconds(2, 40_000)) / 0.40 - 1)
    assert rows["strong", 4, 64]["shares_cores"] and not two["shares_cores"]
    assert result["largest_error"] == pytest.approx(
        max(abs(two["model_error"]), abs(rows["weak", 2, 128]["model_error"]))
    )
    most = max(row["workers"] for row in result["modelled"] if row["scaling"] == "strong")
    assert most == 16, "no worker of the model has fewer samples than were measured"
    assert max(row["workers"] for row in result["modelled"] if row["scaling"] == "weak") == 64
    assert any("4 workers shared 2 cores" in note for note in result["notes"])
    assert any("energy of the processors was not measured" in note for note in result["notes"])


def test_energy_is_given_where_it_was_measured():
    measured = [p.model_copy(update={"parts": p.parts.model_copy(update={"joules": {"cpu": 3.6}})}) for p in POINTS]
    result = scaling_report.summarise(RECIPE, 10_000, False, measured)
    assert result["points"][0]["kwh_per_million"] == {"cpu": pytest.approx(3.6 / 3.6e6 / 64 * 1e6)}
    assert not any("energy of the processors" in note for note in result["notes"])


def test_the_report_needs_nothing_else_and_says_what_is_a_model(tmp_path):
    result = scaling_report.summarise(override(RECIPE, {"loop.global_batch_size": 64}), 10_000, True, POINTS)
    scaling_report.write(result, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "<title>raylab report" in page
    assert "Synthetic data" in page and "dashed: the model" in page and "off the measured sums" in page
    assert "VGG-16 68%" in page and "32 12%" in page and "Diagnostics 2023" in page
    assert json.loads((tmp_path / "table.json").read_text())["points"][4]["workers"] == 2
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(POINTS) + 1
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "throughput.png", "efficiency.png", "parts.png", "sums.png"
    }  # fmt: skip


def test_sums_that_hardly_differ_have_labels_and_no_bandwidth():
    points = [*POINTS[:4], point("strong", 2, 64, 0.40, sums={400: 4e-4, 40_000: 3e-4})]
    result = scaling_report.summarise(override(RECIPE, {"loop.global_batch_size": 64}), 10_000, True, points)
    (axes,) = scaling_figures.draw(result)["sums"].axes
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_text()]
    assert len(shown) >= 2
    assert "no measurable time for bytes" in scaling_report.describe_model(result)


def test_one_worker_alone_has_no_model(tmp_path):
    result = scaling_report.summarise(RECIPE, 10_000, True, POINTS[:4])
    assert result["network"] is None and result["modelled"] == [] and result["largest_error"] is None
    assert any("there is no model" in note for note in result["notes"])
    scaling_report.write(result, tmp_path)
    assert not (tmp_path / "sums.png").exists()


def test_the_places_of_a_plan():
    recipe = override(RECIPE, {"loop.global_batch_size": 64})
    names = [(place.name, place.batch, place.shards) for place in benchmark_scaling.list_places(recipe, [1, 2], 640)]
    assert names == [
        ("process-64", 64, 4), ("process-16", 16, 1), ("process-4", 4, 1), ("strong-1", 64, 4), ("strong-2", 64, 4),
        ("weak-2", 128, 8),
    ]  # fmt: skip
    places = benchmark_scaling.list_places(recipe, [1], 641)  # a last batch of one sample
    assert [place.name for place in places] == ["process-64", "strong-1"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--workers", "0"], "there is nothing to compare"),
        (["--workers", "-1"], "there is nothing to compare"),
        (["--workers", "1", "--steps", "1"], "there is nothing to compare"),
        (["--workers", "1", "8"], "weak scaling to 8 worker(s) needs more than"),
        (["--set", "model.name=logistic"], "the model logistic is fitted at once"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    words, problem, ards_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    assert (
        cli.main(["benchmark", "scaling", "ards", "--data", str(ards_data), "--smoke", "--out", str(out), *words]) == 2
    )
    assert problem in capsys.readouterr().err
    assert not (out / "plan.json").exists()


def test_a_directory_of_another_plan_is_refused_and_finished_points_are_not_measured_again(
    ards_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    out = tmp_path / "out"
    words = ["benchmark", "scaling", "ards", "--data", str(ards_data), "--smoke", "--workers", "1", "--out", str(out)]
    args = Namespace(task="ards", set=[], seed=None, smoke=True, steps=20, workers=[1])
    plan, workers = benchmark_scaling.make_plan(args, ards_data)
    (out / "points").mkdir(parents=True)
    for place in benchmark_scaling.list_places(benchmark_scaling.parse_recipe(plan.recipe), workers, plan.samples):
        finished = point(place.scaling, place.workers, place.batch, place.batch / 100)
        (out / "points" / f"{place.name}.json").write_text(json.dumps(finished.to_json()))
    monkeypatch.setattr(scaling_points, "measure", None)
    assert cli.main(words) == 0
    assert "| strong | 1 |" in capsys.readouterr().out
    assert cli.main([*words, "--steps", "5"]) == 2
    assert "contains measurements of another recipe" in capsys.readouterr().err
    with pytest.raises(UsageError, match="another --out"):
        benchmark_scaling.keep_plan(out / "plan.json", plan.model_copy(update={"samples": 1}))
