"""The Allocator of the connected Ray: what its nodes are, and how the autoscaler is asked for more.

In a file of its own because its process imports it: a run's first worker waits until that process answers.
"""

import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylab.distributed.allocation import Allocator, Bundle

RENEW_SECONDS = 10.0  # between two looks at claims that nobody renews


class ClusterAllocator(Allocator):
    """The Allocator of the connected cluster. A thread of its own drops the claims of runs that were killed."""

    def __init__(self) -> None:
        super().__init__(list_nodes, request_bundles, lives)
        threading.Thread(target=self._drop_expired, daemon=True).start()

    def _drop_expired(self) -> None:
        while True:
            time.sleep(RENEW_SECONDS)
            self.drop_expired()


def find_allocator() -> Any:
    """The cluster's one Allocator, made on this node (the head, which outlives workers) by the first run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ClusterAllocator)
    options = {"name": "allocator", "namespace": "raylab", "get_if_exists": True, "lifetime": "detached"}
    return actor.options(**options, scheduling_strategy=here).remote()


def list_nodes() -> dict[str, Bundle]:
    """The resources of each node that is alive and not about to leave."""
    leaving = list_draining_nodes()
    nodes = sorted(ray.nodes(), key=lambda node: node["NodeID"])
    return {n["NodeID"]: n["Resources"] for n in nodes if n["Alive"] and n["NodeID"] not in leaving}


def list_draining_nodes() -> set[str]:
    """The ids of the nodes that Ray drains: because of a time limit, a preemption, or because they are idle."""
    return set(ray._private.state.state.get_draining_nodes())


def lives(actor: str) -> bool:
    """Whether the actor of this id is there or will be: Ray does not know one yet that was just made."""
    return bool(ray._private.state.actors(actor).get("State") != "DEAD")


def request_bundles(bundles: list[Bundle]) -> None:
    """Ask the autoscaler for nodes on which all of `bundles` fit."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle) for bundle in bundles])
