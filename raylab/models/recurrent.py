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


def channels(spec: dict[str, Any]) -> int:
    return 3 * len(spec["features"]) + len(spec["static"])


def gru(config: Model, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(nn.GRU, channels(spec), outputs, config)


def lstm(config: Model, spec: dict[str, Any], outputs: int) -> nn.Module:
    return Recurrent(nn.LSTM, channels(spec), outputs, config)
