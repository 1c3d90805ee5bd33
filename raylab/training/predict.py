"""Predictions of a network over a data set, computed by all ranks together, and their scores."""

import contextlib

import numpy as np
import torch
from torch import Tensor, nn

from raylab.config.recipe import Recipe
from raylab.data.prefetch import Prefetcher
from raylab.data.samples import HostBatch, Inputs, Samples
from raylab.tasks.base import Task
from raylab.training.loading import loader_threads, read_batch, to_device
from raylab.training.process_group import ProcessGroup

EVAL_BATCH = 256  # rows per forward pass; fixed, so that scores do not depend on the number of workers


@torch.no_grad()
def predict(
    task: Task, model: nn.Module, samples: Inputs, group: ProcessGroup, recipe: Recipe, device: str
) -> np.ndarray:
    """Return probabilities, float64 [N] (binary) or [N, classes], the same on every rank; each computes some chunks."""
    model.eval()
    chunks = [np.arange(a, min(a + EVAL_BATCH, len(samples))) for a in range(0, len(samples), EVAL_BATCH)]
    width = task.outcome.count(samples.spec)
    own, rows = list(group.own_shards(len(chunks))), {}

    def load(number: int) -> Tensor | HostBatch:
        return read_batch(samples, chunks[own[number]], None, device)

    with Prefetcher(load, len(own), loader_threads(recipe, group, device)) as inputs:
        for number, chunk in enumerate(own):
            p = task.outcome.probabilities(
                forward(model, inputs.get(number), recipe.loop.bf16, recipe.loop.channels_last, device).float().double()
            )
            padded = torch.zeros(EVAL_BATCH, width, dtype=torch.float64)
            padded[: len(p)] = p.cpu().reshape(len(p), width)
            rows[chunk] = padded.reshape(-1)
    table = group.gather(rows, len(chunks), EVAL_BATCH * width).reshape(-1, width)[: len(samples)]
    return table.numpy()[:, 0] if width == 1 else table.numpy()


def validate(
    task: Task, model: nn.Module, samples: Samples, group: ProcessGroup, recipe: Recipe, device: str
) -> dict[str, float]:
    """Return loss and point scores over the gathered predictions, never an average of per-rank scores."""
    p = predict(task, model, samples, group, recipe, device)
    return {"loss": task.outcome.log_loss(samples.y, p), **task.outcome.point_scores(samples.y, p)}


def name_metrics(scores: dict[str, float], prefix: str = "val") -> dict[str, float]:
    """Return validation scores under their metric names, such as `val/auroc`."""
    return {f"{prefix}/{name}": score for name, score in scores.items()}


def forward(model: nn.Module, x: Tensor | HostBatch, bf16: bool, channels_last: bool, device: str) -> Tensor:
    """Return the float32 logits of a batch, computed in the requested precision and memory format."""
    x = to_device(x, device)
    if channels_last and x.ndim == 4:
        x = x.to(memory_format=torch.channels_last)
    with torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        out: Tensor = model(x)
    return out.float()
