"""How inputs reach the device: loader threads and pinned memory."""

import os

import numpy as np
import torch
from torch import Tensor

from raylab.config.recipe import Recipe
from raylab.data.samples import HostBatch, Inputs, Readable
from raylab.training.process_group import ProcessGroup

MAX_THREADS = 8  # more than a GPU needs; each keeps a batch in memory


def loader_threads(recipe: Recipe, group: ProcessGroup, device: str) -> int:
    """Return how many threads load inputs ahead: the cores of this rank that computation leaves free, and at least one
    with a GPU. 0 if computation uses all cores, because a thread would only compete with it. Results do not depend on
    the number."""
    cores = len(os.sched_getaffinity(0))
    if recipe.scaling.workers[1] > 0 or group.size > 1:  # the node is shared
        cores = min(cores, int(recipe.scaling.cpus_per_worker))
    on_gpu = is_gpu(device)
    return min(MAX_THREADS, max(cores - (1 if on_gpu else recipe.loop.threads), int(on_gpu)))


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def read_batch(samples: Inputs, rows: np.ndarray, augment: tuple[int, int] | None, device: str) -> Tensor | HostBatch:
    """Return the inputs of `rows` in host memory, for `to_device`: for a GPU what it can finish itself."""
    if is_gpu(device) and isinstance(samples, Readable):
        return samples.read(rows, augment).pin()
    return pin(samples.batch(rows, augment), device)


def pin(x: Tensor, device: str) -> Tensor:
    """Return x in pinned memory if `device` is a GPU: the host blocks on copies from other memory."""
    return x.pin_memory() if is_gpu(device) and x.device.type == "cpu" else x


def to_device(x: Tensor | HostBatch, device: str) -> Tensor:
    """Copy x to `device`, and finish it there, without waiting."""
    return pin(x, device).to(device, non_blocking=True) if isinstance(x, Tensor) else x.inputs(device)
