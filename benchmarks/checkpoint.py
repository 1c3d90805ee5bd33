"""Measure how long a step is held up by a checkpoint: written at once, and written beside the steps that follow.

    python benchmarks/checkpoint.py [--case gru resnet18] [--rounds 7] [--directory DIR]

Both ways alternate in one process, on the same training and storage (--directory: where checkpoints are written). "At
once" serialises, writes and syncs the state in the step; "beside" copies it there, and a thread does the rest. The
floor is a copy of as many bytes from one block of memory to another. "Slower" is by how much the steps until the
checkpoint is complete took longer, all together, than as many steps without one. Medians over the rounds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raylab.config.overrides import override
from raylab.data.icu.prepare import prepare_icu
from raylab.data.images.prepare import prepare_images
from raylab.tasks import find_task
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint
from raylab.training.loop import Training
from raylab.training.progress import Metrics
from raylab.training.run import Recorder

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "gru": ("ards", {}),
    "resnet18": ("covidnet", {"data.size": 64, "loop.global_batch_size": 8, "model.name": "resnet18"}),
}
"""Task and changed fields of its shipped recipe; images are smaller, so that a round takes seconds."""
STEPS = 4  # without a checkpoint, before each


class AtOnce(Recorder):
    """Writes a checkpoint before the next step."""

    def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
        if state is None:
            return super().__call__(metrics, state)
        folder = self.directory / "checkpoints"
        checkpoint.save(folder, metrics["step"], {**state, "rows": self.rows}, self.recipe.loop.max_checkpoints)
        return False


def take_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def create_training(case: str, data: Path, directory: Path) -> Training:
    task, settings = CASES[case]
    recipe = override(shipped_recipe(task), {**settings, "loop.checkpoint_steps": None, "loop.epochs": 100_000})
    job = find_task(task)
    train = job.load(data / task, "train", recipe.data, None)
    val = job.load(data / task, "val", recipe.data, train.spec)
    recorder = Recorder(directory, recipe, lambda rows: int(rows[-1]["step"]))
    training = Training(recipe, job, job.model(recipe, train.spec), train, val, recorder, "cpu", False)
    training.regroup()
    scored = training.scored_model.state_dict()
    training.progress.best_model = {name: tensor.clone() for name, tensor in scored.items()}  # as after an epoch
    return training


def take_step(training: Training) -> None:
    """One step with its report; no epoch ends."""
    if training.is_epoch_due():
        training.progress.epoch += 1
    training.train_step()
    training.fetch_all()


def measure(case: str, data: Path, rounds: int, directory: Path) -> None:
    training = create_training(case, data, directory)
    beside = training.report
    assert isinstance(beside, Recorder)
    at_once = AtOnce(directory, training.recipe, beside.send)
    at_once.start_group(training.group, 0, is_attempt=False)
    held: dict[str, list[float]] = {"at once": [], "beside": []}
    slower, took, floor = [], [], []
    take_step(training)
    first = take_seconds(training.save)
    beside.finish_checkpoint(wait=True)
    copied = sum(buffer.nbytes for buffer in beside.writer.buffers.values())
    written = (checkpoint.list_checkpoints(directory / "checkpoints")[0] / "state.pt").stat().st_size
    block, other = torch.zeros(copied // 4), torch.ones(copied // 4)
    for _ in range(rounds):
        for name, report in (("at once", at_once), ("beside", beside)):
            training.report = report
            alone = statistics.median(take_seconds(lambda: take_step(training)) for _ in range(STEPS))
            start = time.perf_counter()
            held[name].append(take_seconds(training.save))
            steps = []
            while report.writing is not None:
                steps.append(take_seconds(lambda: take_step(training)))
            if name == "beside":
                took.append(time.perf_counter() - start)
                slower.append(sum(steps) - len(steps) * alone)
        floor.append(take_seconds(lambda: block.copy_(other)))
    parameters = sum(weight.numel() for weight in training.model.parameters())
    whole, part = (statistics.median(held[name]) for name in held)
    ratio = statistics.median(a / b for a, b in zip(held["at once"], held["beside"], strict=True))
    least = statistics.median(floor)
    print(
        f"| {case} | {parameters / 1e6:.2f} M | {written / 1e6:.1f} | {copied / 1e6:.1f} | {whole * 1e3:.1f} "
        f"| {part * 1e3:.2f} | 1/{ratio:.0f} | {least * 1e3:.2f} ({copied / least / 1e9:.1f} GB/s) | {first * 1e3:.1f} "
        f"| {statistics.median(took) * 1e3:.0f} | {statistics.median(slower) * 1e3:.1f} |",
        flush=True,
    )
    training.inputs.close()
    beside.writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where checkpoints are written (default: the temporary one)")
    options = parser.parse_args()
    print(f"load average {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    print(
        "| network | parameters | file MB | copied MB | at once ms | beside ms | ratio | floor ms | first copy ms "
        "| complete after ms | slower ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir=options.directory) as storage:
        data = Path(folder)
        for case in options.case:
            task, _ = CASES[case]
            if task == "ards":
                prepare_icu("ards", "synthetic", None, data / "ards", patients=2000)
            else:
                prepare_images("covidnet", data / task, None, None, None, None, "synthetic", size=64, patients=200)
            directory = Path(storage) / case
            directory.mkdir()
            measure(case, data, options.rounds, directory)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
