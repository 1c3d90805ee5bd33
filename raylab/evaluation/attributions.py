"""Attribution of predictions to hours and features: integrated gradients over the inputs of an ARDS network."""

from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients
from numpy.typing import NDArray
from torch import Tensor, nn

from raylab.errors import UsageError
from raylab.models.baselines import Fitted

STEPS = 64
PARTS = ("value", "measured", "age")  # of a series: its value, its mask, and the time since its measurement


def attributions(model: nn.Module, x: Tensor, features: int) -> NDArray[np.float64]:
    """Return integrated gradients [N, T, 3F + S] of the logit (Sundararajan 2017, arXiv 1703.01365) for x
    [N, T, 3F + S]; F is `features`.

    The path starts from a patient without measurements: every value at the train mean, mask 0, age 1. Up to the error
    of STEPS integration steps, the attributions sum to the logit minus that patient's logit.
    """
    if isinstance(model, Fitted):
        raise UsageError(
            "integrated gradients need a network", "trees have no gradients", "explain a gru, lstm or grud"
        )
    model.eval()

    def logit(rows: Tensor) -> Tensor:
        out: Tensor = model(rows)
        return out.mean(1)[:, 0] if out.ndim == 3 else out[:, 0]

    gradients = IntegratedGradients(logit)
    parts = [
        gradients.attribute(part, baselines=unmeasured(part, features), n_steps=STEPS, internal_batch_size=256)
        for part in (x[at : at + 64] for at in range(0, len(x), 64))
    ]
    return torch.cat(parts).detach().double().numpy()


def unmeasured(x: Tensor, features: int) -> Tensor:
    """Return inputs of patients without measurements, in the shape of x."""
    nothing = torch.zeros_like(x)
    nothing[..., 2 * features : 3 * features] = 1
    return nothing


def by_feature(attributed: NDArray[np.float64], spec: dict[str, Any]) -> tuple[list[str], NDArray[np.float64]]:
    """Return (names, attributions [N, F + S, T]): for a series the sum over value, mask and age; for a static feature
    the sum over all hours, placed in the last hour."""
    f, hours = len(spec["features"]), attributed.shape[1]
    series = sum(attributed[..., k * f : (k + 1) * f] for k in range(len(PARTS)))
    static = np.zeros((len(attributed), hours, attributed.shape[2] - 3 * f))
    static[:, -1] = attributed[..., 3 * f :].sum(1)
    names = [*spec["features"], *spec["static"]]
    return names, np.concatenate([series, static], 2).transpose(0, 2, 1)
