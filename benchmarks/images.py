"""Measure the cost of loading images: COVID-Net's training steps with inputs from disk and from memory, and the loader
compared with the maximum throughput of the same cores.

    python benchmarks/images.py --images FOLDER [--files 64] [--batch 16] [--shards 2] [--rounds 5] [--size 224]

FOLDER contains JPEG or PNG radiographs at any depth. The variants alternate within each round. The script prints
medians over the rounds and the median ratio of the rounds. A step computes on one thread; inputs are augmented.

steps        images/s by wall time, and by CPU time, which includes loader threads on other cores
loader       images/s by wall time on all cores: `Prefetcher` (ordered and bounded), the same work in unrestricted
             threads (the ceiling), and decoding and cropping the original files in threads
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.data.images.decode import decode, frame
from raylab.data.images.prepare import prepare_images
from raylab.data.prefetch import Prefetcher
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.loop import Report, Training

CLASSES = ("normal", "pneumonia", "COVID-19")
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--files", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="training steps per round (default: 2)")
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    found = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    files = found[:: max(1, len(found) // options.files)][: options.files]
    recipe = override(
        shipped_recipe("covidnet"),
        {
            "data.size": options.size,
            "loop.global_batch_size": options.batch,
            "loop.shards": options.shards,
            "loop.epochs": 1000,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        listed, data = Path(folder) / "train.txt", Path(folder) / "data"
        rows = [f"p{n} {p.relative_to(options.images)} {CLASSES[n % 3]} x" for n, p in enumerate(files)]
        listed.write_text("\n".join(rows))
        prepare_images("covidnet", data, options.images, listed, None, None, size=options.size)
        print(f"{len(files)} images, {options.size} px, batch {options.batch}, {CORES} cores, {options.rounds} rounds")
        compare_steps(recipe, data, options.rounds, options.steps)
        compare_loaders(recipe, data, files, options.rounds)


def start_training(recipe: Recipe, data: Path) -> Training:
    task = find_task(recipe.task)
    train = task.load(data, "train", recipe.data, None)
    return Training(recipe, task, task.model(recipe, train.spec), train, train, Report(), "cpu", False)


def compare_steps(recipe: Recipe, data: Path, rounds: int, steps: int) -> None:
    fed, memory = start_training(recipe, data), start_training(recipe, data)
    inputs = [fed.load_inputs(step) for step in range(fed.batches.per_epoch)]
    memory.inputs = SimpleNamespace(get=lambda step: inputs[step % len(inputs)])  # type: ignore[assignment]
    clock: dict[str, list[float]] = {"in memory": [], "fed": []}
    cpu: dict[str, list[float]] = {"in memory": [], "fed": []}
    with fed.inputs:
        fed.train_step()
        memory.train_step()
        for _ in range(rounds):
            for name, training in (("in memory", memory), ("fed", fed)):
                before, started, used = training.timed_samples, time.perf_counter(), time.process_time()
                for _ in range(steps):
                    training.train_step()
                images = training.timed_samples - before
                clock[name].append(images / (time.perf_counter() - started))
                cpu[name].append(images / (time.process_time() - used))
    show("steps, clock", clock, "in memory")
    show("steps, CPU time", cpu, "in memory")


def compare_loaders(recipe: Recipe, data: Path, files: list[Path], rounds: int) -> None:
    training = start_training(recipe, data)
    steps = max(8, 256 // recipe.loop.global_batch_size)

    def prefetch() -> int:
        with Prefetcher(training.load_inputs, steps, CORES) as inputs:
            return sum(len(y) for step in range(steps) for _, _, y in inputs.get(step))

    def load_freely() -> int:
        with ThreadPoolExecutor(CORES) as pool:
            return sum(pool.map(lambda step: sum(len(y) for _, _, y in training.load_inputs(step)), range(steps)))

    def decode_freely() -> int:
        side = training.train.spec["size"]
        with ThreadPoolExecutor(CORES) as pool:
            return len(list(pool.map(lambda file: np.array(frame(decode(file, side), side)), files)))

    ways: dict[str, Callable[[], int]] = {"ceiling": load_freely, "loader": prefetch, "decode + crop": decode_freely}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            images = way()
            clock[name].append(images / (time.perf_counter() - started))
    show("loader, clock", clock, "ceiling")


def show(title: str, paces: dict[str, list[float]], base: str) -> None:
    for name, each in paces.items():
        ratio = statistics.median(a / b for a, b in zip(each, paces[base], strict=True))
        print(f"{title:<18}{name:<16}{statistics.median(each):>10,.1f} images/s{ratio:>8.3f} of {base}")


if __name__ == "__main__":
    main()
