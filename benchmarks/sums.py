"""Measure the cost of `loop.gradient_reduction = "exact"` relative to `"float"` in complete training steps.

    python benchmarks/sums.py [--repeat 5] [--device cuda]

Both run the same steps of the same networks in one process, alternately. The script prints the medians of ms per step
and their ratio, and the time of the sum alone. The lower bound of the exact sum in one process is an in-place addition
for every shard but the first: 12 bytes per element.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from raylab.config.overrides import override
from raylab.data.icu.prepare import prepare_icu
from raylab.data.images.prepare import prepare_images
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training.loop import Report, fit
from raylab.training.process_group import ProcessGroup
from raylab.training.progress import Metrics
from raylab.training.shard_tree import Node, add_node


def seconds_a_step(name: str, data: Path, way: str, settings: dict[str, object]) -> float:
    job = find_task(name)
    chosen = override(shipped_recipe(name, smoke=name == "covidnet"), {**settings, "loop.gradient_reduction": way})
    train = job.load(data, "train", chosen.data, None)
    val = job.load(data, "val", chosen.data, train.spec)
    times: list[float] = []

    class Clock(Report):
        def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
            times.append(time.perf_counter())
            return False

    fit(chosen, job, job.model(chosen, train.spec), train, val, Clock())
    return statistics.median(b - a for a, b in itertools.pairwise(times[3:]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: of the sum alone")
    options = parser.parse_args()
    repeat = options.repeat
    if options.device == "cuda":
        measure_sum("cuda", repeat)
        return
    with tempfile.TemporaryDirectory() as folder:
        ards, cxr = Path(folder) / "ards", Path(folder) / "cxr"
        prepare_icu("ards", "synthetic", None, ards, patients=2000)
        prepare_images("covidnet", cxr, None, None, None, None, source="synthetic", size=64, patients=200)
        print(f"{'network':<34}{'float ms':>10}{'exact ms':>10}{'ratio':>8}")
        for label, name, data, settings in (
            ("GRU, 4 shards of 32", "ards", ards, {"loop.epochs": 3}),
            ("COVID-Net 0.25, 64 px, 4 shards of 8", "covidnet", cxr, {"loop.epochs": 2}),
        ):
            pairs = [[seconds_a_step(name, data, way, settings) for way in ("float", "exact")] for _ in range(repeat)]
            plain, exact = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            print(f"{label:<34}{plain * 1e3:>10.1f}{exact * 1e3:>10.1f}{exact / plain:>8.2f}")
    measure_sum("cpu", repeat)


def measure_sum(device: str, repeat: int) -> None:
    """Print the time of the sum alone of 8 shards of COVID-Net's published parameters."""
    size = 11_700_000
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    shards = [torch.randn(size, device=device) for _ in range(8)]
    took: dict[str, list[float]] = {"exact": [], "float": []}
    for _ in range(repeat + 1):
        for way in took:
            copies = [shard.clone() for shard in shards]
            finish()
            start = time.perf_counter()
            if way == "exact":
                nodes: dict[Node, torch.Tensor] = {}
                for number, vector in enumerate(copies):
                    add_node(nodes, (0, number), vector, len(copies), torch.Tensor.add_)
                ProcessGroup().sum_in_order(nodes, len(copies), torch.empty(size, device=device))
            else:
                total = torch.zeros(size, device=device)
                for vector in copies:
                    total += vector
            finish()
            took[way].append(time.perf_counter() - start)
    took = {way: seconds[1:] for way, seconds in took.items()}  # the first round sets up
    exact, plain = (statistics.median(took[way]) for way in ("exact", "float"))
    ratio = statistics.median(a / b for a, b in zip(took["exact"], took["float"], strict=True))
    print(f"sum alone, 8 shards of 11.7 M: float {plain * 1e3:.2f} ms, exact {exact * 1e3:.2f} ms, ratio {ratio:.2f}")
    print(f"the exact sum moves the bytes of its lower bound at {7 * size * 12 / exact / 1e9:.1f} GB/s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
