"""Contrastive loss of pairs of neighbouring patches, and how well embeddings find the neighbour.

Patches that lie beside each other are positives, as in pretraining on the cytoarchitecture of whole brains (spatial
proximity: Schiffer et al., CytoNet, arXiv 2511.01870; distance within a brain: Spitzer et al. 2018, arXiv 1806.05104).
The loss is the cross-entropy over cosine similarities (InfoNCE, van den Oord et al., arXiv 1807.03748), in both
directions as in SimCLR (Chen et al., arXiv 2002.05709). Its negatives are the other pairs of the same shard, except
those whose patch is itself beside this one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

TEMPERATURE = 0.1
EMBEDDING = 64  # values of one patch
BLOCK = 256  # pairs that are compared with one another in scores


def normalise(pairs: Tensor) -> Tensor:
    """Embeddings [..., 2 * EMBEDDING] of pairs, each half with length 1."""
    halves = [F.normalize(half, dim=-1) for half in pairs.chunk(2, dim=-1)]
    return torch.cat(halves, -1)


def similarities(pairs: Tensor, position: Tensor) -> Tensor:
    """Return cosine similarities over TEMPERATURE [B, B] of each pair's first patch with every second one, from
    embeddings [B, 2 * EMBEDDING]; -inf for other pairs whose first patch is within one step of this one's, by
    `position` [B, 3] (find_neighbours)."""
    first, second = normalise(pairs).chunk(2, dim=-1)
    apart = (position[:, None] - position[None]).abs().amax(-1)
    is_beside = (apart <= 1) & ~torch.eye(len(position), dtype=torch.bool, device=position.device)
    return (first @ second.T / TEMPERATURE).masked_fill(is_beside, -torch.inf)


def contrastive_losses(pairs: Tensor, position: Tensor) -> Tensor:
    """Return the loss of each pair [B]; 0 if there is no negative."""
    table, target = similarities(pairs, position), torch.arange(len(pairs), device=pairs.device)
    forth, back = (F.cross_entropy(each, target, reduction="none") for each in (table, table.T))
    return (forth + back) / 2


def compare_blocks(
    pairs: NDArray[np.float64], position: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (loss [N], whether the neighbour is the most similar patch [N]) of pairs [N, 2 * EMBEDDING]. Each is
    compared with the BLOCK pairs of its block, which are drawn from all; the draw depends on their number alone."""
    order = np.random.default_rng(0).permutation(len(pairs))
    loss, is_first = np.zeros(len(pairs)), np.zeros(len(pairs), dtype=bool)
    for at in range(0, len(pairs), BLOCK):
        rows = order[at : at + BLOCK]
        z, where = torch.from_numpy(pairs[rows]), torch.from_numpy(position[rows])
        loss[rows] = contrastive_losses(z, where).numpy()
        is_first[rows] = (similarities(z, where).argmax(1) == torch.arange(len(rows))).numpy()
    return loss, is_first
