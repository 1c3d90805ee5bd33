"""How inputs reach the device: who prepares them, and through which memory."""

import os

import torch
from torch import Tensor

from raylab.config.recipe import Recipe
from raylab.training.process_group import ProcessGroup

MAX_THREADS = 8  # more than a GPU needs; each keeps a batch in memory


def loader_threads(recipe: Recipe, group: ProcessGroup, device: str) -> int:
    """How many threads prepare inputs ahead: the cores of this rank that computing leaves free, and at least one beside
    a GPU. 0 where computing uses all cores: a thread would only take turns with it. No result depends on it."""
    cores = len(os.sched_getaffinity(0))
    if recipe.scaling.workers[1] > 0 or group.size > 1:  # the node is shared
        cores = min(cores, int(recipe.scaling.cpus_per_worker))
    on_gpu = is_gpu(device)
    return min(MAX_THREADS, max(cores - (1 if on_gpu else recipe.loop.threads), int(on_gpu)))


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def pin(x: Tensor, device: str) -> Tensor:
    """x in pinned memory where `device` is a GPU, whose host waits for any other copy to end."""
    return x.pin_memory() if is_gpu(device) else x


def to_device(x: Tensor, device: str) -> Tensor:
    """x on `device`, without waiting for it."""
    return pin(x, device).to(device, non_blocking=True)
