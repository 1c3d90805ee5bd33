"""A GRU with few operations per time step: torch.nn.GRU with its own backward pass.

On a CPU a small GRU spends its time on calls, not on arithmetic: torch's backward makes about 25 calls per time step,
this one 4, plus one product per weight over all time steps. Parameters and their names are those of torch.nn.GRU. On a
GPU, cuDNN computes each layer in one call (cudnn.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from raylab.models.cudnn import flatten_layers, run_layers
from raylab.models.dropout import Dropout
from raylab.models.shard_pass import ShardPass, current_pass, gradient_slot


class Gru(nn.GRU):
    """A unidirectional torch.nn.GRU with batch_first: x [B, T, I] -> states [B, T, H], and last states or None."""

    def __init__(self, *sizes: int, dropout: float = 0.0, **more: Any) -> None:
        super().__init__(*sizes, dropout=dropout, **more)
        self.between = Dropout(dropout)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if x.is_cuda and hx is None:
            return run_layers(self, x), None
        if x.is_cuda or hx is not None or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x, hx)
        for layer, weights in enumerate(self.all_weights):
            x_TBI = (self.between(x) if layer else x).transpose(0, 1).contiguous()
            x = _Layer.apply(x_TBI, *weights, current_pass()).transpose(0, 1)
        return x, None

    def flatten_parameters(self) -> None:
        flatten_layers(self)


class _Layer(torch.autograd.Function):
    """One GRU layer: x [T, B, I] -> states h [T, B, H], starting from h = 0:

    r, z = sigmoid(W x + U h)[r, z];  n = tanh(W x + r U h)[n];  h' = n + z (h - n)   (W and U include the biases)
    """

    @staticmethod
    def forward(
        ctx: Any, x_TBI: Tensor, w: Tensor, u: Tensor, b_w: Tensor, b_u: Tensor, shards: ShardPass | None
    ) -> Tensor:
        hours, batch, _ = x_TBI.shape
        hidden = u.shape[1]
        of_x = torch.addmm(b_w, x_TBI.flatten(0, 1), w.t()).view(hours, batch, 3 * hidden)
        of_h = x_TBI.new_empty(hours, batch, 3 * hidden)
        states = x_TBI.new_zeros(hours + 1, batch, hidden)
        u_t = u.t()
        # of_x becomes the gates r, z, n in place
        gates, news = of_x[..., : 2 * hidden].unbind(0), of_x[..., 2 * hidden :].unbind(0)
        resets, updates = of_x[..., :hidden].unbind(0), of_x[..., hidden : 2 * hidden].unbind(0)
        of_h_gates, of_h_news = of_h[..., : 2 * hidden].unbind(0), of_h[..., 2 * hidden :].unbind(0)
        h, of_h_hours = states.unbind(0), of_h.unbind(0)
        for t in range(hours):
            torch.addmm(b_u, h[t], u_t, out=of_h_hours[t])
            gates[t].add_(of_h_gates[t]).sigmoid_()
            news[t].addcmul_(resets[t], of_h_news[t]).tanh_()
            torch.lerp(news[t], h[t], updates[t], out=h[t + 1])
        ctx.shards = shards
        ctx.save_for_backward(x_TBI, w, u, b_w, b_u, of_x, of_h, states)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, of_states: Tensor) -> tuple[Tensor | None, ...]:
        x_TBI, w, u, b_w, b_u, gates, of_h, states = ctx.saved_tensors
        hours, batch, hidden = of_states.shape
        r, z, n = gates.view(hours, batch, 3, hidden).unbind(2)
        # The derivative of h' with respect to each gate's pre-activation, for all time steps at once
        slopes = gates.new_empty(hours, batch, 3, hidden)
        torch.mul(1 - z, 1 - n * n, out=slopes[:, :, 2])
        torch.mul(z * (1 - z), states[:-1] - n, out=slopes[:, :, 1])
        torch.mul(slopes[:, :, 2] * of_h[..., 2 * hidden :], r * (1 - r), out=slopes[:, :, 0])
        of_new = slopes[:, :, 2].clone()
        slopes[:, :, 2] *= r
        # Backwards over time: the gradient of U h + b, and of h itself
        down = torch.empty_like(gates).view(hours, batch, 3, hidden)
        total = of_states.clone()
        d, s, a, k = total.unbind(0), slopes.unbind(0), down.unbind(0), z.unbind(0)
        flat = down.view(hours, batch, 3 * hidden).unbind(0)
        for t in range(hours - 1, -1, -1):
            torch.mul(d[t][:, None], s[t], out=a[t])
            if t:
                d[t - 1].addcmul_(d[t], k[t]).addmm_(flat[t], u)
        of_w, of_u, of_b_w, of_b_u = (gradient_slot(ctx.shards, weight) for weight in (w, u, b_w, b_u))
        down_SRG = cut_rows(down.view(hours, batch, 3 * hidden), len(of_u))
        torch.bmm(down_SRG.transpose(1, 2), cut_rows(states[:-1], len(of_u)), out=of_u)
        torch.sum(down_SRG, 1, out=of_b_u)
        torch.mul(total, of_new, out=down[:, :, 2])
        down_SRG = cut_rows(down.view(hours, batch, 3 * hidden), len(of_u))
        torch.bmm(down_SRG.transpose(1, 2), cut_rows(x_TBI, len(of_u)), out=of_w)
        torch.sum(down_SRG, 1, out=of_b_w)
        of_x = (down.view(-1, 3 * hidden) @ w).view_as(x_TBI) if ctx.needs_input_grad[0] else None
        if ctx.shards is None:
            return of_x, of_w[0], of_u[0], of_b_w[0], of_b_u[0], None
        return of_x, None, None, None, None, None


def cut_rows(values_TBN: Tensor, shards: int) -> Tensor:
    """Return the rows of each shard, hour by hour: [T, shards * B, N] -> [shards, T * B, N]."""
    hours, _, width = values_TBN.shape
    return values_TBN.view(hours, shards, -1, width).transpose(0, 1).reshape(shards, -1, width)
