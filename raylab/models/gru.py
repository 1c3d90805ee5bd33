"""A GRU with few operations per time step: torch.nn.GRU with its own backward pass.

On a CPU a small GRU spends its time on calls, not on arithmetic: torch's backward makes about 25 calls per time step,
this one 4, plus one product per weight over all time steps. Parameters and their names are those of torch.nn.GRU; on a
GPU, where cuDNN computes a layer in one call, torch's forward pass is used.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Gru(nn.GRU):
    """A unidirectional torch.nn.GRU with batch_first: x [B, T, I] -> states [B, T, H], and last states or None."""

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if x.is_cuda or hx is not None or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x, hx)
        x_TBI = x.transpose(0, 1)
        for layer, weights in enumerate(self.all_weights):
            if layer:
                x_TBI = nn.functional.dropout(x_TBI, self.dropout, self.training)
            x_TBI = _Layer.apply(x_TBI.contiguous(), *weights)
        return x_TBI.transpose(0, 1), None


class _Layer(torch.autograd.Function):
    """One GRU layer: x [T, B, I] -> states h [T, B, H], starting from h = 0:

    r, z = sigmoid(W x + U h)[r, z];  n = tanh(W x + r U h)[n];  h' = n + z (h - n)   (W and U include the biases)
    """

    @staticmethod
    def forward(ctx: Any, x_TBI: Tensor, w: Tensor, u: Tensor, b_w: Tensor, b_u: Tensor) -> Tensor:
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
        ctx.save_for_backward(x_TBI, w, u, of_x, of_h, states)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, of_states: Tensor) -> tuple[Tensor | None, ...]:
        x_TBI, w, u, gates, of_h, states = ctx.saved_tensors
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
        down = down.view(-1, 3 * hidden)
        before = states[:-1].flatten(0, 1)
        of_u, of_b_u = down.t() @ before, down.sum(0)
        down[:, 2 * hidden :] = (total * of_new).reshape(-1, hidden)
        of_x = (down @ w).view_as(x_TBI) if ctx.needs_input_grad[0] else None
        return of_x, down.t() @ x_TBI.flatten(0, 1), of_u, down.sum(0), of_b_u
