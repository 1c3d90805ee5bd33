"""The gradient of all weights as one vector: flattened, measured and clipped."""

import torch
from torch import Tensor, nn

NORM_PART = 2**16  # elements


def flatten_gradients(weights: list[nn.Parameter]) -> Tensor:
    """Make every parameter's gradient a view of one vector [P], and return that vector.

    Each view has the strides of its parameter, because the fused AdamW of a CPU pairs elements by their place in
    memory, and that of a GPU refuses other strides.
    """
    flat = torch.zeros(sum(w.numel() for w in weights), device=weights[0].device)
    for w, part in zip(weights, torch.split(flat, [w.numel() for w in weights]), strict=True):
        w.grad = part.as_strided(w.shape, w.stride())
    return flat


def shard_gradient(loss: Tensor, weights: list[nn.Parameter], out: Tensor | None = None) -> Tensor:
    """Return the gradient [P] of `loss` as a new vector, or in `out`, in the order of `flatten_gradients`; zero for
    weights that are frozen or do not affect the loss."""
    trainable = [w for w in weights if w.requires_grad]
    gradients = torch.autograd.grad(loss, trainable, allow_unused=True)
    by_id = {id(w): g for w, g in zip(trainable, gradients, strict=True) if g is not None}
    parts = [_flatten(by_id[id(w)], w) if id(w) in by_id else w.new_zeros(w.numel()) for w in weights]
    return torch.cat(parts, out=out)


def _flatten(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return the elements of `gradient` in the order in which those of `weight` lie in memory."""
    if not weight.is_contiguous():  # channels_last
        strides = weight.stride()
        gradient = gradient.permute(sorted(range(weight.ndim), key=lambda axis: -strides[axis]))
    return gradient.reshape(-1)


def norm_of(flat: Tensor) -> Tensor:
    """Return the Euclidean norm of a vector, float64.

    It is computed in parts, because torch sums float32 sequentially on a CPU, which is 0.1% too low at 20 million
    elements.
    """
    split = len(flat) // NORM_PART * NORM_PART
    parts = torch.linalg.vector_norm(flat[:split].view(split // NORM_PART, NORM_PART), dim=1)
    rest = torch.linalg.vector_norm(flat[split:])
    norm: Tensor = torch.linalg.vector_norm(torch.cat([parts, rest[None]]).double())
    return norm


def clip_norm(flat: Tensor, limit: float | None) -> Tensor:
    """Scale `flat` in place to a norm of at most `limit`, and return its norm before clipping, float64."""
    norm = norm_of(flat)
    if limit is not None:
        flat.mul_(torch.where(norm > limit, limit / norm, torch.ones_like(norm)))  # a GPU would wait for a number
    return norm
