"""The promises of training, on a GPU: the same bits for 1 and 2 processes on one card, resume, transfer, no step that
waits for the host, and bounded memory."""

import io
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.images.augment import change_images
from raylab.data.images.dataset import load_images
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint, shard_gradients
from raylab.training.checkpoint_writer import CheckpointWriter
from raylab.training.loop import Report, Training, fit, weights_sha256
from raylab.training.shard_graphs import ShardGraphs, compute_pass
from tracking.system import open_gpus

EXACT = {"loop.gradient_reduction": "exact"}
# Batches of 50, 50 and 24 of 124 samples; dropout, an average of the weights, a rate that falls
ARDS = override(
    shipped_recipe("ards", smoke=True),
    {
        **EXACT,
        "model.dropout": 0.3,
        "model.layers": 2,
        "loop.epochs": 2,
        "loop.global_batch_size": 50,
        "loop.ema_decay": 0.8,
    },
)
# Batches of 45, 45 and 2 of 92 images; batch norm and augmentation
COVIDNET = override(
    shipped_recipe("covidnet", smoke=True),
    {**EXACT, "model.dropout": 0.2, "loop.epochs": 2, "loop.global_batch_size": 45},
)
LSTM = override(ARDS, {"model.name": "lstm", "loop.epochs": 1})
# An epoch of linear probe and one of fine-tuning
TRANSFER = override(COVIDNET, {"transfer.mode": "lp-ft", "transfer.probe_fraction": 0.5})
CASES = {"ards": ARDS, "lstm": LSTM, "covidnet": COVIDNET, "transfer": TRANSFER}


@pytest.fixture(scope="module")
def data(ards_data: Path, covidnet_data: Path) -> dict[str, Path]:
    return {"ards": ards_data, "covidnet": covidnet_data}


class Stop(Exception):
    """Raised inside `report`: a process that is killed at that step."""


def start(name: str, data: dict[str, Path], device: str, **settings: Any) -> Training:
    recipe = override(CASES[name], settings)
    return Training(*parts(recipe, data), Report(), device, recipe.transfer == TRANSFER.transfer)


def parts(recipe: Recipe, data: dict[str, Path]) -> tuple[Any, ...]:
    task = find_task(recipe.task)
    train = task.load(data[recipe.task], "train", recipe.data, None)
    val = task.load(data[recipe.task], "val", recipe.data, train.spec)
    return recipe, task, task.model(recipe, train.spec), train, val


def facts(
    name: str, data: dict[str, Path], device: str, stop: int | None = None, saved: bytes | None = None, **settings: Any
) -> dict[str, Any]:
    """What a fit leaves that must not depend on workers or interruptions; of one that ends after step `stop`, its
    checkpoint there."""
    recipe = override(CASES[name], {"loop.checkpoint_steps": 1, **settings})
    losses: list[float] = []
    states: dict[int, bytes] = {}

    class Log(Report):
        def __call__(self, row: dict[str, Any], state: dict[str, Any] | None) -> bool:
            if state is None:
                losses.append(row["train/loss"])
                return False
            file = io.BytesIO()
            torch.save(state, file)
            states[row["step"]] = file.getvalue()
            if row["step"] == stop:
                raise Stop
            return False

    built = parts(recipe, data)
    resume = None if saved is None else torch.load(io.BytesIO(saved), map_location=device, weights_only=True)
    try:
        result = fit(*built, Log(), lambda: resume, device, recipe.transfer == TRANSFER.transfer)
    except Stop:
        return {"saved": states[stop or 0]}
    return {
        "losses": losses,
        "weights": result["weights_sha256"],
        "kept": weights_sha256(built[2]),
        "val": result["val"],
    }


