"""A plugin: raylab's GRU, which rests before each shard that it computes on Ray.

Runs that train until they are stopped would otherwise take the processors from what the tests wait for, and train so
many steps that the undisturbed runs, with which they are compared, take minutes. A rest changes no number.
"""

import sys
import time
from typing import Any, Literal

from torch import nn

from raylab.config.recipe import RecurrentModel
from raylab.models import recurrent
from raylab.tasks.plugins import OwnModel, Plugin

REST_SECONDS = 0.03
PACED = "model.name=paced-gru"


class PacedModel(RecurrentModel):
    name: Literal["paced-gru"]  # type: ignore[assignment]
    """name of the model"""


def build(settings: PacedModel, spec: dict[str, Any], outputs: int) -> nn.Module:
    network = recurrent.gru(settings, spec, outputs)
    network.register_forward_pre_hook(rest)
    return network


def rest(network: nn.Module, inputs: object) -> None:
    ray = sys.modules.get("ray")
    if network.training and ray is not None and ray.is_initialized():
        time.sleep(REST_SECONDS)


PLUGIN = Plugin(models=(OwnModel(PacedModel, build),))
