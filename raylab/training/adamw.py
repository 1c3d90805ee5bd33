"""AdamW (Loshchilov and Hutter, arXiv 1711.05101), built on torch's functional implementation.

The class torch.optim.AdamW imports torch's compiler on first use, which costs about 4 s at every start of a worker;
the function that it calls does not.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from raylab.config.recipe import Optim


class AdamW:
    """An optimizer with the first and second moments of `weights`; each step reads their .grad."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.steps: list[Tensor] = [torch.zeros((), device=w.device) for w in weights]
        self.first = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in weights]
        self.second = [torch.zeros_like(w, memory_format=torch.preserve_format) for w in weights]

    @torch.no_grad()
    def step(self, lr: float, options: Optim, lr_scales: list[float] | None = None) -> None:
        """Take one step at `lr` times each weight's scale; a weight of scale 0 and its moments do not change."""
        scales = lr_scales or [1.0] * len(self.weights)
        for scale in sorted(set(scales) - {0.0}):
            at = [i for i, own in enumerate(scales) if own == scale]
            adamw(
                [self.weights[i] for i in at],
                [g for i in at if (g := self.weights[i].grad) is not None],
                [self.first[i] for i in at],
                [self.second[i] for i in at],
                [],
                [self.steps[i] for i in at],
                fused=True,  # one pass over memory instead of ten
                amsgrad=False,
                beta1=options.beta1,
                beta2=options.beta2,
                lr=lr * scale,
                weight_decay=options.weight_decay,
                eps=1e-8,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        moments = zip(self.steps, self.first, self.second, strict=True)
        return {"state": {i: {"step": s, "exp_avg": m, "exp_avg_sq": v} for i, (s, m, v) in enumerate(moments)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, kept in state["state"].items():
            self.steps[i].copy_(kept["step"])
            self.first[i].copy_(kept["exp_avg"])
            self.second[i].copy_(kept["exp_avg_sq"])
