"""Networks. To add one, write a function (config, spec, outputs) -> nn.Module and add a line to MODELS."""

from collections.abc import Callable
from typing import Any

from torch import nn

from raylab.config.recipe import CXR_FRONTAL, ICU_HOURLY, LUNG_PARAMETERS, SCENES, SECTIONS
from raylab.errors import unknown
from raylab.models import baselines, covidnet, pairs, recurrent, scenes, surrogate, vision

Factory = Callable[[Any, dict[str, Any], int], nn.Module]
"""(recipe.model, spec of the inputs, outputs) -> network"""

MODELS: dict[str, dict[str, Factory]] = {
    ICU_HOURLY: {
        "gru": recurrent.gru,
        "lstm": recurrent.lstm,
        "grud": recurrent.grud,
        "boosting": baselines.boosting,
        "logistic": baselines.logistic,
        "last_pf": baselines.last_pf,
        "last_sf": baselines.last_sf,
    },
    CXR_FRONTAL: {
        "covidnet": covidnet.covidnet,
        "covidnet-large": covidnet.large,
        "resnet50": vision.resnet50,
        "vgg19": vision.vgg19,
    },
    LUNG_PARAMETERS: {"residual": surrogate.residual},
    SCENES: {"cnn": scenes.scene_cnn, "boosting": scenes.scene_boosting, "resnet50": vision.resnet50},
    SECTIONS: {"cnn": pairs.adapt(scenes.scene_cnn), "resnet50": pairs.adapt(vision.resnet50)},
}
"""By kind of input (a data set's `spec["kind"]`), then by name."""


def network(kind: str, name: str) -> Factory:
    """Return the factory of `name` for inputs of `kind`: one of MODELS, or any torchvision classifier for images."""
    models = MODELS[kind]
    if name in models:
        return models[name]
    if kind in (CXR_FRONTAL, SCENES, SECTIONS):
        if name in vision.names():
            return pairs.adapt(vision.classifier(name)) if kind == SECTIONS else vision.classifier(name)
        raise unknown("model", name, {*models, *vision.names()})
    raise unknown("model", name, models)
