"""Recurrent networks over hourly intensive-care series."""

from typing import Any

import torch
from torch import Tensor, nn

from raylab.config.recipe import RecurrentModel
from raylab.models.baselines import PER_SERIES, Summary
from raylab.models.cudnn import flatten_layers, run_layers
from raylab.models.dropout import Dropout
from raylab.models.gru import Gru
from raylab.models.shard_pass import LayerNorm, Linear

CLIP = 4.0  # standard deviations; without clipping, a few outliers would dominate the gradients


# Knots of the piecewise linear encoding: of values in standard deviations of train (about a tenth of a normal variable
# lies between two), of counts and hours since the last measurement as fractions of the window
KNOTS = (-2.5, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.5)
SHARE_KNOTS = (0.0, 1 / 24, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1.0)
POOLED = 256  # width of the pooled summary; the states need far less (docs/log.md)


def encode(values_BV: Tensor, knots: Tensor) -> Tensor:
    """Return the piecewise linear encoding [B, V, K - 1] of Gorishniy 2022 (arXiv 2203.05556, eq. 1): between two of K
    knots one output rises from 0 to 1, so that a linear layer can imitate the threshold of a tree."""
    return ((values_BV[..., None] - knots[:-1]) / knots.diff()).clamp(0, 1)


class Pooled(nn.Module):
    """The pooled summary, an input of the head next to the states: x -> [B, POOLED].

    It is one layer over the summary of each series (baselines.Summary) and the static features, all in piecewise linear
    encoding. Such summaries make tree models strong, and recurrent states learn them poorly. A series that was never
    measured is 0 throughout.
    """

    knots: Tensor
    share_knots: Tensor

    def __init__(self, features: int, static: int, config: RecurrentModel) -> None:
        super().__init__()
        self.summary = Summary(features)
        self.features = features
        values = (PER_SERIES - 2) * features + static
        inputs = (len(KNOTS) - 1) * values + (len(SHARE_KNOTS) - 1) * 2 * features
        self.layer = Linear(inputs, POOLED)
        self.norm = LayerNorm(POOLED)
        self.dropout = Dropout(config.dropout)
        # buffers, because a step on a GPU would wait for a copy from the host
        self.register_buffer("knots", torch.tensor(KNOTS), persistent=False)
        self.register_buffer("share_knots", torch.tensor(SHARE_KNOTS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features
        rows = self.summary(x).to(x.dtype)
        count, since = rows[:, 6 * f : 7 * f], rows[:, 7 * f : 8 * f]
        # 1 if a series was ever measured; values in between occur only in integrated gradients, which need a slope
        measured = count.clamp(0, 1)
        ever = torch.cat([measured.repeat(1, 6), torch.ones_like(rows[:, 8 * f :])], 1)
        values = torch.cat([rows[:, : 6 * f], rows[:, 8 * f :]], 1).nan_to_num(0)
        seen = (
            encode(values, self.knots) * ever[..., None],
            encode(count / x.shape[1], self.share_knots),
            encode(since.nan_to_num(0), self.share_knots) * measured[..., None],
        )
        seen_BI = torch.cat([part.flatten(1) for part in seen], 1)
        return torch.relu(self.norm(self.layer(self.dropout(seen_BI))))


def name_hourly_inputs(spec: dict[str, Any]) -> list[str]:
    """Return the names of the 3F + S inputs of an hour."""
    parts = [f"{part} {name}" for part in ("value", "mask", "since") for name in spec["features"]]
    return parts + [f"static {name}" for name in spec["static"]]


def name_pooled_inputs(spec: dict[str, Any]) -> list[str]:
    """Return the names of the inputs of Pooled's layer."""
    values = [f"{part} {name}" for part in range(PER_SERIES - 2) for name in spec["features"]]
    values += [f"static {name}" for name in spec["static"]]
    shares = [f"{part} {name}" for part in ("count", "since") for name in spec["features"]]
    return [
        f"{name} {gap}"
        for names, knots in ((values, KNOTS), (shares, SHARE_KNOTS))
        for name in names
        for gap in range(len(knots) - 1)
    ]


def clip_values(x: Tensor, features: int) -> Tensor:
    """Return x with its standardised values clipped to CLIP; masks, ages and static features do not change."""
    return torch.cat([x[..., :features].clamp(-CLIP, CLIP), x[..., features:]], 2)


class Lstm(nn.LSTM):
    """torch.nn.LSTM, on a GPU layer by layer (cudnn.py)."""

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        if x.is_cuda and hx is None:
            return run_layers(self, x), None
        return super().forward(x, hx)

    def flatten_parameters(self) -> None:
        flatten_layers(self)


class Recurrent(nn.Module):
    """GRU or LSTM over x [B, T, 3F + S] (values, masks, hours since measurement, statics; see data/icu/dataset.py).

    The head reads the last state, the mean over time and the pooled summary, so that early hours reach it without
    passing through every gate.
    """

    def __init__(
        self, cell: type[nn.RNNBase], features: int, static: int, outputs: int, config: RecurrentModel
    ) -> None:
        super().__init__()
        self.features = features
        self.embed = nn.Sequential(Linear(3 * features + static, config.hidden), LayerNorm(config.hidden))
        between = config.dropout if config.layers > 1 else 0.0
        self.cell = cell(config.hidden, config.hidden, config.layers, batch_first=True, dropout=between)  # type: ignore[arg-type]
        self.pooled = Pooled(features, static, config)
        self.dropout = Dropout(config.dropout)
        self.head = Linear(2 * config.hidden + POOLED, outputs)

    @staticmethod
    def inputs(spec: dict[str, Any]) -> dict[str, list[str]]:
        """Return the input names of each weight whose last dimension is inputs."""
        return {"embed.0.weight": name_hourly_inputs(spec), "pooled.layer.weight": name_pooled_inputs(spec)}

    def forward(self, x: Tensor) -> Tensor:
        x = clip_values(x, self.features)
        h_BTH, _ = self.cell(self.dropout(torch.relu(self.embed(x))))
        seen = torch.cat([h_BTH[:, -1], h_BTH.mean(1), self.pooled(x)], 1)
        return self.head(self.dropout(seen))  # type: ignore[no-any-return]


class GruD(nn.Module):
    """GRU-D (Che 2018, Sci Rep 8:6085): old values decay towards the train mean, and the state decays likewise.

    x [B, T, 3F + S]: with value v (carried forward; the mean is 0), mask m and age d,
    v' = m v + (1 - m) exp(-relu(w d + b)) v and h' = exp(-relu(W d + b)) h; the cell sees v', m and the statics.
    Further layers are plain GRUs over its states. The head is the same as in `Recurrent`.
    """

    def __init__(self, features: int, static: int, outputs: int, config: RecurrentModel) -> None:
        super().__init__()
        self.features = features
        self.fade = nn.Parameter(torch.zeros(features))
        self.fade_from = nn.Parameter(torch.zeros(features))
        self.forget = nn.Linear(features, config.hidden)
        self.cell = nn.GRUCell(2 * features + static, config.hidden)
        more = config.layers - 1
        self.above = nn.GRU(config.hidden, config.hidden, more, batch_first=True) if more else None
        self.pooled = Pooled(features, static, config)
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(2 * config.hidden + POOLED, outputs)

    @staticmethod
    def inputs(spec: dict[str, Any]) -> dict[str, list[str]]:
        """Return the input names of each weight whose last dimension is inputs."""
        names, per_hour = spec["features"], name_hourly_inputs(spec)
        seen = per_hour[: 2 * len(names)] + per_hour[3 * len(names) :]
        series = {name: names for name in ("fade", "fade_from", "forget.weight")}
        return {**series, "cell.weight_ih": seen, "pooled.layer.weight": name_pooled_inputs(spec)}

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, outputs]."""
        f = self.features
        x = clip_values(x, f)
        value, mask, age = (x[..., k * f : (k + 1) * f] for k in range(3))
        fading = torch.exp(-torch.relu(self.fade * age + self.fade_from))
        inputs = torch.cat([mask * value + (1 - mask) * fading * value, mask, x[..., 3 * f :]], 2)
        inputs = self.dropout(inputs)
        keep = torch.exp(-torch.relu(self.forget(age)))
        h = torch.zeros(x.shape[0], keep.shape[2], dtype=x.dtype, device=x.device)
        states = []
        for t in range(x.shape[1]):
            h = self.cell(inputs[:, t], keep[:, t] * h)
            states.append(h)
        h_BTH = torch.stack(states, 1)
        if self.above is not None:
            h_BTH, _ = self.above(self.dropout(h_BTH))
        seen = torch.cat([h_BTH[:, -1], h_BTH.mean(1), self.pooled(x)], 1)
        return self.head(self.dropout(seen))  # type: ignore[no-any-return]


def gru(config: RecurrentModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(Gru, len(spec["features"]), len(spec["static"]), outputs, config)


def lstm(config: RecurrentModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(Lstm, len(spec["features"]), len(spec["static"]), outputs, config)


def grud(config: RecurrentModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    return GruD(len(spec["features"]), len(spec["static"]), outputs, config)
