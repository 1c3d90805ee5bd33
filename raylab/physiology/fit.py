"""Fits the lung model to measured gases: parameters of each stay that explain them, with intervals.

Maximum a posteriori: the misfit of all gases of a stay (one set of parameters per stay) and the distance from the
prior, minimised for all stays at once by the Levenberg-Marquardt method, with derivatives by autograd through the
model. Widths are of the posterior's quadratic approximation there (Laplace), cardiac output and O2 uptake included,
which nobody measured: they are free within their prior, so what they could explain widens the others.

A parameter counts as identified when the data shrank its prior's standard deviation to half or less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raylab.errors import unknown
from raylab.physiology.parameters import QUANTITIES, Inputs
from raylab.physiology.steady import steady_state


@dataclass(frozen=True)
class Free:
    """A fitted parameter, mapped to its range by the logistic function: z has the prior N(z of `median`, `sd`)."""

    median: float
    sd: float
    about: str


FREE = {
    "shunt": Free(0.15, 1.2, "all shunt: what PEEP could open is counted in"),
    "vq_log_sd": Free(0.9, 0.6, ""),
    "alveolar_dead_space": Free(0.25, 1.0, ""),
    "compliance_mL_per_cmH2O": Free(40, 0.5, "at the PEEP of the measurement"),
    "cardiac_output_L_per_min": Free(6, 0.35, "not measured; widens the other intervals"),
    "vo2_mL_per_min": Free(250, 0.25, "not measured; the median may be given for each stay"),
}
ERROR = {
    "pao2_mmHg": ("relative", 0.10),
    "paco2_mmHg": ("relative", 0.06),
    "etco2_mmHg": ("relative", 0.12),
    "plateau_cmH2O": ("absolute", 1.5),
}
"""Standard deviation of a measurement around the model: analyser, time between gas and settings, and model error."""

STEPS = 80
SETTLED = 1e-5  # relative decrease of the cost that a step still predicts
IDENTIFIED = 0.5
Z95 = 1.959964


@dataclass(frozen=True)
class Fit:
    """Fits of N stays. `low` and `high` are the 95% interval, `shrink` the posterior over the prior SD in z, all by
    parameter name.

    `rms` [N] is the root mean square of standardised residuals (about 1 where the model explains the readings, less
    where parameters are as many as readings), `residual` {output: [R]} the standardised ones of each reading (not a
    number where not measured), `settled` whether the search ended, `status` [N] 1 where no parameters near the prior
    give a steady state.
    """

    value: dict[str, Tensor]
    low: dict[str, Tensor]
    high: dict[str, Tensor]
    shrink: dict[str, Tensor]
    rms: Tensor
    residual: dict[str, Tensor]
    settled: Tensor
    status: Tensor


def fit(
    readings: Inputs,
    measured: Mapping[str, Tensor],
    stay: Tensor,
    free: Sequence[str] = tuple(FREE),
    vo2_median_mL_per_min: Tensor | None = None,
) -> Fit:
    """Fit `free` parameters of N stays to R readings.

    `readings` [R] holds the settings and all that is not fitted; `measured` {output of ERROR: [R]}, not a number where
    not measured; `stay` int64 [R] says whose reading it is, 0 to N - 1. Raises UsageError for a name that cannot be
    fitted.
    """
    for name in free:
        if name not in FREE:
            raise unknown("fitted parameter", name, FREE)
    n = int(stay.max()) + 1
    limits = [(QUANTITIES[name].low, QUANTITIES[name].high) for name in free]
    low = torch.tensor([a for a, _ in limits], dtype=torch.float64)
    width = torch.tensor([b - a for a, b in limits], dtype=torch.float64)
    median = torch.tensor([[FREE[name].median for name in free]], dtype=torch.float64).repeat(n, 1)
    if vo2_median_mL_per_min is not None and "vo2_mL_per_min" in free:
        median[:, list(free).index("vo2_mL_per_min")] = vo2_median_mL_per_min.clamp(100, 450)
    prior = torch.logit((median - low) / width)
    sd = torch.tensor([FREE[name].sd for name in free], dtype=torch.float64)

    def values(z: Tensor) -> Tensor:
        return low + width * torch.sigmoid(z)

    def misfit(z: Tensor, rows: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
        """Standardised residuals [r, outputs] of `rows` (0 where not measured, inf without a steady state), and their
        derivatives with respect to z [r, outputs, P]."""
        at = z[stay[rows]].requires_grad_(slopes)
        x = values(at)
        patient = readings.take(rows).but(**{name: x[:, i] for i, name in enumerate(free)})
        with torch.set_grad_enabled(slopes):
            found = steady_state(patient)
        residuals, jacobian = [], []
        for name, (kind, error) in ERROR.items():
            seen = measured[name][rows] if name in measured else torch.full_like(patient.fio2, torch.nan)
            model = found.values[name]
            gap = torch.log(model / seen) / error if kind == "relative" else (model - seen) / error
            there = ~seen.isnan()
            residuals.append(torch.where(there, gap.detach().nan_to_num(torch.inf, torch.inf, torch.inf), 0.0))
            if slopes:
                usable = there & gap.isfinite()
                slope = torch.zeros_like(x)
                if gap.requires_grad and bool(usable.any()):  # pressures do not depend on the shunt
                    (slope,) = torch.autograd.grad(gap[usable].sum(), at, retain_graph=True)
                jacobian.append(torch.where(usable[:, None], slope.nan_to_num(0, 0, 0), 0.0))
        return torch.stack(residuals, 1), torch.stack(jacobian, 1) if slopes else torch.empty(0)

    def cost(residual: Tensor, rows: Tensor, z: Tensor) -> Tensor:
        total = torch.zeros(n, dtype=torch.float64).index_add(0, stay[rows], residual.square().sum(1))
        return total + ((z - prior) / sd).square().sum(1)

    every = torch.arange(len(stay))
    z = prior.clone()
    now = cost(misfit(z, every, False)[0], every, z)
    # An extreme patient may have no steady state at the median of the prior: try parameters that give one
    kind = {"shunt": 0.03, "alveolar_dead_space": 0.1, "cardiac_output_L_per_min": 9.0}
    easier = torch.stack(
        [torch.logit((kind[k] - low[i]) / width[i]) if k in kind else z[0, i] for i, k in enumerate(free)]
    )
    z = torch.where(now.isinf()[:, None], easier, z)
    now = cost(misfit(z, every, False)[0], every, z)
    possible = now.isfinite()
    settled = ~possible
    damping = torch.full((n,), 1e-2, dtype=torch.float64)
    precision = torch.diag_embed((1 / sd.square()).expand(n, -1)).clone()
    for _ in range(STEPS):
        rows = every[~settled[stay]]
        if len(rows) == 0:
            break
        residual, jacobian = misfit(z, rows, True)
        curve, slope = normal_equations(residual, jacobian, stay[rows], n)
        curve = curve + torch.diag(1 / sd.square())
        slope = slope + (z - prior) / sd.square()
        active = ~settled
        precision[active] = curve[active]
        damped = curve + damping[:, None, None] * torch.diag_embed(curve.diagonal(dim1=1, dim2=2))
        move = torch.linalg.solve(damped, slope[:, :, None])[:, :, 0].clamp(-2, 2)
        tried = torch.where(active[:, None], z - move, z)
        after = cost(misfit(tried, rows, False)[0], rows, tried)
        promised = (slope * move).sum(1)
        gain = (now - after) / promised  # about 1 where the quadratic approximation holds
        lower = active & (after <= now)
        z = torch.where(lower[:, None], tried, z)
        now = torch.where(lower, after, now)
        # a decrease far below the prediction means that the step crossed the valley: shorten the next steps
        damping = torch.where(gain > 0.75, damping / 5, torch.where(gain > 0.25, damping, damping * 5)).clamp(1e-4, 1e8)
        settled = settled | (active & (promised < SETTLED * (1 + now)))
    residual, jacobian = misfit(z, every, True)
    curve, _ = normal_equations(residual, jacobian, stay, n)
    covariance = torch.linalg.inv(curve + torch.diag(1 / sd.square()))
    posterior = covariance.diagonal(dim1=1, dim2=2).sqrt()
    there = torch.stack(
        [~measured[name].isnan() if name in measured else residual[:, 0] > torch.inf for name in ERROR], 1
    )
    count = torch.zeros(n, dtype=torch.float64).index_add(0, stay, there.sum(1).double())
    square = torch.zeros(n, dtype=torch.float64).index_add(0, stay, residual.square().sum(1))
    best, bottom, top = values(z), values(z - Z95 * posterior), values(z + Z95 * posterior)
    nothing = torch.full((n,), torch.nan, dtype=torch.float64)

    def named(table: Tensor) -> dict[str, Tensor]:
        return {name: torch.where(possible, table[:, i], nothing) for i, name in enumerate(free)}

    unseen = torch.full_like(residual[:, 0], torch.nan)
    return Fit(
        value=named(best),
        low=named(bottom),
        high=named(top),
        shrink=named(posterior / sd),
        rms=torch.where(possible, (square / count).sqrt(), nothing),
        residual={name: torch.where(there[:, i], residual[:, i], unseen) for i, name in enumerate(ERROR)},
        settled=settled & possible,
        status=(~possible).long(),
    )


def normal_equations(residual: Tensor, jacobian: Tensor, stay: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Sums over each stay's readings of J'J [n, P, P] and J'r [n, P]. Readings without a steady state add nothing."""
    finite = residual.nan_to_num(0, 0, 0)
    p = jacobian.shape[2]
    curve = torch.zeros(n, p, p, dtype=torch.float64).index_add(
        0, stay, torch.einsum("rop,roq->rpq", jacobian, jacobian)
    )
    slope = torch.zeros(n, p, dtype=torch.float64).index_add(0, stay, torch.einsum("rop,ro->rp", jacobian, finite))
    return curve, slope
