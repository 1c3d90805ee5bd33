"""The mathematics of training: the same to the bit for any number of workers and any interruption (DESIGN rule 1).

Real fits of real networks on small synthetic data; worlds of several processes are joined by gloo on loopback.
"""

import copy
import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_process_group import in_world
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raylab.config.overrides import override
from raylab.config.recipe import Recipe, Transfer
from raylab.data.images import augment
from raylab.data.sampler import shards_of, steps_per_epoch
from raylab.data.samples import Samples
from raylab.errors import CheckpointError, DataError, NonFiniteError
from raylab.tasks import find_task
from raylab.tasks.base import Task
from raylab.tasks.outcomes import Binary
from raylab.tasks.recipes import shipped_recipe
from raylab.training.deferred_metrics import DeferredMetrics
from raylab.training.gradients import norm_of
from raylab.training.loading import MAX_THREADS, loader_threads
from raylab.training.loop import Report, fit, weights_sha256
from raylab.training.predict import predict
from raylab.training.process_group import ProcessGroup
from raylab.training.progress import Progress

# 124 samples: batches of 50, 50, 24; the rate falls, weights are averaged, dropout draws
ARDS = override(
    shipped_recipe("ards", smoke=True),
    {
        "model.dropout": 0.3,
        "model.layers": 2,
        "schedule.kind": "plateau",
        "schedule.patience": 0,
        "schedule.warmup_steps": 2,
        "optim.lr": 0.03,
        "loop.epochs": 4,
        "loop.global_batch_size": 50,
        "loop.ema_decay": 0.8,
        "loop.checkpoint_steps": 5,
    },
)
# 92 samples: batches of 45, 45, 2, so that the last leaves shards empty; batch norm and augmentation
COVIDNET = override(
    shipped_recipe("covidnet", smoke=True),
    {
        "data.size": 32 * 2,
        "model.dropout": 0.2,
        "loop.epochs": 2,
        "loop.global_batch_size": 45,
        "loop.ema_decay": 0.9,
        "optim.class_weight": (1.0, 1.0, 2.0),
    },
)
# 2 epochs of linear probe, 3 of fine-tuning; one class in a third of every batch, its logits adjusted
TRANSFER = override(
    COVIDNET,
    {
        "loop.epochs": 5,
        "loop.shards": 3,
        "loop.early_stopping_patience": 3,
        "schedule.kind": "plateau",
        "schedule.patience": 0,
        "schedule.warmup_steps": 2,
        "optim.class_weight": None,
        "optim.logit_adjustment": 1.0,
        "data.class_fraction": 0.34,
        "transfer.mode": "lp-ft",
        "transfer.probe_fraction": 0.4,
        "transfer.first_lr_scale": 0.1,
    },
)
# 96 scenes of four bands: batches of 40, 40, 16; batch norm, dropout, quarter turns
LANDCOVER = override(
    shipped_recipe("landcover", smoke=True),
    {"model.width": 4, "model.dropout": 0.2, "loop.epochs": 2, "loop.global_batch_size": 40, "loop.ema_decay": 0.9},
)
# pairs of patches, with batch norm: each shard has its own negatives
PAIRS = override(
    shipped_recipe("sections-pretraining", smoke=True),
    {"model.width": 4, "loop.epochs": 2, "loop.global_batch_size": 150, "loop.ema_decay": 0.9},
)
CASES = {
    "ards": ARDS,
    "ards-early": override(ARDS, {"loop.early_stopping_patience": 3, "loop.ema_decay": None, "loop.epochs": 12}),
    # batches of 96 and 28: shards of 32 rows, which share passes, and of 9 and 10, which do not
    "ards-passes": override(ARDS, {"loop.global_batch_size": 96, "loop.shards": 3, "loop.epochs": 12}),
    "ards-lstm": override(ARDS, {"model.name": "lstm", "loop.epochs": 1, "loop.shards": 1}),
    "covidnet": COVIDNET,
    "covidnet-plain": override(COVIDNET, {"loop.ema_decay": None, "loop.epochs": 1, "loop.shards": 5}),
    "landcover": LANDCOVER,
    "sections-pretraining": PAIRS,
    "transfer": TRANSFER,
    "transfer-probe": override(TRANSFER, {"transfer.mode": "probe", "loop.epochs": 2, "data.class_fraction": None}),
}

Result = dict[str, Any]


@pytest.fixture(scope="module")
def data(ards_data: Path, covidnet_data: Path, landcover_data: Path, sections_data: Path) -> dict[str, Path]:
    tasks = {"ards": ards_data, "covidnet": covidnet_data, "landcover": landcover_data}
    return {**tasks, "sections-pretraining": sections_data}


