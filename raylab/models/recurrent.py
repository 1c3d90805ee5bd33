"""Recurrent networks over hourly intensive-care series."""

from typing import Any

import torch
from torch import Tensor, nn

from raylab.config import Model


class Recurrent(nn.Module):
    """GRU or LSTM over x [B, T, C] (values, masks, hours since measurement, statics; see data/icu_samples.py).

    The head sees the last state beside the mean over time: early hours reach it without passing every gate.
    """

    def __init__(self, cell: type[nn.RNNBase], inputs: int, outputs: int, config: Model) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(inputs, config.hidden), nn.LayerNorm(config.hidden))
        between = config.dropout if config.layers > 1 else 0.0
        self.cell = cell(config.hidden, config.hidden, config.layers, batch_first=True, dropout=between)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * config.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h_BTH, _ = self.cell(self.dropout(torch.relu(self.embed(x))))
        return self.head(self.dropout(torch.cat([h_BTH[:, -1], h_BTH.mean(1)], 1)))  # type: ignore[no-any-return]


class GruD(nn.Module):
    """GRU-D (Che 2018, Sci Rep 8:6085): what was measured long ago fades towards the train mean, and so does the state.

    x [B, T, 3F + S]: with value v (carried forward; the mean is 0), mask m and age d,
    v' = m v + (1 - m) exp(-relu(w d + b)) v and h' = exp(-relu(W d + b)) h; the cell sees v', m and the statics.
    Further layers are plain GRUs over its states.
    """

    def __init__(self, features: int, static: int, outputs: int, config: Model) -> None:
        super().__init__()
        self.features = features
        self.fade = nn.Parameter(torch.zeros(features))
        self.fade_from = nn.Parameter(torch.zeros(features))
        self.forget = nn.Linear(features, config.hidden)
        self.cell = nn.GRUCell(2 * features + static, config.hidden)
        more = config.layers - 1
        self.above = nn.GRU(config.hidden, config.hidden, more, batch_first=True) if more else None
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(2 * config.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        f = self.features
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
        return self.head(self.dropout(torch.cat([h_BTH[:, -1], h_BTH.mean(1)], 1)))  # type: ignore[no-any-return]


def channels(spec: dict[str, Any]) -> int:
    return 3 * len(spec["features"]) + len(spec["static"])


def gru(config: Model, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(nn.GRU, channels(spec), outputs, config)


def lstm(config: Model, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(nn.LSTM, channels(spec), outputs, config)


def grud(config: Model, spec: dict[str, Any], outputs: int) -> nn.Module:
    return GruD(len(spec["features"]), len(spec["static"]), outputs, config)
