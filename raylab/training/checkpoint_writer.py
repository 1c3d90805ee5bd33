"""Checkpoints beside training: a step waits for a copy of the state in host memory, and a thread writes the copy.

On a CPU the copy is one pass over memory; on a GPU it joins the queue of kernels, and only the thread waits for it.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylab.training import checkpoint

FIXED = ("progress", "rows")
"""Parts of a state that need no copy: training replaces their tensors and rows, and never changes them in place."""


Place = tuple[str | int, ...]
"""Where a tensor is in a state: the keys of nested dictionaries."""


class Written(NamedTuple):
    """A checkpoint on disk."""

    path: Path
    state_sha256: str


class CheckpointWriter:
    """Writes checkpoints into `directory` with `checkpoint.save(directory, ..., keep, check)`, one at a time."""

    def __init__(self, directory: Path, keep: int, check: Callable[[], None]) -> None:
        self.directory, self.keep, self.check = directory, keep, check
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.buffers: dict[Place, Tensor] = {}  # of the copy
        self.is_on_gpu = False

    def start(self, step: int, state: dict[str, Any]) -> Future[Written]:
        """Copy `state` and start to write it; the checkpoint before must be complete, because its copy is replaced."""
        parts = {name: part for name, part in state.items() if name not in FIXED}
        if not self.buffers:
            self._allocate(parts)
        copied = {name: self._copy(part, (name,)) if name in parts else part for name, part in state.items()}
        arrival = None
        if self.is_on_gpu:
            arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            arrival.record()
        return self.thread.submit(self._write, step, copied, arrival)

    def close(self) -> None:
        """Wait for the thread, and free the copy."""
        self.thread.shutdown()
        self.buffers.clear()

    def _write(self, step: int, state: dict[str, Any], arrival: torch.cuda.Event | None) -> Written:
        if arrival is not None:
            arrival.synchronize()
        path = checkpoint.save(self.directory, step, state, self.keep, self.check)
        return Written(path, checkpoint.hash_state(state))

    def _allocate(self, parts: dict[str, Any]) -> None:
        """Create the buffers of all tensors in `parts`, those of a type in one block: torch writes it in one piece,
        where it would take and release the GIL for each."""
        tensors = dict(_list_tensors(parts, ()))
        self.is_on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        for dtype in {tensor.dtype for tensor in tensors.values()}:
            own = {place: tensor for place, tensor in tensors.items() if tensor.dtype == dtype}
            sizes = [tensor.numel() for tensor in own.values()]
            block = torch.empty(sum(sizes), dtype=dtype, pin_memory=self.is_on_gpu)
            for (place, tensor), buffer in zip(own.items(), torch.split(block, sizes), strict=True):
                strides = torch.empty_like(tensor, device="cpu").stride()  # of channels_last, say: else it is slow
                self.buffers[place] = buffer.as_strided(tensor.shape, strides)

    @torch.no_grad()
    def _copy(self, value: Any, place: Place) -> Any:
        """`value` with its tensors in host memory; those of a GPU arrive when its queue has come as far as here."""
        if isinstance(value, Tensor):
            return self.buffers[place].copy_(value, non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # with what the state of a module carries beside its items
            for key, inner in value.items():
                copied[key] = self._copy(inner, (*place, key))
            return copied
        return value


def _list_tensors(value: Any, place: Place) -> Iterator[tuple[Place, Tensor]]:
    """The tensors in nested dictionaries, each with its place in them."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _list_tensors(inner, (*place, key))
