"""What loading costs: training steps at 224 px from the prepared cache, against the same steps on inputs that are in
memory already, and against decoding the original files by PIL at every step.

    python benchmarks/images.py --images FOLDER [--files 128] [--batch 16] [--repeat 3] [--size 224]

FOLDER holds JPEG or PNG radiographs, anywhere below it. The ways are taken in turn, in one process on one thread, with
COVID-Net forward and backward; printed are medians of images a second of CPU time, which other processes disturb less
than the clock, and their share of the first way's.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from raylab.config.recipe import CovidNetModel
from raylab.data.images.dataset import ImageSamples, load_images
from raylab.data.images.decode import decode, frame
from raylab.data.images.prepare import prepare_covidnet
from raylab.models import IMAGES, network

CLASSES = ("normal", "pneumonia", "COVID-19")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--files", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    files = found[:: max(1, len(found) // options.files)][: options.files]
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "train.txt"
        rows = [f"p{n} {p.relative_to(options.images)} {CLASSES[n % 3]} x" for n, p in enumerate(files)]
        listed.write_text("\n".join(rows))
        prepare_covidnet(Path(folder) / "out", options.images, listed, None, None, size=options.size)
        compare(load_images(Path(folder) / "out", "train"), options)


def compare(samples: ImageSamples, options: argparse.Namespace) -> None:
    model = network(IMAGES, "covidnet")(CovidNetModel(name="covidnet"), samples.spec, 3).train()
    mean, std = samples.spec["mean"], samples.spec["std"]
    batches = [np.arange(at, at + options.batch) for at in range(0, len(samples) - options.batch + 1, options.batch)]
    memory = [samples.batch(index) for index in batches]
    augmented = [samples.batch(index, (0, 0)) for index in batches]

    def pil(at: int) -> torch.Tensor:
        files = [options.images / str(name) for name in samples.ids[batches[at]]]
        views = [frame(decode(file, options.size), options.size) for file in files]
        return (torch.from_numpy(np.stack(views))[:, None].float() / 255 - mean) / std

    ways: dict[str, Callable[[int], torch.Tensor]] = {
        "in memory": lambda at: memory[at],
        "cache": lambda at: samples.batch(batches[at]),
        "in memory, augmented before": lambda at: augmented[at],
        "cache, augmented": lambda at: samples.batch(batches[at], (0, 1)),
        "PIL, originals": pil,
    }
    paces: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeat):
        for name, load in ways.items():
            started = time.process_time()
            for at in range(len(batches)):
                x, y = load(at), torch.from_numpy(samples.y[batches[at]])
                torch.nn.functional.cross_entropy(model(x), y).backward()
            paces[name].append(len(batches) * options.batch / (time.process_time() - started))
    first = statistics.median(paces["in memory"])
    print(f"{len(samples)} images, {options.size} px, COVID-Net, batch {options.batch}, {options.repeat} rounds")
    for name, each in paces.items():
        print(f"{name:<30}{statistics.median(each):>8.1f} images/s{statistics.median(each) / first:>8.3f}")


if __name__ == "__main__":
    main()
