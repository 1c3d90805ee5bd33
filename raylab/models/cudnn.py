"""Recurrent layers on a GPU, one call of cuDNN for each.

In one call for all layers, cuDNN draws the dropout between them itself, from a generator that no seed sets again: what
it drops would depend on how many steps this process has computed.
"""

import torch
from torch import Tensor, nn
from torch.backends.cudnn import is_acceptable
from torch.backends.cudnn.rnn import get_cudnn_mode
from torch.nn import functional as F


def run_layers(net: nn.RNNBase, x: Tensor) -> Tensor:
    """Return the states [B, T, H] of the last layer of a GRU or LSTM over x [B, T, I], starting from zeros."""
    for layer, parameters in enumerate(net.all_weights):
        weights: list[Tensor] = [*parameters]
        if layer:
            x = F.dropout(x, net.dropout, net.training)
        start = x.new_zeros(1, len(x), net.hidden_size)
        if net.mode == "LSTM":
            x = torch.lstm(x, (start, start), weights, True, 1, 0.0, net.training, False, True)[0]
        else:
            x = torch.gru(x, start, weights, True, 1, 0.0, net.training, False, True)[0]
    return x


def flatten_layers(net: nn.RNNBase) -> None:
    """Put the weights of each layer into one block of GPU memory, which cuDNN would otherwise do in every call."""
    with torch.no_grad():
        for parameters in net.all_weights:
            weights: list[Tensor] = [*parameters]
            if not is_acceptable(weights[0]):  # type: ignore[no-untyped-call]
                continue
            mode = get_cudnn_mode(net.mode)  # type: ignore[no-untyped-call]
            inputs, parts = weights[0].shape[1], len(weights)
            torch._cudnn_rnn_flatten_weight(weights, parts, inputs, mode, net.hidden_size, 0, 1, True, False)
