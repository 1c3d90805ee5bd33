"""Measure the cost of a training step: plain DistributedDataParallel and raylab's loop, exact and float.

    python benchmarks/step.py [--processes 1 2] [--rounds 7] [--case gru covidnet resnet50 vgg19] [--batch N]

For each number of processes it starts itself under torchrun (gloo, one thread each). The variants alternate within
every round, so that each ratio compares measurements close in time. The script prints medians over the rounds of
samples/s, of the ratio to plain DDP, and of the CPU time per sample, which varies less on a busy machine. Every variant
trains the shipped recipe with the same batches from memory, clipping, AdamW and moving average; DDP uses torch's own
classes on the rank's part of the batch. "DDP, torch's layers" uses torch.nn.GRU and torch.nn.Dropout instead of
raylab's. "exact, apart" has as many processes that exchange nothing, each with its part of the batch and of the shards:
what they could reach on this machine.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.icu.prepare import prepare_icu
from raylab.data.images.prepare import prepare_images
from raylab.data.samples import Samples
from raylab.models.dropout import Dropout
from raylab.models.gru import Gru
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.loop import Report, Training
from raylab.training.process_group import ProcessGroup
from raylab.training.shard_gradients import CHECKS

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gru": ("ards", {}),
    "covidnet": ("covidnet", {"data.size": 64}),
    "covidnet-224": ("covidnet", {"data.size": 224, "loop.global_batch_size": 16}),
    "resnet50": ("covidnet", {"data.size": 64, "model.name": "resnet50", "loop.global_batch_size": 32}),
    "vgg19": ("covidnet", {"data.size": 64, "model.name": "vgg19", "loop.global_batch_size": 32}),
}
"""Task and changed fields of its shipped recipe; images are smaller, so that a round takes seconds."""
SECONDS = 0.5  # per variant and round, at least two steps
Step = Callable[[int], object]


def ddp_step(recipe: Recipe, train: Samples, model: nn.Module) -> Step:
    """A step as in torch's documentation, on this rank's part of the batch."""
    job, group = find_task(recipe.task), ProcessGroup()
    network = DistributedDataParallel(model.train())
    decay = recipe.loop.ema_decay
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None
    optim = recipe.optim
    optimizer = torch.optim.AdamW(
        network.parameters(), optim.lr, (optim.beta1, optim.beta2), weight_decay=optim.weight_decay
    )
    batch = recipe.loop.global_batch_size
    own = batch // group.size

    def step(number: int) -> None:
        order = np.random.default_rng(number).permutation(len(train))
        index = order[group.rank * own : (group.rank + 1) * own]
        x = train.batch(index, augment=(recipe.seed, number) if recipe.data.augments else None)
        loss = job.outcome.loss(network(x), torch.from_numpy(train.y[index]), None).mean()
        optimizer.zero_grad()
        loss.backward()
        if optim.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), optim.max_grad_norm)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        loss.item()

    return step


def raylab_step(recipe: Recipe, train: Samples, val: Samples, model: nn.Module, group: ProcessGroup) -> Step:
    """A step of raylab's loop with its report and the questions that its boundary asks of all workers of `group`."""
    job = find_task(recipe.task)
    training = Training(recipe, job, model, train, val, Report(), "cpu", False)
    training.group = group
    whole_batches = len(train) // recipe.loop.global_batch_size

    def step(number: int) -> None:
        training.progress.step = number // whole_batches * training.batches.per_epoch + number % whole_batches
        training.train_step()
        training.fetch_all()

    return step


