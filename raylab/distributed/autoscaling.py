"""The combined resource request that all runs of a cluster send to its autoscaler.

Imported by Ray's coordinator actor, whose process does not need torch: keep torch out of this module.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Bundle = Mapping[str, float]


def clamp(bundles: Sequence[Bundle], capacity: Mapping[str, Any]) -> list[Bundle]:
    """Return the bundles, in order, that fit into the cluster at its maximum size; drop the others.

    `capacity`: {"max": nodes in all, "types": [{"count", "resources": of one node}]}.
    """
    room: list[dict[str, float]] = []
    left = [int(kind["count"]) for kind in capacity["types"]]
    fitting = []
    for bundle in bundles:
        at = next((node for node in room if _fits(bundle, node)), None)
        if at is None and len(room) < capacity["max"]:
            for number, kind in enumerate(capacity["types"]):
                if left[number] and _fits(bundle, kind["resources"]):
                    left[number] -= 1
                    at = dict(kind["resources"])
                    room.append(at)
                    break
        if at is not None:
            for name, amount in bundle.items():
                at[name] = at.get(name, 0) - amount
            fitting.append(bundle)
    return fitting


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in bundle.items())


def request(bundles: list[Bundle], label_selectors: list[dict[str, str]] | None = None) -> None:
    """Request the bundles of all runs from the autoscaler, limited to RAYLAB_CLUSTER_CAPACITY if it is set."""
    from ray.autoscaler.sdk import request_resources

    capacity = os.environ.get("RAYLAB_CLUSTER_CAPACITY")
    if capacity is None or label_selectors:
        request_resources(bundles=bundles, bundle_label_selectors=label_selectors)
    else:
        request_resources(bundles=clamp(bundles, json.loads(capacity)))


def coordinator() -> Any:
    """Return Ray's autoscaling coordinator, the cluster's only one, which sends its requests through `request`.

    The first run on a cluster creates it on its own node (the head, which outlives the workers).
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AutoscalingCoordinatorActor)
    name = "AutoscalingCoordinator"
    options = {"name": name, "namespace": name, "get_if_exists": True, "lifetime": "detached"}
    return actor.options(**options, scheduling_strategy=here).remote(send_resources_request=request)
