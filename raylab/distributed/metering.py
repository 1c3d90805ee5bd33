"""The meter of a worker on Ray."""

from collections.abc import Callable
from typing import Any

import ray

from raylab.config.recipe import Scaling
from raylab.work import WorkMeter


def meter_work(worker: str, scaling: Scaling, write: Callable[[dict[str, Any]], None]) -> WorkMeter:
    """The meter of this process, which holds what `scaling` gives a worker of what Ray has on this node."""
    here = ray.get_runtime_context().get_node_id()
    has = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    wants = scaling.resources()
    share = max((wants[name] / has[name] for name in wants if has.get(name)), default=1.0)
    return WorkMeter(worker, scaling.cpus_per_worker, min(1.0, share), scaling.gpu, write)
