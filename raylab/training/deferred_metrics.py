"""A step's loss and gradient norm while they are on the device: fetched together, so that no step waits for them.

On a GPU the host only enqueues work. A `float(loss)` at each step would stop it until the card has caught up, and then
the card until the host has enqueued more; so numbers stay where they are until they are needed (an epoch's end, a
checkpoint) or SECONDS have passed.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from raylab.errors import NonFiniteError

SECONDS = 0.5  # how long numbers may wait on a GPU: below what a bundle of metrics waits for (run.Recorder)


class DeferredMetrics:
    """The steps since the last fetch. On the CPU, where nothing is gained by waiting, each is fetched at once."""

    def __init__(self, device: str) -> None:
        self.patience = 0.0 if device == "cpu" else SECONDS
        self.rows: list[dict[str, Any]] = []
        self.numbers: list[Tensor] = []
        self.fetched_at = time.monotonic()

    def add(self, row: dict[str, Any], loss: Tensor, norm: Tensor) -> None:
        """`row` is what the host knows of a step, with "step" (counted from 1) and "epoch"; the others are scalars."""
        self.rows.append(row)
        self.numbers.append(torch.stack([loss.detach().double(), norm.detach().double()]))

    def is_overdue(self) -> bool:
        """Whether they have waited long enough."""
        return self.patience == 0 or time.monotonic() - self.fetched_at >= self.patience

    def fetch(self, do: str) -> tuple[list[dict[str, Any]], NonFiniteError | None]:
        """The rows with their "train/loss" and "train/grad_norm", up to the first in which one is no number.

        Of that step the error is returned, with `do` as what to do next, and nothing of the steps after it: the
        weights are spoilt since, so that the caller reports the rows, raises, and neither scores nor saves them.
        """
        values = torch.stack(self.numbers).tolist()
        told, failed = [], None
        for row, (loss, norm) in zip(self.rows, values, strict=True):
            at = f"at step {row['step'] - 1} (epoch {row['epoch']})"
            if not math.isfinite(loss):
                failed = NonFiniteError(f"the training loss is {loss} {at}", "the loss left the range of numbers", do)
                break
            if not math.isfinite(norm):
                why = "the gradient left the range of numbers"
                failed = NonFiniteError(f"the gradient's norm is {norm} {at}", why, do)
                break
            told.append({**row, "train/loss": loss, "train/grad_norm": norm})
        self.rows, self.numbers, self.fetched_at = [], [], time.monotonic()
        return told, failed
