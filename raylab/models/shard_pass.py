"""One forward and backward pass over several shards at once, with random numbers and gradients for each of them.

On a CPU a small network spends its time on calls, so four passes over 32 rows cost nearly twice as much as one over
128. Inside a ShardPass, the layers below (and Dropout and Gru) compute the rows of all shards together; only random
numbers and the gradients of weights, which are sums over rows, are computed for each shard.

Whether a row gets the same bits in a pass over one shard and over several depends on the libraries and on the number
of rows, so a caller that needs the same bits compares the two (training/shard_gradients.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ShardPass:
    """What layers need to know of a pass over rows [shards * B, ...], shard after shard.

    `generators` has the random numbers of each shard. `slots` maps id(weight) to the tensor [shards, *weight.shape] to
    which the backward pass writes its gradients, and adds the id to `written`.
    """

    def __init__(self, generators: Sequence[torch.Generator], slots: Mapping[int, Tensor]) -> None:
        self.generators, self.slots, self.count = generators, slots, len(generators)
        self.written: set[int] = set()


_current: ContextVar[ShardPass | None] = ContextVar("shard pass", default=None)
current_pass = _current.get


@contextmanager
def enter_pass(shards: ShardPass) -> Iterator[None]:
    """Inside this context, layers compute their forward passes as a part of `shards`."""
    token = _current.set(shards)
    try:
        yield
    finally:
        _current.reset(token)


def gradient_slot(shards: ShardPass | None, weight: Tensor) -> Tensor:
    """Return the tensor to which to write the gradient of `weight`, [shards, *weight.shape]; outside a pass [1, ...],
    and the caller returns its only row to autograd."""
    if shards is None or id(weight) not in shards.slots:
        return weight.new_empty(1 if shards is None else shards.count, *weight.shape)
    shards.written.add(id(weight))
    return shards.slots[id(weight)]


class Linear(nn.Linear):
    """torch.nn.Linear that can be a part of a ShardPass."""

    def forward(self, x: Tensor) -> Tensor:
        shards = current_pass()
        if shards is None:
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias, shards)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shards: ShardPass) -> Tensor:
        ctx.shards = shards
        ctx.save_for_backward(x, weight, bias)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weight, bias = ctx.saved_tensors
        of_x = of_out @ weight if ctx.needs_input_grad[0] else None
        out_SRO = of_out.reshape(ctx.shards.count, -1, weight.shape[0])
        if ctx.needs_input_grad[1]:
            x_SRI = x.reshape(ctx.shards.count, -1, weight.shape[1])
            torch.bmm(out_SRO.transpose(1, 2), x_SRI, out=gradient_slot(ctx.shards, weight))
        if ctx.needs_input_grad[2]:
            torch.sum(out_SRO, 1, out=gradient_slot(ctx.shards, bias))
        return of_x, None, None, None


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension that can be a part of a ShardPass."""

    def forward(self, x: Tensor) -> Tensor:
        shards = current_pass()
        if shards is None:
            return super().forward(x)
        return _LayerNorm.apply(x, self.weight, self.bias, self.eps, shards)  # type: ignore[no-any-return]


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, shards: ShardPass) -> Tensor:
        out, mean, scale = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.shards = shards
        ctx.save_for_backward(x, weight, bias, mean, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        of_x = torch.ops.aten.native_layer_norm_backward(
            of_out, x, weight.shape, mean, scale, weight, bias, [ctx.needs_input_grad[0], False, False]
        )[0]
        shape = (ctx.shards.count, -1, *weight.shape)
        if ctx.needs_input_grad[1]:
            normal = ((x - mean) * scale).mul_(of_out)
            torch.sum(normal.view(shape), 1, out=gradient_slot(ctx.shards, weight))
        if ctx.needs_input_grad[2]:
            torch.sum(of_out.reshape(shape), 1, out=gradient_slot(ctx.shards, bias))
        return of_x, None, None, None, None
