"""VGG-19, ResNet-50 and any other torchvision classifier, for greyscale images and scenes; and the cost of a network.

The body keeps its three input channels, each of which gets the greyscale image, so that weights pretrained on colour
images fit unchanged. In VGGs, global average pooling replaces the two dense layers (119 of VGG-19's 139 million
parameters); the published comparison counts them this way (20 million).

For scenes the first convolution has as many channels as there are bands, unless these are three.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raylab.config.recipe import VisionModel
from raylab.errors import unknown
from raylab.models import first_layer
from raylab.models.weights import start_from

# Inception and GoogLeNet return auxiliary outputs in training; SqueezeNet has no dense layer to replace.
UNFIT = {"googlenet", "inception_v3", "squeezenet1_0", "squeezenet1_1"}


def names() -> list[str]:
    """Return the names that `classifier` accepts."""
    import torchvision  # not at module level, because importing it takes seconds at every worker's start

    return sorted(set(torchvision.models.list_models(module=torchvision.models)) - UNFIT)


class Vision(nn.Module):
    """A torchvision network: x float32 [B, channels, H, W] -> logits [B, outputs]; a greyscale image, [B, 1, H, W], is
    given to each of three channels.

    `body` computes features [B, F]; `head` is the classifier.
    """

    def __init__(
        self, body: nn.Module, replaced: str, features: int, outputs: int, dropout: float, channels: int = 3
    ) -> None:
        super().__init__()
        self.body = body
        self.channels = channels
        self.replaced = replaced  # torchvision's name of the classifier, which was removed from `body`
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.dropout(self.body(x.expand(-1, self.channels, -1, -1)))))


def classifier(name: str) -> Callable[[VisionModel, dict[str, Any], int], Vision]:
    """Return the factory of the torchvision classifier `name`, with random weights and a new head.

    The config has dropout (before the head) and weights (weights.py); torchvision's weights are loaded without their
    classifier.
    """

    def make(config: VisionModel, spec: dict[str, Any], outputs: int) -> Vision:
        if name not in names():
            raise unknown("torchvision classifier", name, names())
        return _make(name, config, spec, outputs)

    return make


def _make(name: str, config: VisionModel, spec: dict[str, Any], outputs: int) -> Vision:
    import torchvision

    # Vision transformers are built for one input size; all other networks accept any size.
    size = {"image_size": spec["size"]} if name.startswith("vit_") else {}
    body: nn.Module = torchvision.models.get_model(name, weights=None, **size)
    if isinstance(body, torchvision.models.VGG):
        features, dropped = 512, "classifier"
        body.avgpool, body.classifier = nn.AdaptiveAvgPool2d(1), nn.Identity()
    else:
        dropped, last = [(at, layer) for at, layer in body.named_modules() if isinstance(layer, nn.Linear)][-1]
        features = last.in_features
        parent, _, leaf = dropped.rpartition(".")
        setattr(body.get_submodule(parent), leaf, nn.Identity())
    bands = spec.get("bands", ())
    channels = len(bands) if len(bands) > 1 else 3
    if channels != 3:
        first_layer.replace(body, channels)
    network = Vision(body, dropped, features, outputs, config.dropout, channels)
    if config.weights:
        if len(bands) > 1:
            start_from(
                network, config.weights, lambda state: first_layer.spread(network, state, first_layer.RGB, bands)
            )
        else:
            start_from(network, config.weights)
    return network


resnet50 = classifier("resnet50")
vgg19 = classifier("vgg19")


def describe(model: nn.Module, size: int) -> dict[str, int]:
    """Return the number of parameters, and the multiply-accumulates (MACs) of convolutions and dense layers for one
    image of size x size px. Products inside attention are not counted."""
    macs = 0

    def count(layer: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Conv2d):
            macs += out.numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            macs += out.numel() * layer.in_features

    hooks = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    training, first = model.training, next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, size, size, device=first.device, dtype=first.dtype))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": macs}
