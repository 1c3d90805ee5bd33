"""Passes over shards on a GPU as CUDA graphs: recorded once, then started with one call each.

A pass of a small network is hundreds of kernels of a few microseconds, and the host takes longer to start them one by
one than the GPU to compute them. A graph starts the same kernels, with the same bits, whatever the speed of the host.
The first pass of each shape is computed both ways; where a bit differs, or a pass cannot be recorded, that shape is
computed without a graph. So a graph changes nothing but the time.

Graphs run one after another and share the memory of what they compute in between; what lasts beyond a pass lies outside
it.
"""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raylab.training.gradients import shard_gradient

MAX_GRAPHS = 256  # of the full and the last batch of an epoch, for each shard and each phase of a transfer

Losses = Callable[[Tensor, Tensor], Tensor]
"""(x [N, ...], y [N, ...]) -> loss of each sample [N], with its autograd graph"""


def can_record(model: nn.Module, device: str) -> bool:
    """Return whether the passes of `model` may be recorded: on a GPU, if all its layers are raylab's or torch's. Other
    code may do something on the host in each pass, which a graph would not repeat."""
    packages = {type(module).__module__.split(".")[0] for module in model.modules()}
    return torch.device(device).type == "cuda" and packages <= {"raylab", "torch", "torchvision"}


class ShardGraph:
    """A recorded pass over one shard of a given shape."""

    def __init__(
        self, x: Tensor, y: Tensor, count: int, losses: Losses, weights: list[nn.Parameter], gradient: Tensor, pool: Any
    ) -> None:
        self.x, self.y, self.gradient = x.clone(), y.clone(), gradient
        self.loss = torch.empty((), device=x.device)
        self.graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # nobody may remove another graph while one is recorded
        try:
            # threads that load inputs allocate pinned memory meanwhile
            with torch.cuda.graph(self.graph, pool, capture_error_mode="thread_local"):
                loss = losses(self.x, self.y).sum()
                shard_gradient(loss / count, weights, out=self.gradient)
                self.loss.copy_(loss.detach())
        finally:
            if collects:
                gc.enable()

    def replay(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of the shard and its gradient [P], in memory that the next replay changes."""
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        self.graph.replay()
        return self.loss, self.gradient


class ShardGraphs:
    """The recorded passes of this process."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.graphs: dict[tuple[object, ...], ShardGraph | None] = {}
        self.gradients: dict[int, Tensor] = {}  # [P] of each shard
        self.pool = torch.cuda.graph_pool_handle()
        self.may_record = True

    def compute(
        self, shard: int, x: Tensor, y: Tensor, count: int, losses: Losses, seed: Callable[[], None]
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses and the gradient [P] of that sum / count; both are valid until the next pass
        over this shard. `seed` sets the random numbers of the shard."""
        key = (shard, count, x.shape, y.shape, *(w.requires_grad for w in self.weights))
        if key not in self.graphs:
            self.graphs[key] = self._record(shard, x, y, count, losses, seed)
        graph = self.graphs[key]
        seed()
        return compute_pass(x, y, count, losses, self.weights) if graph is None else graph.replay(x, y)

    def _record(
        self, shard: int, x: Tensor, y: Tensor, count: int, losses: Losses, seed: Callable[[], None]
    ) -> ShardGraph | None:
        """Return a graph that computes the bits of a pass without one; None where there is none."""
        if len(self.graphs) >= MAX_GRAPHS or not self.may_record:
            return None
        seed()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # a pass that makes the host wait cannot be recorded
        try:
            loss, gradient = compute_pass(x, y, count, losses, self.weights)
        except RuntimeError:
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        if shard not in self.gradients:
            self.gradients[shard] = torch.empty_like(gradient)
        generator = torch.cuda.default_generators[x.device.index or 0]
        kept = generator.clone_state()
        try:
            graph = ShardGraph(x, y, count, losses, self.weights, self.gradients[shard], self.pool)
        except RuntimeError:  # also of memory
            generator.graphsafe_set_state(kept)  # the state before still believes that it is recorded
            self.may_record = False
            return None
        seed()
        other_loss, other = graph.replay(x, y)
        return graph if torch.equal(loss, other_loss) and torch.equal(gradient, other) else None


def compute_pass(
    x: Tensor, y: Tensor, count: int, losses: Losses, weights: list[nn.Parameter], out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of a shard and the gradient [P] of that sum / count, in `out` or in new memory."""
    loss = losses(x, y).sum()
    return loss.detach(), shard_gradient(loss / count, weights, out)