def with_torch_layers(model: nn.Module) -> nn.Module:
    """A copy of the network with torch's own GRU and dropout instead of raylab's."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, Dropout):
                setattr(parent, name, nn.Dropout(old.p))
            elif isinstance(old, Gru):
                new = nn.GRU(old.input_size, old.hidden_size, old.num_layers, batch_first=True, dropout=old.dropout)
                new.load_state_dict(old.state_dict())
                setattr(parent, name, new)
    return model


def ways(case: str, data: Path, batch: int | None) -> tuple[int, dict[str, Step]]:
    """The number of samples per step, and the step functions of all variants by name."""
    task, settings = CASES[case]
    settings = {**settings, "loop.checkpoint_steps": None, "loop.epochs": 100_000}
    recipe = override(shipped_recipe(task), settings | ({} if batch is None else {"loop.global_batch_size": batch}))
    job = find_task(task)
    train = job.load(data / task, "train", recipe.data, None)
    val = job.load(data / task, "val", recipe.data, train.spec)
    model = job.model(recipe, train.spec)

    everyone = ProcessGroup()

    def loop(way: str, group: ProcessGroup = everyone, **more: object) -> Step:
        chosen = override(recipe, {"loop.gradient_reduction": way, **{f"loop.{k}": v for k, v in more.items()}})
        return raylab_step(chosen, train, val, copy.deepcopy(model), group)

    found: dict[str, Step] = {"DDP": ddp_step(recipe, train, copy.deepcopy(model))}
    if task == "ards":
        found["DDP, torch's layers"] = ddp_step(recipe, train, with_torch_layers(model))
    found["exact"], found["float"] = loop("exact"), loop("float")
    size, batch = everyone.size, recipe.loop.global_batch_size
    if size == 1:
        found["exact, 1 shard"] = loop("exact", shards=1)
    else:
        groups = [dist.new_group([rank]) for rank in range(size)]
        shares = {"global_batch_size": batch // size, "shards": recipe.loop.shards // size}
        found["exact, apart"] = loop("exact", ProcessGroup(groups[everyone.rank]), **shares)
    return recipe.loop.global_batch_size, found


def measure(case: str, data: Path, rounds: int, batch: int | None) -> dict[str, Any]:
    """Measure every variant: seconds and CPU seconds per step of this rank, as lists over rounds."""
    samples, found = ways(case, data, batch)
    counts, times = {}, {name: {"wall": [], "cpu": []} for name in found}
    at = CHECKS if CASES[case][0] == "ards" else 1  # passes that are computed twice, to compare their bits
    for name, step in found.items():
        for number in range(at):
            step(number)
        start = time.perf_counter()
        step(at)
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        counts[name] = max(2, int(SECONDS / float(seconds)))
    at += 1
    for _ in range(rounds):
        for name, step in found.items():
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            for number in range(at, at + counts[name]):
                step(number)
            times[name]["wall"].append((time.perf_counter() - wall) / counts[name])
            times[name]["cpu"].append((time.process_time() - cpu) / counts[name])
            at += counts[name]
    return {"samples": samples, "times": times}


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for case in options.case:
        found = measure(case, options.data, options.rounds, options.batch)
        if dist.get_rank() == 0:
            options.out.with_name(f"{case}-{dist.get_world_size()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def prepare(folder: Path, cases: list[str]) -> None:
    if "gru" in cases and not (folder / "ards").exists():
        prepare_icu("ards", "synthetic", None, folder / "ards", patients=2000)
    if set(cases) - {"gru"} and not (folder / "covidnet").exists():
        prepare_images(
            "covidnet", folder / "covidnet", None, None, None, None, source="synthetic", size=224, patients=200
        )


def show(case: str, processes: int, found: dict[str, Any]) -> None:
    plain = found["times"]["DDP"]
    for name, took in found["times"].items():
        pace = found["samples"] / statistics.median(took["wall"])
        ratio = statistics.median(a / b for a, b in zip(plain["wall"], took["wall"], strict=True))
        cpu = statistics.median(a / b for a, b in zip(plain["cpu"], took["cpu"], strict=True))
        each = statistics.median(took["cpu"]) * 1e3
        print(f"{case:<14}{processes:>2}  {name:<20}{pace:>10,.0f}{ratio:>8.2f}{each:>10.1f}{cpu:>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", nargs="+", choices=CASES, default=["gru", "covidnet"])
    parser.add_argument("--batch", type=int, help="samples per step (default: the recipe's)")
    parser.add_argument("--data", type=Path, help="directory that keeps prepared data between calls")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of a worker
    options = parser.parse_args()
    if "RANK" in os.environ:
        worker(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or Path(folder)
        prepare(data, options.case)
        print(f"{'case':<14}{'P':>2}  {'way':<20}{'samples/s':>10}{'of DDP':>8}{'CPU ms':>10}{'of DDP':>8}")
        for processes in options.processes:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command += [__file__, *sys.argv[1:], "--data", str(data), "--out", f"{folder}/out"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            subprocess.run(command, check=True, env=environment)
            for case in options.case:
                show(case, processes, json.loads(Path(f"{folder}/{case}-{processes}.json").read_text()))


if __name__ == "__main__":
    main()
