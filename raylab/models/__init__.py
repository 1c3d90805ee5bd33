"""Networks. A new one is a function (config, spec, outputs) -> nn.Module and a line in MODELS."""

from collections.abc import Callable
from typing import Any

from torch import nn

from raylab.config import Model
from raylab.models import baselines, covidnet, recurrent, vision

MODELS: dict[str, dict[str, Callable[[Model, dict[str, Any], int], nn.Module]]] = {
    "icu-hourly": {
        "gru": recurrent.gru,
        "lstm": recurrent.lstm,
        "grud": recurrent.grud,
        "boosting": baselines.boosting,
        "logistic": baselines.logistic,
        "last_pf": baselines.last_pf,
        "last_sf": baselines.last_sf,
    },
    "cxr-frontal-u8": {
        "covidnet": covidnet.covidnet,
        "resnet50": vision.resnet50,
        "vgg19": vision.vgg19,
    },
}
"""By kind of input (a data set's `spec["kind"]`), then by name."""
