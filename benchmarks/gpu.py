"""Measure training throughput on a GPU: images and series, with a plain PyTorch loop and with raylab.

    python benchmarks/gpu.py [--batch 256] [--size 224] [--steps 20] [--rounds 5] [--shards 1] [--peak TFLOPS]
                             [--networks covidnet resnet50 gru] [--switches NAME ...]

bare     a plain PyTorch loop: autocast, backward, clipping, fused AdamW; inputs are on the GPU
repeat   the same with deterministic algorithms, which raylab's loop uses, and its ratio to bare
graph    that one recorded as one CUDA graph, from the inputs to the optimizer
loop     raylab's loop on the same inputs, and its ratio to bare
fed      raylab's loop with inputs read from disk, augmented and copied by its loader, and its ratio to loop
switches the plain loop with bf16, channels_last and torch.compile, separately and together

The GRU trains the shipped recipe at its own batch of 128, in its 4 shards and in one, with float and exact sums.
bare, repeat, graph, loop and fed alternate within each round. The script prints medians over the rounds and the median
ratio of the rounds. A round ends when the GPU has finished. The fraction of the peak counts 6 floating-point operations
per multiply-accumulate (forward 2, backward 4), relative to --peak, the GPU's dense bf16 TFLOP/s from its data sheet.
`--device cpu` runs everything on the CPU, to check the script.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import nn

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.icu.prepare import prepare_icu
from raylab.data.images.augment import AUGMENT
from raylab.data.images.dataset import ImageSamples
from raylab.data.images.prepare import KIND
from raylab.data.row_file import RowFile
from raylab.data.samples import Samples
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.loading import to_device
from raylab.training.loop import Report, Training

NETWORKS = ("covidnet", "resnet50", "gru")
CLASSES = ["normal", "pneumonia", "COVID-19"]
PRECISIONS = {"float32": {}, "bf16 + channels_last": {"loop.bf16": True, "loop.channels_last": True}}
SWITCHES = {  # bf16, channels_last, torch.compile
    "float32": (False, False, False),
    "bf16": (True, False, False),
    "channels_last": (False, True, False),
    "compile": (False, False, True),
    "bf16 + channels_last": (True, True, False),
    "all": (True, True, True),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20, help="training steps per round (default: 20)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--switches", nargs="*", choices=SWITCHES, default=SWITCHES)
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s of the GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device found: nothing was measured")
        return 0
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, batch {options.batch} in {options.shards} shards, {options.size} px")
    with tempfile.TemporaryDirectory() as folder:
        for network in options.networks:
            measure = measure_gru if network == "gru" else measure_images
            measure(network, Path(folder), options)
    return 0


def measure_images(network: str, folder: Path, options: argparse.Namespace) -> None:
    samples = draw_samples(folder, 8 * options.batch, options.size)  # an epoch ends with a wait
    for precision, settings in PRECISIONS.items():
        recipe = choose_recipe(network, options, settings)
        compare(f"{network} {precision}", recipe, samples, options)
    for switch in options.switches:
        bf16, channels_last, compiled = SWITCHES[switch]
        settings = {"loop.bf16": bf16, "loop.channels_last": channels_last}
        step = bare_step(choose_recipe(network, options, settings), samples, options, False, compiled)
        rounds = time_rounds({switch: step}, options.batch, options)
        show(f"{network} {switch}", "switches", rounds[switch], 0.0, options)


def measure_gru(network: str, folder: Path, options: argparse.Namespace) -> None:
    prepare_icu("ards", "synthetic", None, folder / "ards", patients=4000)
    for way, shards in (("float", 1), ("float", 4), ("exact", 1), ("exact", 4)):
        settings = {"loop.gradient_reduction": way, "loop.shards": shards, "schedule.kind": "constant"}
        recipe = override(shipped_recipe("ards"), {**settings, "loop.epochs": 100_000, "loop.ema_decay": None})
        samples = find_task("ards").load(folder / "ards", "train", recipe.data, None)
        compare(f"{network} {way}, {shards} shards", recipe, samples, options)


def choose_recipe(network: str, options: argparse.Namespace, settings: dict[str, Any]) -> Recipe:
    return override(
        shipped_recipe("covidnet"),
        {
            "model.name": network,
            "data.size": options.size,
            "loop.global_batch_size": options.batch,
            "loop.shards": options.shards,
            "loop.gradient_reduction": "float",
            "scaling.cpus_per_worker": len(os.sched_getaffinity(0)),  # of which its loader takes up to eight
            "loop.epochs": 100_000,
            "loop.ema_decay": None,
            "schedule.kind": "constant",
            **settings,
        },
    )


def draw_samples(folder: Path, count: int, size: int) -> ImageSamples:
    """Write random images in the format of a prepared directory and open them."""
    generator = np.random.default_rng(0)
    np.save(folder / "images.npy", generator.integers(0, 256, (count, size, size), dtype=np.uint8))
    table = pl.DataFrame(
        {
            "row": range(count),
            "label": [row % 3 for row in range(count)],
            "group": range(count),
            "source": "random",
            "view": None,
            "id": [str(row) for row in range(count)],
        }
    )
    spec = {"kind": KIND, "classes": CLASSES, "size": size, "mean": 0.5, "std": 0.29}
    return ImageSamples(RowFile(folder / "images.npy"), table, {}, spec, AUGMENT)


def start_training(recipe: Recipe, samples: Samples, device: str) -> Training:
    task = find_task(recipe.task)
    return Training(recipe, task, task.model(recipe, samples.spec), samples, samples, Report(), device, False)


def compare(title: str, recipe: Recipe, samples: Samples, options: argparse.Namespace) -> None:
    fed, loop = (start_training(recipe, samples, options.device) for _ in range(2))
    device = options.device
    inputs = [(shards, to_device(x, device), to_device(y, device)) for shards, x, y in fed.load_inputs(0)]
    loop.inputs = SimpleNamespace(get=lambda step: inputs)  # type: ignore[assignment]
    steps = {
        "bare": bare_step(recipe, samples, options, False, False),
        "repeat": bare_step(recipe, samples, options, True, False),
        **({"graph": record(bare_step(recipe, samples, options, True, False))} if device == "cuda" else {}),
        "loop": stepper(loop),
        "fed": stepper(fed),
    }
    with fed.inputs:
        paces = time_rounds(steps, recipe.loop.global_batch_size, options, {"fed": fed.inputs.ahead})
    layers = macs(fed.model, inputs[0][1]) if recipe.task == "covidnet" else 0.0
    for way in paces:
        base = "loop" if way == "fed" else "bare"
        ratio = statistics.median(a / b for a, b in zip(paces[way], paces[base], strict=True))
        show(title, way, paces[way], layers, options, "" if way == base else f"{ratio:6.3f} of {base}")


def stepper(training: Training) -> Callable[[], None]:
    """A function that does one step, and fetches deferred metrics when they are due, as `fit` does."""

    def step() -> None:
        torch.set_deterministic_debug_mode("warn")
        training.train_step()
        if training.must_fetch():
            training.fetch_all()

    return step


def bare_step(
    recipe: Recipe, samples: Samples, options: argparse.Namespace, deterministic: bool, compiled: bool
) -> Callable[[], None]:
    layout = torch.channels_last if recipe.loop.channels_last else torch.contiguous_format
    task = find_task(recipe.task)
    model = task.model(recipe, samples.spec).to(options.device, memory_format=layout).train()
    index = np.arange(recipe.loop.global_batch_size)
    x = samples.batch(index, (0, 0) if recipe.data.augments else None).to(options.device)
    x = x.to(memory_format=layout) if x.ndim == 4 else x
    y = torch.from_numpy(samples.y[index]).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.optim.lr, fused=True, capturable=options.device == "cuda")
    run: Any = torch.compile(model) if compiled else model

    def step() -> None:
        torch.set_deterministic_debug_mode("warn" if deterministic else "default")
        with torch.autocast(options.device, torch.bfloat16, enabled=recipe.loop.bf16):
            logits = run(x)
        loss = task.outcome.loss(logits.float(), y, None).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.max_grad_norm or float("inf"))
        optimizer.step()

    return step


def record(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph, as torch's documentation does it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        assert step, "the graph uses its tensors"
        graph.replay()

    return replay


def time_rounds(
    steps: dict[str, Callable[[], None]],
    batch: int,
    options: argparse.Namespace,
    untimed: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Samples/s of each loop in each round, without the first steps, which select kernels and compile; and without
    `untimed` steps of each round, whose inputs were loaded while the other loops ran."""
    finish = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    for step in steps.values():
        for _ in range(min(5, options.steps)):
            step()
    paces: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            for _ in range(untimed.get(name, 0)):
                step()
            finish()
            started = time.perf_counter()
            for _ in range(options.steps):
                step()
            finish()
            paces[name].append(options.steps * batch / (time.perf_counter() - started))
    return paces


def macs(model: nn.Module, x: torch.Tensor) -> float:
    """Multiply-accumulates per image in convolutions and dense layers."""
    total = 0

    def count(layer: Any, _: Any, out: torch.Tensor) -> None:
        nonlocal total
        per = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_features
        total += out[0].numel() * per

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(x[:1])
    for hook in hooks:
        hook.remove()
    model.train()
    return total


def show(title: str, way: str, paces: list[float], macs: float, options: argparse.Namespace, ratio: str = "") -> None:
    pace = statistics.median(paces)
    tflops = 6 * macs * pace / 1e12
    share = f"{tflops / options.peak:7.1%} of the peak" if options.peak and macs else ""
    rate = f"{tflops:8.1f} TFLOP/s" if macs else ""
    print(f"{title:<32}{way:<10}{pace:>10,.1f} samples/s  {ratio:<16}{rate} {share}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