class Stop(Exception):
    """Raised inside report: a process that is killed at that step."""


class Log(Report):
    """A report that remembers rows, keeps states as a file would, and stops where it is told to."""

    def __init__(self, stop: int | None = None, ask: tuple[int, ...] = ()) -> None:
        self.rows: list[dict[str, Any]] = []
        self.states: dict[int, bytes] = {}
        self.stop, self.ask = stop, ask

    def __call__(self, row: dict[str, Any], state: dict[str, Any] | None) -> bool:
        if state is not None:
            file = io.BytesIO()
            torch.save(state, file)
            self.states[row["step"]] = file.getvalue()
            return False
        self.rows.append(row)
        if row["step"] == self.stop:
            raise Stop
        return row["step"] in self.ask

    def curve(self) -> list[dict[str, Any]]:
        """All that was reported but the speed."""
        return [{k: v for k, v in row.items() if k != "train/samples_per_s"} for row in self.rows]

    def state(self, step: int) -> dict[str, Any]:
        return state(self.states[step])


def state(saved: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(saved), weights_only=True)


def loaded(recipe: Recipe, data: dict[str, Path]) -> tuple[Task, Samples, Samples, nn.Module]:
    job = find_task(recipe.task)
    train = job.load(data[recipe.task], "train", recipe.data, None)
    val = job.load(data[recipe.task], "val", recipe.data, train.spec)
    return job, train, val, job.model(recipe, train.spec)


def transferred(recipe: Recipe) -> bool:
    """The cases of transfer are known by their probe: any weights serve as the parent's, here those of the seed."""
    return recipe.transfer != Transfer()


def run(
    recipe: Recipe, data: dict[str, Path], log: Log | None = None, resume: dict[str, Any] | None = None
) -> tuple[Result, Log, nn.Module]:
    job, train, val, model = loaded(recipe, data)
    log = log or Log()
    return fit(recipe, job, model, train, val, log, lambda: resume, transferred=transferred(recipe)), log, model


def facts(recipe: Recipe, data: dict[str, Path], saved: bytes | None = None) -> dict[str, Any]:
    """Everything about a fit, from the start or a saved state, that must not depend on workers or interruptions."""
    result, log, model = run(recipe, data, None, None if saved is None else state(saved))
    return {"result": result, "kept": weights_sha256(model), "curve": log.curve()}


@pytest.fixture(scope="module")
def alone(data: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: facts(recipe, data) for name, recipe in CASES.items()}


# the number of workers


def all_cases(data: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: facts(recipe, data) for name, recipe in CASES.items()}


# 6, 3, 1, 4 and 5 shards: workers that divide them, that do not, and more workers than shards
@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_workers_gives_the_same_curve_and_weights(size, data, alone, tmp_path):
    for rank in in_world(size, tmp_path / "world", all_cases, data):
        for name in CASES:
            assert rank[name] == alone[name], name


def compilers_after_a_fit(data: dict[str, Path]) -> list[str]:
    run(CASES["ards"], data)
    return [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]


def test_training_does_not_import_torchs_compiler(data, tmp_path):
    """It takes a worker 5 s of processor time."""
    assert in_world(1, tmp_path / "world", compilers_after_a_fit, data) == [[]]


def test_the_cases_are_not_trivial(alone):
    """Else the equalities of this file would say little."""
    rates = {row["train/lr"] for row in alone["ards-early"]["curve"][2:]}
    assert len(rates) > 2, "the plateau schedule did not lower the rate"
    assert alone["ards-early"]["result"]["stopped"] == "early"
    assert alone["ards-early"]["result"]["steps"] < alone["ards-early"]["result"]["planned_steps"]
    assert len({case["result"]["weights_sha256"] for case in alone.values()}) == len(CASES)
    assert any(case["kept"] != case["result"]["weights_sha256"] for case in alone.values())


@pytest.mark.parametrize("name", ["ards", "covidnet", "transfer"])
def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(name, data, alone):
    """Not the last batch's, which is smaller, nor the mean over batches."""
    recipe, curve = CASES[name], alone[name]["curve"]
    samples = len(loaded(recipe, data)[1])
    counts = [
        len(b)
        for b in np.split(
            np.arange(samples), range(recipe.loop.global_batch_size, samples, recipe.loop.global_batch_size)
        )
    ]
    assert len(counts) == 3 and counts[-1] < counts[0]
    for at in range(0, len(curve), 3):
        losses = [row["train/loss"] for row in curve[at : at + 3]]
        assert curve[at + 2]["train/epoch_loss"] == pytest.approx(np.average(losses, weights=counts), rel=1e-12)
        assert curve[at + 2]["train/epoch_loss"] != pytest.approx(losses[-1], rel=1e-3)
        assert not any("train/epoch_loss" in row for row in curve[at : at + 2])


