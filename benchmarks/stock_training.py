"""The training that elastic.py compares raylab with, as a user of torchrun or of Ray Train would write it.

    torchrun --standalone --nproc-per-node=2 --max-restarts=9 benchmarks/stock_training.py DATA DIRECTORY
    python benchmarks/stock_training.py DATA DIRECTORY --ray-train 2:2

The network of the shipped `ards` recipe with its batch size, clipping and moving average under DistributedDataParallel
(gloo, one thread each), from the newest checkpoint, without end; there is no validation. Rank 0 appends one line per
step to DIRECTORY/ledger.jsonl, and one per start with the pids of all ranks, in the form of raylab's ledger. Imports
are in the functions that need them, so that Ray Train's driver and controller do without torch's.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVERY = 50  # steps between checkpoints, as in the shipped recipe
KEEP = 2  # checkpoints, as in the shipped recipe
NEWEST = "newest.pt"
STARTS = 3  # attempts to start a local Ray
Load = Callable[[], dict[str, Any] | None]
Save = Callable[[int, dict[str, Any]], None]


def train(data: Path, directory: Path, load: Load, save: Save) -> None:
    """Train from the state that `load` returns, or from step 0; all ranks call `save` when a checkpoint is due."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from raylab.tasks import find_task
    from raylab.tasks.recipes import shipped_recipe

    torch.set_num_threads(1)
    recipe, task = shipped_recipe("ards"), find_task("ards")
    samples = task.load(data, "train", recipe.data, None)
    model = task.model(recipe, samples.spec).train()
    network = DistributedDataParallel(model)
    assert recipe.loop.ema_decay is not None and recipe.optim.max_grad_norm is not None
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.loop.ema_decay))
    optim = recipe.optim
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), optim.lr, betas, weight_decay=optim.weight_decay, fused=True)
    step = 0
    if (state := load()) is not None:
        step = state["step"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optim"])
    rank, size = dist.get_rank(), dist.get_world_size()
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    with (directory / "ledger.jsonl").open("a") as ledger:

        def note(entry: dict[str, Any]) -> None:
            if rank == 0:
                ledger.write(json.dumps(entry) + "\n")
                ledger.flush()

        note({"start": step, "workers": size, "pids": [int(pid) for pid in pids]})
        while True:
            order = np.random.default_rng((recipe.seed, step)).permutation(len(samples))
            own = np.array_split(order[: recipe.loop.global_batch_size], size)[rank]
            loss = task.outcome.loss(network(samples.batch(own)), torch.from_numpy(samples.y[own]), None).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            average.update_parameters(model)
            step += 1
            note({"step": step, "loss": loss.item()})
            if step % EVERY == 0:
                model_state, average_state = model.state_dict(), average.state_dict()
                save(
                    step,
                    {"step": step, "model": model_state, "average": average_state, "optim": optimizer.state_dict()},
                )


def train_under_torchrun(data: Path, directory: Path) -> None:
    import torch
    import torch.distributed as dist

    newest = directory / NEWEST

    def load() -> dict[str, Any] | None:
        return torch.load(newest, weights_only=True) if newest.exists() else None

    def save(step: int, state: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            torch.save(state, newest.with_suffix(".part"))
            newest.with_suffix(".part").replace(newest)

    dist.init_process_group("gloo")
    train(data, directory, load, save)


def train_on_ray_worker(config: dict[str, str]) -> None:
    """The training function of TorchTrainer."""
    import ray.train
    import torch

    def load() -> dict[str, Any] | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            state: dict[str, Any] = torch.load(Path(folder) / NEWEST, weights_only=True)
            return state

    def save(step: int, state: dict[str, Any]) -> None:
        if ray.train.get_context().get_world_rank() > 0:
            ray.train.report({"step": step})
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, Path(folder) / NEWEST)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    train(Path(config["data"]), Path(config["directory"]), load, save)


def train_with_ray(data: Path, directory: Path, low: int, high: int) -> None:
    """The driver: on the cluster that RAY_ADDRESS names, else on a local Ray with `high` logical CPUs."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    else:
        start_local_ray(high)
    trainer = TorchTrainer(
        train_on_ray_worker,
        train_loop_config={"data": str(data), "directory": str(directory)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high), elastic_resize_monitor_interval_s=1.0
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(directory / "storage"),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
        ),
    )
    trainer.fit()


def start_local_ray(cpus: int) -> None:
    """As often as raylab tries: on a busy machine Ray gives up before its processes have started."""
    import ray

    options = {"num_cpus": cpus, "object_store_memory": 200_000_000, "include_dashboard": False}
    for attempt in range(STARTS):
        try:
            ray.init("local", log_to_driver=False, _temp_dir=os.environ["RAY_TMPDIR"], **options)
            return
        except Exception:  # Ray has no class of its own for it
            if attempt == STARTS - 1:
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared directory of the task ards")
    parser.add_argument("directory", type=Path, help="where the ledger and the checkpoints go")
    parser.add_argument("--ray-train", metavar="MIN:MAX", help="with Ray Train on so many workers, not under torchrun")
    options = parser.parse_args()
    if options.ray_train is None:
        train_under_torchrun(options.data, options.directory)
    else:
        low, high = map(int, options.ray_train.split(":"))
        train_with_ray(options.data, options.directory, low, high)


if __name__ == "__main__":
    main()
