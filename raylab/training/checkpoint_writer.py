"""Checkpoints beside training: a step waits for a copy of the state in host memory, and a thread writes the copy.

On a CPU the copy is one pass over memory; on a GPU it joins the queue of kernels, and only the thread waits for it.
"""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylab.training import checkpoint

FIXED = ("progress", "rows")
"""Parts of a state that need no copy: training replaces their tensors and rows, and never changes them in place."""


class CheckpointWriter:
    """Writes checkpoints into `directory` with `checkpoint.save(directory, ..., keep, check)`, one at a time."""

    def __init__(self, directory: Path, keep: int, check: Callable[[], None]) -> None:
        self.directory, self.keep, self.check = directory, keep, check
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.buffers: dict[tuple[str | int, ...], Tensor] = {}  # of the copy, by place in the state
        self.is_on_gpu = False

    def start(self, step: int, state: dict[str, Any]) -> Future[Path]:
        """Copy `state` and start to write it; the checkpoint before must be complete, because its copy is replaced."""
        copied = {name: value if name in FIXED else self._copy(value, (name,)) for name, value in state.items()}
        arrival = None
        if self.is_on_gpu:
            arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrival.record()
        return self.thread.submit(self._write, step, copied, arrival)

    def close(self) -> None:
        """Wait for the thread, and free the copy."""
        self.thread.shutdown()
        self.buffers.clear()

    def _write(self, step: int, state: dict[str, Any], arrival: torch.cuda.Event | None) -> Path:
        if arrival is not None:
            arrival.synchronize()
        return checkpoint.save(self.directory, step, state, self.keep, self.check)

    @torch.no_grad()
    def _copy(self, value: Any, place: tuple[str | int, ...]) -> Any:
        """`value` with its tensors in host memory; those of a GPU arrive when its queue has come as far as here."""
        if isinstance(value, Tensor):
            buffer = self.buffers.get(place)
            if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
                buffer = self.buffers[place] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self.is_on_gpu |= value.is_cuda
            return buffer.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # with what the state of a module carries beside its items
            for key, inner in value.items():
                copied[key] = self._copy(inner, (*place, key))
            return copied
        return value
