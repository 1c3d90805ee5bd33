"""The gradient of all weights as one vector: flattened, measured and clipped."""

import torch
from torch import Tensor, nn

NORM_PART = 2**16  # elements


def flatten_gradients(weights: list[nn.Parameter]) -> Tensor:
    """One vector [P] of which every parameter's gradient is a view."""
    flat = torch.zeros(sum(w.numel() for w in weights), device=weights[0].device)
    at = 0
    for w in weights:
        w.grad = flat[at : at + w.numel()].view_as(w)
        at += w.numel()
    return flat


def shard_gradient(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """The gradient [P] of `loss`, in a vector of its own; zero where a weight does not learn or has no part in it."""
    learning = [w for w in weights if w.requires_grad]
    found = torch.autograd.grad(loss, learning, allow_unused=True)
    of = {id(w): g for w, g in zip(learning, found, strict=True) if g is not None}
    return torch.cat([of[id(w)].reshape(-1) if id(w) in of else w.new_zeros(w.numel()) for w in weights])


def norm_of(flat: Tensor) -> Tensor:
    """Euclidean norm of a vector, float64, in parts: torch adds up float32 on a CPU one after the other, which is a
    thousandth too little at 20 M elements."""
    whole = len(flat) // NORM_PART * NORM_PART
    parts = torch.linalg.vector_norm(flat[:whole].view(whole // NORM_PART, NORM_PART), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    norm: Tensor = torch.linalg.vector_norm(torch.cat([parts, rest[None]]).double())
    return norm


def clip_norm(flat: Tensor, limit: float | None) -> Tensor:
    """Scale `flat` in place to a norm of at most `limit`, and return the norm that it had, float64."""
    norm = norm_of(flat)
    if limit is not None:
        flat.mul_(torch.where(norm > limit, limit / norm, 1.0))
    return norm
