"""Networks that read pairs of images: both go through one network, whose weights keep their names, so that they fit the
same network for single images."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def adapt(make: Callable[[Any, dict[str, Any], int], nn.Module]) -> Callable[[Any, dict[str, Any], int], nn.Module]:
    """Return the factory of `make`'s networks that reads pairs where the spec says so: x float32 [B, 2, C, H, W] ->
    [B, outputs], the first half of the outputs for the first image, the second half for the other."""

    def build(config: Any, spec: dict[str, Any], outputs: int) -> nn.Module:
        if not spec["pairs"]:
            return make(config, spec, outputs)
        network = make(config, spec, outputs // 2)
        network.register_forward_pre_hook(_flatten)
        network.register_forward_hook(_unflatten)
        return network

    return build


def _flatten(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].flatten(0, 1),)


def _unflatten(network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.reshape(-1, 2 * output.shape[-1])