def on_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns on each of `size` processes, joined by gloo: NCCL takes one rank a card."""
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, size, folder / "init", work, arguments) for rank in range(size)]
        return [rank.result(timeout=280) for rank in ranks]


def _rank(rank: int, size: int, init: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=size)
    try:
        return work(*arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(data: dict[str, Path], device: str) -> dict[str, dict[str, Any]]:
    return {name: facts(name, data, device) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_on_one_card_give_the_bits_of_one(name, data, device, alone, tmp_path):
    for rank in on_ranks(2, tmp_path, facts, name, data, device):
        assert rank == alone[name]


@pytest.mark.parametrize(("name", "step"), [("ards", 4), ("covidnet", 2), ("transfer", 2), ("transfer", 3)])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bits(name, step, data, device, alone):
    saved = facts(name, data, device, stop=step)["saved"]
    again = facts(name, data, device, saved=saved)
    assert again.pop("losses") == alone[name]["losses"][step:]
    assert again == {key: value for key, value in alone[name].items() if key != "losses"}


@pytest.mark.parametrize("name", CASES)
def test_recorded_passes_have_the_bits_of_others(name, data, card, alone, monkeypatch):
    training = start(name, data, "cuda")
    with training.inputs:
        for _ in range(training.batches.per_epoch):  # also the last batch of the epoch
            training.train_step()
    graphs = training.shard_gradients.graphs
    assert graphs is not None and len(graphs.graphs) > 3 and None not in graphs.graphs.values()
    monkeypatch.setattr(shard_gradients, "can_record", lambda model, device: False)
    assert facts(name, data, "cuda") == alone[name]


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "a number on the host": lambda x: x.sum().item(),
    "the end of the queue": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_pass_that_waits_is_computed_without_a_graph(wait, card):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).cuda()
    weights, x, y = list(model.parameters()), torch.randn(5, 8, device=card), torch.randn(5, 1, device=card)
    waits = True

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if waits:
            wait(x)
        return (model(x) - y).square()[:, 0]

    graphs = ShardGraphs(weights)
    for _ in range(2):
        of_graphs = graphs.compute(0, x, y, 5, losses, lambda: torch.cuda.manual_seed(3))
        torch.cuda.manual_seed(3)
        for one, other in zip(of_graphs, compute_pass(x, y, 5, losses, weights), strict=True):
            assert torch.equal(one, other)
    assert list(graphs.graphs.values()) == [None]
    waits = False
    of_graphs = graphs.compute(1, x, y, 5, losses, lambda: torch.cuda.manual_seed(3))
    torch.cuda.manual_seed(3)
    assert torch.equal(of_graphs[1], compute_pass(x, y, 5, losses, weights)[1])


def test_the_card_augments_as_the_cpu_does_to_a_grey_level(data, device):
    samples = load_images(data["covidnet"], "train", augment={"erase": 0.5})
    read = samples.read(np.arange(len(samples)), (7, 1))
    assert read.changes is not None and read.changes.erased is not None
    here = change_images(read.x_B1SS, read.changes).int()
    there = change_images(read.x_B1SS.to(device), read.changes.each(lambda tensor: tensor.to(device))).cpu().int()
    assert (here - there).abs().max() <= 1 and (here != there).float().mean() < 1e-3
    assert (read.inputs(device).cpu() - read.inputs("cpu")).abs().max() < 0.02


def test_a_linear_probe_leaves_the_body_as_it_is(data, device):
    training = start("transfer", data, device)
    before = {name: weight.clone() for name, weight in training.model.named_parameters()}
    with training.inputs:
        training.train_step()
    changed = {name for name, weight in training.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name, scale in zip(before, training.phases.lr_scales[True], strict=True) if scale > 0}
    assert 0 < len(changed) < len(before)


@pytest.mark.parametrize("name", ["ards", "covidnet"])
def test_the_first_step_is_that_of_the_cpu_to_rounding(name, data, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # 10 bits of the factors, torch's default there
    here, there = (start(name, data, on, **{"model.dropout": 0.0}) for on in ("cpu", device))
    for training in (here, there):
        with training.inputs:
            training.train_step()
            training.fetch_metrics()
    ours, theirs = (training.rows[0] for training in (here, there))
    assert theirs["train/loss"] == pytest.approx(ours["train/loss"], rel=1e-4)
    assert theirs["train/grad_norm"] == pytest.approx(ours["train/grad_norm"], rel=1e-2)


@pytest.mark.parametrize("reduction", ["exact", "float"])
@pytest.mark.parametrize("name", CASES)
def test_no_step_waits_for_the_host(name, reduction, data, card):
    training = start(name, data, "cuda", **{"loop.gradient_reduction": reduction})
    with training.inputs:
        training.train_step()  # what the first one sets up may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow(data, card):
    """On the card, and of pinned inputs."""
    training = start("covidnet", data, "cuda", **{"loop.epochs": 20})
    torch._C._host_emptyCache()  # of the tests before
    torch.cuda.reset_peak_host_memory_stats()
    peaks = []
    with training.inputs:
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats()
            for _ in range(2 * training.batches.per_epoch):
                training.train_step()
            training.fetch_all()
            peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.host_memory_stats()["allocated_bytes.peak"]))
    assert peaks[3][0] <= 1.01 * peaks[1][0]
    batch_bytes = training.train.read(np.arange(45)).x_B1SS.nbytes
    most = training.inputs.ahead + 2  # batches: those ahead, the one at work, and one whose copy has not ended
    assert peaks[3][1] <= 2 * most * batch_bytes + (1 << 20), "the allocator rounds up to powers of two"


def test_a_checkpoint_beside_training_has_the_state_of_its_step(device, tmp_path):
    """The queue still has to copy it when the host has gone on, and changes it right after."""
    weights, moments = torch.ones(1 << 24, device=device), {0: torch.ones((), device=device)}
    writer = CheckpointWriter(tmp_path, 2, lambda: None)
    for step in (1, 2):
        writing = writer.start(step, {"model": {"w": weights}, "optim": moments, "rows": []})
        weights.add_(1)
        moments[0].add_(1)
        saved = checkpoint.load(writing.result().path)
        assert (saved["model"]["w"] == step).all() and saved["optim"][0] == step
    writer.close()


def test_the_copy_of_a_checkpoint_does_not_wait_for_the_card(card, tmp_path):
    weights, writer = torch.ones(1 << 24, device=card), CheckpointWriter(tmp_path, 2, lambda: None)
    writer.start(1, {"model": {"w": weights}}).result()  # what the first one sets up may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        writing = writer.start(2, {"model": {"w": weights}})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    writing.result()
    writer.close()


@pytest.mark.parametrize("switch", ["loop.bf16", "loop.channels_last"])
def test_switches_train_and_repeat_themselves(switch, data, device):
    first, second = (facts("covidnet", data, device, **{switch: True, "loop.epochs": 1}) for _ in range(2))
    assert first == second and np.isfinite(first["losses"]).all()


def test_the_card_is_measured(card):
    values = open_gpus()()
    assert {"gpu_0_memory_usage_megabytes", "gpu_0_utilization_percentage", "gpu_0_power_usage_watts"} <= values.keys()
    assert values["gpu_0_power_usage_watts"] > 0
