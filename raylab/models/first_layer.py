"""The first convolution of a network for scenes: as many channels as bands, and pretrained weights spread over them."""

import logging
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

COLOURS = {"B02": "blue", "B03": "green", "B04": "red"}
RGB = ("red", "green", "blue")


def spread_bands(weight: Tensor, given: Sequence[str], bands: Sequence[str]) -> tuple[Tensor, str]:
    """Spread the weights [O, given, k, k] of a first convolution over `bands`; returns [O, bands, k, k], and how in
    words.

    A band that the weights know, by its name or its colour, keeps its weights; any other gets the mean over those
    given. All are scaled by given / bands, so that the sums over channels keep their size; the same bands stay as they
    are.
    """
    known = {COLOURS.get(name, name): at for at, name in enumerate(given)}
    names = [COLOURS.get(name, name) for name in bands]
    if [known.get(name) for name in names] == list(range(len(given))):
        return weight, "pretrained weights of the first layer fit the bands as they are"
    mean = weight.mean(1)
    stacked = torch.stack([weight[:, known[name]] if name in known else mean for name in names], 1)
    own = [band for band, name in zip(bands, names, strict=True) if name in known]
    others = [band for band, name in zip(bands, names, strict=True) if name not in known]
    factor = len(given) / len(bands)
    parts = [f"{', '.join(own)} keep their own"] if own else []
    parts += [f"the mean over {', '.join(given)} for {', '.join(others)}"] if others else []
    return stacked * factor, f"pretrained weights of the first layer: {'; '.join(parts)}; all scaled by {factor:.3g}"


def replace(body: nn.Module, channels: int) -> None:
    """Give the first convolution of `body` so many input channels, with new weights."""
    name, old = next((at, layer) for at, layer in body.named_modules() if isinstance(layer, nn.Conv2d))
    form: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **form)
    parent, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(parent), leaf, new)


def spread(
    network: nn.Module, state: dict[str, Tensor], given: Sequence[str], bands: Sequence[str]
) -> dict[str, Tensor]:
    """Return `state`, whose first convolution reads the bands `given`, for a network of `bands`; logs how.

    Names may be those of torchvision, which lack `body.`, and of an ensemble.
    """
    convolutions = (name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    first = next(convolutions, None)
    if first is None:
        return state
    out = dict(state)
    for name, weight in state.items():
        if _without_prefixes(name) == f"{_without_prefixes(first)}.weight" and weight.shape[1] == len(given):
            out[name], words = spread_bands(weight, given, bands)
            _tell(words)
    return out


def _without_prefixes(name: str) -> str:
    return re.sub(r"^members\.\d+\.", "", name).removeprefix("body.")


@cache
def _tell(words: str) -> None:
    """Log once in a process: a run builds its network several times."""
    log.warning("%s", words)