def test_the_best_scores_stand_at_the_steps_of_their_epochs(alone):
    """Each epoch that is better than all before it, and no other; the last of them is the result's."""
    for name, case in alone.items():
        best: tuple[float, float] | None = None
        objective = find_task(CASES[name].task).objective
        for row in case["curve"]:
            better = "val/loss" in row and (best is None or (row[f"val/{objective}"], -row["val/loss"]) > best)
            of_val = {name: value for name, value in row.items() if name.startswith("val/")}
            of_best = {n.removeprefix("best/"): value for n, value in row.items() if n.startswith("best/")}
            assert of_best == (of_val if better else {})
            if better:
                best, last = (row[f"val/{objective}"], -row["val/loss"]), row
        told = case["result"]["best"]
        assert (told["step"], told["epoch"], told["loss"]) == (last["step"], last["epoch"], last["best/val/loss"])
    assert any(case["result"]["best"]["step"] < case["result"]["steps"] for case in alone.values())


def last_weights(recipe: Recipe, data: dict[str, Path]) -> np.ndarray:
    _, log, _ = run(recipe, data)
    return torch.cat([t.flatten() for t in log.state(max(log.states))["model"].values()]).numpy()


def test_plain_float_sums_agree_with_exact_ones_to_rounding(data, tmp_path):
    recipe = override(ARDS, {"loop.epochs": 2, "schedule.kind": "constant"})
    exact = last_weights(recipe, data)
    inexact = override(recipe, {"loop.gradient_reduction": "float"})
    for got in (last_weights(inexact, data), in_world(3, tmp_path / "world", last_weights, inexact, data)[0]):
        assert np.linalg.norm(got - exact) <= 1e-4 * np.linalg.norm(exact)


# interruptions


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("ards", [1, 3, 4, 8, 12]),  # epochs end at 3, 6, 9, 12
        ("ards-early", [3, 5]),
        ("ards-passes", [3, 20]),
        ("covidnet", [1, 3, 4]),
        ("landcover", [2, 3]),
        ("sections-pretraining", [2]),
        ("transfer", [2, 6, 7, 11]),  # within the probe, at its end, after it; epochs of 3 steps
        ("transfer-probe", [4]),
    ],
)
def test_a_run_stopped_at_any_step_goes_on_to_the_same_weights(name, steps, data, alone):
    whole = alone[name]
    every = override(CASES[name], {"loop.checkpoint_steps": 1})
    for step in steps:
        log = Log(stop=step + 1)  # the checkpoint of `step` is the last one that was written
        if step < whole["result"]["steps"]:
            with pytest.raises(Stop):
                run(every, data, log)
        else:
            run(every, data, log)  # to its end: resuming finds nothing to do
        again = facts(CASES[name], data, log.states[step])
        assert again["curve"] == whole["curve"][step:], step
        assert again["result"] == whole["result"], step
        assert again["kept"] == whole["kept"], step


def stopped(recipe: Recipe, data: dict[str, Path], step: int) -> bytes:
    log = Log(stop=step + 1)
    with pytest.raises(Stop):
        run(override(recipe, {"loop.checkpoint_steps": 1}), data, log)
    return log.states[step]


def test_a_run_goes_on_with_another_number_of_workers(data, alone, tmp_path):
    saved = in_world(3, tmp_path / "three", stopped, COVIDNET, data, 2)[1]
    for seen in (in_world(2, tmp_path / "two", facts, COVIDNET, data, saved)[0], facts(COVIDNET, data, saved)):
        assert seen["result"] == alone["covidnet"]["result"]
        assert seen["kept"] == alone["covidnet"]["kept"]


def test_a_transfer_goes_on_with_another_number_of_workers(data, alone, tmp_path):
    saved = in_world(2, tmp_path / "two", stopped, TRANSFER, data, 4)[0]
    assert facts(TRANSFER, data, saved)["result"] == alone["transfer"]["result"]
    saved = stopped(TRANSFER, data, 7)
    assert in_world(3, tmp_path / "three", facts, TRANSFER, data, saved)[2]["kept"] == alone["transfer"]["kept"]


