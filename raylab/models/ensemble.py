"""A seed ensemble: several initialisations of one network, trained together on the same batches."""

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Networks side by side: x -> logits [B, members, outputs].

    The task averages the members' losses, so that each member trains independently, and their probabilities.
    (Lakshminarayanan 2017, arXiv 1612.01474, without adversarial examples.)
    """

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members], 1)
