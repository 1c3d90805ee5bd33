"""Loss and gradient norm of each step, kept on the device and fetched in bundles, so that no step waits for them.

On a GPU the host only enqueues work. `float(loss)` at each step would block the host until the GPU has caught up, and
then leave the GPU idle until the host has enqueued more. So values stay on the device until they are needed (at the end
of an epoch or at a checkpoint) or until SECONDS have passed.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from raylab.errors import NonFiniteError

SECONDS = 0.5  # maximum time that values stay on a GPU; below the flush interval of run.Recorder


class DeferredMetrics:
    """The metrics of the steps since the last fetch. On the CPU, waiting gains nothing, so each is fetched at once."""

    def __init__(self, device: str) -> None:
        self.patience = 0.0 if device == "cpu" else SECONDS
        self.rows: list[dict[str, Any]] = []
        self.numbers: list[Tensor] = []
        self.fetched_at = time.monotonic()

    def add(self, row: dict[str, Any], loss: Tensor, norm: Tensor) -> None:
        """Add a step: `row` has its values on the host, with "step" (from 1) and "epoch"; loss and norm are scalars."""
        self.rows.append(row)
        self.numbers.append(torch.stack([loss.detach().double(), norm.detach().double()]))

    def is_overdue(self) -> bool:
        """Whether they have waited long enough."""
        return self.patience == 0 or time.monotonic() - self.fetched_at >= self.patience

    def fetch(self, do: str) -> tuple[list[dict[str, Any]], NonFiniteError | None]:
        """Return the rows with "train/loss" and "train/grad_norm", up to the first step where one is not finite.

        For that step the error is returned, with `do` as the next step for the user, and later steps are dropped:
        their weights are invalid, so the caller reports the rows and raises, without scoring or saving the weights.
        """
        values = torch.stack(self.numbers).tolist()
        rows, failed = [], None
        for row, (loss, norm) in zip(self.rows, values, strict=True):
            at = f"at step {row['step'] - 1} (epoch {row['epoch']})"
            if not math.isfinite(loss):
                failed = NonFiniteError(f"the training loss is {loss} {at}", "the loss overflowed or is undefined", do)
                break
            if not math.isfinite(norm):
                why = "the gradient overflowed or is undefined"
                failed = NonFiniteError(f"the gradient norm is {norm} {at}", why, do)
                break
            rows.append({**row, "train/loss": loss, "train/grad_norm": norm})
        self.rows, self.numbers, self.fetched_at = [], [], time.monotonic()
        return rows, failed
