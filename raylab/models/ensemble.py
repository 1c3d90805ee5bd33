"""A seed ensemble: the same network from several initialisations, trained side by side on the same batches."""

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """x -> logits [B, members, outputs]. The task's loss is the mean of the members' losses, so that each learns by
    itself, and its probability the mean of theirs. (Lakshminarayanan 2017, arXiv 1612.01474, without its adversarial
    examples.)"""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members], 1)