def test_a_state_beyond_the_last_step_is_refused(data):
    _, log, _ = run(override(ARDS, {"loop.epochs": 2}), data)
    with pytest.raises(CheckpointError, match="step 6, the recipe ends at 3"):
        run(override(ARDS, {"loop.epochs": 1}), data, resume=log.state(6))


def test_a_run_keeps_to_the_augmentation_that_it_started_with(data):
    """Earlier versions left no note of theirs."""
    log = Log()
    run(override(COVIDNET, {"loop.checkpoint_steps": 2, "loop.epochs": 1}), data, log)
    saved = log.state(2)
    assert saved["augmentation"] == augment.VERSION
    del saved["augmentation"]
    with pytest.raises(CheckpointError, match="augments images differently"):
        run(COVIDNET, data, resume=saved)
    run(override(COVIDNET, {"data.augment": False, "loop.epochs": 1}), data, resume=saved)


# inputs prepared ahead


def with_threads(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for module in ("loop", "predict"):
        monkeypatch.setattr(f"raylab.training.{module}.loader_threads", lambda *_: count)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("name", ["ards", "covidnet", "transfer-probe"])
def test_inputs_prepared_ahead_change_no_bit(count, name, data, alone, monkeypatch):
    with_threads(monkeypatch, count)
    assert facts(CASES[name], data) == alone[name]
    assert prefetch_threads() == []


def test_inputs_are_prepared_ahead_on_each_of_several_workers(data, alone, tmp_path):
    recipe = override(CASES["covidnet-plain"], {"scaling.cpus_per_worker": 2})
    for rank in in_world(2, tmp_path / "world", facts, recipe, data):
        assert rank == alone["covidnet-plain"]


def test_threads_are_the_cores_that_computing_leaves_free(monkeypatch):
    cores = set(range(6))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    one, two = SimpleNamespace(size=1), SimpleNamespace(size=2)
    of_worker = override(ARDS, {"scaling.workers": (1, 2), "scaling.cpus_per_worker": 3})
    assert loader_threads(override(ARDS, {"loop.threads": 2}), one, "cpu") == 4
    assert loader_threads(override(ARDS, {"loop.threads": 6}), one, "cpu") == 0
    assert loader_threads(of_worker, one, "cpu") == loader_threads(of_worker, two, "cpu") == 2
    assert loader_threads(ARDS, two, "cpu") == 0, "one core a worker is all that computing takes"
    assert loader_threads(ARDS, two, "cuda") == 1, "a GPU never waits for its host to prepare inputs"
    assert loader_threads(override(of_worker, {"loop.threads": 3}), one, "cuda") == 2
    cores.update(range(100))
    assert loader_threads(ARDS, one, "cpu") == MAX_THREADS


@pytest.mark.parametrize("count", [0, 2])
def test_an_input_that_cannot_be_read_stops_the_run_at_its_step(count, data, monkeypatch):
    with_threads(monkeypatch, count)
    job, train, val, model = loaded(ARDS, data)
    batch, log, bad = train.batch, Log(), 2
    rows = shards_of(bad, len(train), 50, 6, ARDS.seed)[1][-1]

    def failing(index: np.ndarray, augment: tuple[int, int] | None = None) -> torch.Tensor:
        if np.array_equal(index, rows):
            raise DataError("a row cannot be read")
        return batch(index, augment)

    monkeypatch.setattr(train, "batch", failing)
    with pytest.raises(DataError, match="a row cannot be read"):
        fit(ARDS, job, model, train, val, log)
    assert [row["step"] for row in log.rows] == list(range(1, bad + 1)), "the steps before it are complete"
    assert prefetch_threads() == []


def test_a_signal_ends_the_run_and_its_threads(data, monkeypatch):
    with_threads(monkeypatch, 2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    job, train, val, model = loaded(COVIDNET, data)

    class Interrupt(Report):
        def __call__(self, row: dict[str, Any], state: dict[str, Any] | None) -> bool:
            assert len(prefetch_threads()) > 0
            signal.raise_signal(signal.SIGINT)
            return False

    try:
        with pytest.raises(KeyboardInterrupt):
            fit(COVIDNET, job, model, train, val, Interrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert prefetch_threads() == []


# what one step computes


def first_gradient(recipe: Recipe, data: dict[str, Path]) -> tuple[list[torch.Tensor], dict[str, Any], nn.Module]:
    """(the gradient that AdamW saw in the first step, that step's row, the network before it).

    With beta1 = 0 AdamW's first moment is the gradient itself.
    """
    recipe = override(recipe, {"optim.beta1": 0, "loop.checkpoint_steps": 1})
    before = loaded(recipe, data)[3]
    log = Log(stop=2)
    with pytest.raises(Stop):
        run(recipe, data, log)
    moments = log.state(1)["optim"]["state"]
    return [moments[at]["exp_avg"] for at in range(len(moments))], log.rows[0], before


def by_hand(recipe: Recipe, data: dict[str, Path], model: nn.Module) -> tuple[list[torch.Tensor], float]:
    """Gradient and loss of the first batch taken whole, in float64."""
    job, train, _, _ = loaded(recipe, data)
    _, shards = shards_of(0, len(train), recipe.loop.global_batch_size, recipe.loop.shards, recipe.seed)
    index = np.concatenate(shards)
    weight = torch.ones(len(train.spec["classes"])) if recipe.optim.class_weight is None else recipe.optim.class_weight
    model = copy.deepcopy(model).double().train()
    y = torch.from_numpy(train.y[index])
    logits = model(train.batch(index).double())
    if isinstance(job.outcome, Binary):
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y.double(), reduction="none")
    else:
        each = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    loss = (each * torch.as_tensor(weight)[y]).mean()
    loss.backward()
    return [p.grad for p in model.parameters()], loss.item()


@pytest.mark.parametrize("n", [1, 2**16, 2**16 + 3, 8_000_000])
def test_the_norm_of_many_elements(n):
    flat = torch.randn(n, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert norm_of(flat).item() == pytest.approx(flat.double().square().sum().sqrt().item(), rel=1e-6)


@pytest.mark.parametrize("weight", [None, (1.0, 5.0)])
@pytest.mark.parametrize("shards", [1, 7])
def test_the_gradient_is_that_of_the_whole_batch(weight, shards, data):
    """50 samples in 7 shards: of 8 and of 7, so that a mean of means would differ."""
    recipe = override(
        ARDS,
        {"model.dropout": 0, "optim.max_grad_norm": None, "optim.class_weight": weight, "loop.shards": shards},
    )
    got, row, before = first_gradient(recipe, data)
    expected, loss = by_hand(recipe, data, before)
    assert row["train/loss"] == pytest.approx(loss, rel=1e-6)
    norm = math.sqrt(sum(float((g**2).sum()) for g in expected))
    assert row["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6 * norm)


def test_clipping_scales_the_summed_gradient(data):
    recipe = override(ARDS, {"model.dropout": 0, "optim.max_grad_norm": None})
    whole, row, _ = first_gradient(recipe, data)
    clipped, again, _ = first_gradient(override(recipe, {"optim.max_grad_norm": 0.01}), data)
    assert row["train/grad_norm"] == again["train/grad_norm"] > 0.01  # told before clipping
    for one, other in zip(clipped, whole, strict=True):
        torch.testing.assert_close(one, other * (0.01 / row["train/grad_norm"]))
    unclipped, _, _ = first_gradient(override(recipe, {"optim.max_grad_norm": 1e6}), data)
    assert all(torch.equal(one, other) for one, other in zip(unclipped, whole, strict=True))


def test_batch_norm_normalises_by_shard_and_averages_in_shard_order(data):
    recipe = override(COVIDNET, {"data.augment": False, "model.dropout": 0, "loop.ema_decay": None, "loop.shards": 4})
    _, train, _, reference = loaded(recipe, data)
    reference.train()
    _, shards = shards_of(0, len(train), recipe.loop.global_batch_size, 4, recipe.seed)
    with torch.no_grad():
        for index in shards:
            reference(train.batch(index))
    log = Log(stop=2)
    with pytest.raises(Stop):
        run(override(recipe, {"loop.checkpoint_steps": 1}), data, log)
    got = log.state(1)["model"]
    expected = {name: buffer for name, buffer in reference.named_buffers()}
    assert any("running_var" in name for name in expected)
    for name, buffer in expected.items():
        torch.testing.assert_close(got[name], buffer, rtol=1e-5, atol=1e-6)


def test_frozen_batch_norm_stays_as_it_is(data):
    """A layer that a model keeps in eval mode is not folded into, nor counted."""
    job, train, val, model = loaded(override(COVIDNET, {"loop.epochs": 1}), data)
    layer = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    layer.train = lambda mode=True: nn.Module.train(layer, False)
    layer.eval()
    fit(override(COVIDNET, {"loop.epochs": 1}), job, model, train, val, Log())
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))


# numbers that are none


def test_a_poisoned_input_stops_the_run_and_names_its_step(data):
    recipe = override(ARDS, {"loop.epochs": 1})
    job, train, val, model = loaded(recipe, data)
    log = Log()
    bad = 17
    train.x[bad] = math.nan
    step = next(s for s in range(3) if bad in np.concatenate(shards_of(s, len(train), 50, 6, recipe.seed)[1]))
    with pytest.raises(NonFiniteError, match=rf"at step {step} \(epoch 0\)") as caught:
        fit(recipe, job, model, train, val, log)
    assert "optim.lr" in caught.value.do
    assert [row["step"] for row in log.rows] == list(range(1, step + 1))


@pytest.mark.parametrize("way", ["exact", "float"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_beyond_the_numbers_stops_the_run_before_it_steps(way, clip, data):
    """The loss is still finite here: without a look at the gradient, its step would spoil the weights unseen."""
    recipe = override(
        ARDS, {"optim.class_weight": (1e37, 1e37), "loop.gradient_reduction": way, "optim.max_grad_norm": clip}
    )
    log = Log()
    with pytest.raises(NonFiniteError, match="at step 0"):
        run(recipe, data, log)
    assert log.rows == [] and log.states == {}


# on a device whose values the host does not read


class Fetched(Exception):
    """The loop asked the device for numbers."""


class Crossings(TorchDispatchMode):
    """Takes down, while `on`, the copies between host and device that make one wait for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        out = func(*args, **named)
        if self.on and func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            waits = not (named.get("non_blocking") or args[2:] == (True,))
            if waits and source.device != out.device:
                self.seen.append(f"{func}: {source.device} to {out.device}")
        return out


def on_meta(recipe: Recipe, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
    """(steps whose numbers the first fetch asks for, copies that waited on the way there) of a fit on torch's meta
    device. It has no values, so that whatever reads one (float, .item, .cpu, a mask as an index) raises, where on a
    GPU it would wait."""
    job, train, val, model = loaded(recipe, data)
    crossings, batch, waiting = Crossings(), train.batch, []

    def first_input(*arguments: Any, **named: Any) -> torch.Tensor:
        crossings.on = True  # what comes before the first step may wait
        return batch(*arguments, **named)

    def fetch(readings: DeferredMetrics, do: str) -> Any:
        waiting.extend(row["step"] for row in readings.rows)
        assert all(numbers.device.type == "meta" for numbers in readings.numbers)
        raise Fetched

    monkeypatch.setattr(train, "batch", first_input)
    monkeypatch.setattr(DeferredMetrics, "fetch", fetch)
    with crossings, pytest.raises(Fetched):
        fit(recipe, job, model, train, val, Log(), device="meta", transferred=transferred(recipe))
    return waiting, crossings.seen


@pytest.mark.parametrize("way", ["exact", "float"])
@pytest.mark.parametrize("name", ["ards", "covidnet", "transfer"])
def test_no_step_waits_for_the_host(name, way, data, monkeypatch):
    """Clipping, averaged weights, batch norm, class weights and logit adjustment are all among these."""
    monkeypatch.setattr("raylab.training.deferred_metrics.SECONDS", math.inf)
    settings = {"loop.checkpoint_steps": None, "loop.gradient_reduction": way, "optim.max_grad_norm": 1.0}
    settings |= {"transfer.reestimate": False} if name == "transfer" else {}  # it waits, before the first step
    recipe = override(CASES[name], settings)
    assert on_meta(recipe, data, monkeypatch) == ([1, 2, 3], [])  # up to the end of the epoch


def test_numbers_wait_for_a_checkpoint_or_a_time_at_most(data, monkeypatch):
    for seconds, steps, expected in ((math.inf, 2, [1, 2]), (0.0, None, [1])):
        monkeypatch.setattr("raylab.training.deferred_metrics.SECONDS", seconds)
        recipe = override(ARDS, {"loop.checkpoint_steps": steps})
        with monkeypatch.context() as patch:
            assert on_meta(recipe, data, patch)[0] == expected


def test_numbers_that_waited_are_reported_as_if_they_had_not(data, alone, monkeypatch):
    """The same points in the same order, each before the checkpoint of its step."""
    monkeypatch.setattr("raylab.training.deferred_metrics.SECONDS", math.inf)
    monkeypatch.setattr("raylab.training.loop.DeferredMetrics", lambda device: DeferredMetrics("cuda"))
    order: list[tuple[int, bool]] = []

    class Ordered(Log):
        def __call__(self, row: dict[str, Any], state: dict[str, Any] | None) -> bool:
            order.append((row["step"], state is not None))
            return super().__call__(row, state)

    result, log, _ = run(ARDS, data, Ordered())
    assert log.curve() == alone["ards"]["curve"] and result == alone["ards"]["result"]
    assert order == sorted([(step, False) for step in range(1, 13)] + [(step, True) for step in (5, 10, 12)])


def test_a_bad_number_that_waited_stops_the_run_before_its_checkpoint(data, monkeypatch):
    monkeypatch.setattr("raylab.training.deferred_metrics.SECONDS", math.inf)
    monkeypatch.setattr("raylab.training.loop.DeferredMetrics", lambda device: DeferredMetrics("cuda"))
    job, train, val, model = loaded(ARDS, data)
    batch, log, calls = train.batch, Log(), []

    def poisoned(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append(1)
        return batch(*arguments, **named) * (math.nan if len(calls) > 4 * 6 else 1.0)  # 6 shards a step

    monkeypatch.setattr(train, "batch", poisoned)
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 4 \(epoch 1\)"):
        fit(ARDS, job, model, train, val, log)
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4] and log.states == {}  # one was due after step 5


# rates


def rates(settings: dict[str, Any], data: dict[str, Path]) -> tuple[list[float], Log]:
    _, log, _ = run(override(ARDS, {"optim.lr": 0.01, "loop.ema_decay": None, **settings}), data)
    return [row["train/lr"] for row in log.rows], log


def test_warm_up_and_cosine(data):
    got, _ = rates({"schedule.kind": "cosine", "schedule.warmup_steps": 4}, data)
    up = [0.01 * (s + 1) / 4 for s in range(4)]
    down = [0.01 * (1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)]
    assert got == pytest.approx(up + down)


def test_constant(data):
    assert rates({"schedule.kind": "constant", "schedule.warmup_steps": 0}, data)[0] == [0.01] * 12


def test_plateau_multiplies_after_epochs_without_a_better_score(data):
    got, log = rates({"schedule.warmup_steps": 0, "schedule.factor": 0.5, "loop.epochs": 6}, data)
    best, waited, cuts, expected = (-math.inf, -math.inf), 0, 0, []
    for row in log.rows:
        expected.append(0.01 * 0.5**cuts)
        if "val/auroc" in row:
            score = (row["val/auroc"], -row["val/loss"])
            best, waited = (score, 0) if score > best else (best, waited + 1)
            cuts, waited = (cuts + 1, 0) if waited > 0 else (cuts, waited)
    assert cuts > 0
    assert got == pytest.approx(expected)


def scored(*values: float, patience: int = 1, early: int | None = None) -> Progress:
    """Progress after epochs that scored `values`."""
    recipe = override(ARDS, {"schedule.patience": patience, "loop.early_stopping_patience": early})
    progress = Progress()
    for at, auroc in enumerate(values):
        progress.end_epoch(recipe, {"auroc": auroc, "loss": 1.0, "at": at}, "auroc", nn.Linear(1, 1))
    return progress


def test_progress_counts_epochs_without_a_better_score():
    assert scored(0.5, 0.6, 0.7).lr_reductions == 0
    assert scored(0.7, 0.6, 0.6).lr_reductions == 1  # patience 1: lowered after the second
    assert scored(0.7, 0.6, 0.6, 0.6).lr_reductions == 1  # then waits anew
    assert scored(0.7, 0.6, 0.6, 0.6, 0.6).lr_reductions == 2
    assert scored(0.7, 0.6, 0.8, 0.7).lr_reductions == 0
    assert scored(0.7, 0.7, early=2).stopped is None  # equal is not better
    assert scored(0.7, 0.7, 0.7, early=2).stopped == "early"
    assert (scored(0.7, 0.9, 0.8).best_epoch, scored(0.7, 0.9, 0.8).best["at"]) == (1, 1)


def test_equal_scores_are_decided_by_the_loss():
    recipe, progress = ARDS, Progress()
    for loss in (1.0, 0.5, 0.7):
        progress.end_epoch(recipe, {"auroc": 0.5, "loss": loss}, "auroc", nn.Linear(1, 1))
    assert progress.best == {"auroc": 0.5, "loss": 0.5}


# reports and checkpoints


def calls(recipe: Recipe, data: dict[str, Path], asks: Callable[[int], bool]) -> list[tuple[int, bool]]:
    """(step, with a state) of every call of report."""
    seen = []

    class Calls(Report):
        def __call__(self, row: dict[str, Any], state: dict[str, Any] | None) -> bool:
            seen.append((row["step"], state is not None))
            return state is None and asks(row["step"])

    job, train, val, model = loaded(recipe, data)
    fit(recipe, job, model, train, val, Calls())
    return seen


def never(step: int) -> bool:
    return False


def last_rank_at_seven(step: int) -> bool:
    group = ProcessGroup()
    return step == 7 and group.rank == group.size - 1


def test_report_is_called_once_a_step_and_with_the_state_when_due(data, tmp_path):
    steps = [(step, False) for step in range(1, 13)]
    for settings, asks, due in (
        ({"loop.checkpoint_steps": 5}, never, {5, 10, 12}),
        ({"loop.checkpoint_steps": None}, never, {12}),
        ({"loop.checkpoint_steps": 5}, last_rank_at_seven, {5, 7, 10, 12}),
        ({"loop.checkpoint_steps": None, "loop.checkpoint_seconds": 1e-9}, never, set(range(1, 13))),
    ):
        recipe = override(ARDS, settings)
        expected = sorted(steps + [(step, True) for step in due])
        assert calls(recipe, data, asks) == expected, settings
    asked = sorted(steps + [(step, True) for step in (5, 7, 10, 12)])
    recipe = override(ARDS, {"loop.checkpoint_steps": 5})
    assert in_world(2, tmp_path / "world", calls, recipe, data, last_rank_at_seven) == [asked, asked]


def test_rows_and_result_hold_what_they_promise(data):
    result, log, model = run(ARDS, data)
    for row in log.rows:
        assert row.keys() >= {"step", "epoch", "train/loss", "train/lr", "train/grad_norm", "train/samples_per_s"}
        assert ("val/loss" in row) == ("val/auroc" in row) == (row["step"] % 3 == 0)
        assert row["epoch"] == (row["step"] - 1) // 3
    last = {name.removeprefix("val/"): score for name, score in log.rows[-1].items() if name.startswith("val/")}
    best = max((row for row in log.rows if "val/auroc" in row), key=lambda row: (row["val/auroc"], -row["val/loss"]))
    assert result["val"] == last
    assert result["best"]["auroc"] == best["val/auroc"] and result["best"]["epoch"] == best["epoch"]
    assert (result["steps"], result["planned_steps"], result["epochs"], result["stopped"]) == (12, 12, 4, "planned")
    job, _, val, _ = loaded(ARDS, data)
    again = job.outcome.point_scores(val.y, predict(job, model, val, ProcessGroup(), ARDS, "cpu"))
    assert again["auroc"] == result["best"]["auroc"]  # the best epoch's weights are left in the network


def test_the_averaged_weights_are_what_is_scored_and_hashed(data):
    result, log, _ = run(override(ARDS, {"loop.epochs": 1}), data)
    saved = log.state(3)
    model = loaded(ARDS, data)[3]
    model.load_state_dict(saved["average"])
    assert weights_sha256(model) == result["weights_sha256"]
    model.load_state_dict(saved["model"])
    assert weights_sha256(model) != result["weights_sha256"]


def test_predictions_do_not_depend_on_the_chunk(data, monkeypatch):
    job, train, _, model = loaded(COVIDNET, data)
    whole = predict(job, model, train, ProcessGroup(), COVIDNET, "cpu")
    assert whole.shape == (len(train), 3) and whole.sum(1) == pytest.approx(1)
    monkeypatch.setattr("raylab.training.predict.EVAL_BATCH", 7)
    assert predict(job, model, train, ProcessGroup(), COVIDNET, "cpu") == pytest.approx(whole, rel=1e-5)


def test_weights_hash_covers_names_and_buffers():
    model = nn.BatchNorm1d(2)
    before = weights_sha256(model)
    model.running_mean[0] = 1
    assert weights_sha256(model) != before
    assert weights_sha256(nn.Sequential(nn.BatchNorm1d(2))) != before


@pytest.mark.parametrize("settings", [{"loop.bf16": True}, {"loop.channels_last": True}])
def test_switches_of_precision_and_layout_train(settings, data, alone):
    result, log, _ = run(override(COVIDNET, settings), data)
    plain = [row["train/loss"] for row in alone["covidnet"]["curve"]]
    assert result["steps"] == 6
    assert [row["train/loss"] for row in log.rows[:2]] == pytest.approx(plain[:2], rel=0.05)
    assert all(math.isfinite(row["train/grad_norm"]) for row in log.rows)


def test_more_shards_than_samples(data):
    """The smallest step: one sample in the last batch, so that all shards but one are empty."""
    recipe = override(COVIDNET, {"loop.global_batch_size": 91, "loop.shards": 91, "loop.epochs": 1})
    train = loaded(recipe, data)[1]
    assert len(train) == 92 and steps_per_epoch(92, 91) == 2
    result, log, _ = run(recipe, data)
    assert result["steps"] == 2 and math.isfinite(log.rows[-1]["train/loss"])
