"""When a group of workers starts, grows and makes way: Ray Train's elastic policy, with what it lacks.

- A minimum comes before anybody's growth: a run asks for its minimum with high priority and for the rest with low, so
  that of several runs on a cluster each gets its minimum, and none is blocked by another's wish for more.
- Nobody asks for more than the cluster can be: such a request launches nothing at all (ray/autoscaler/v2/scheduler.py,
  `_enforce_resource_constraints`), so it is cut to the largest cluster.
- A checkpoint comes before a planned resize: the policy leaves a note in the run's directory, the workers see it at
  their next report, commit, and end; the next attempt has the new size. Ray's own resize drops what is not saved.
- Nodes that are about to leave do not count; nor is a run resized that has less to go than a resize costs.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    _AutoscalingCoordinatorActor,
)
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylab.files import write_json
from raylab.training import ledger

NOTE = "resize.json"  # in a run's directory: its workers shall make way for another number
EXPIRE_SECONDS = 180.0  # a request is forgotten when its run has not renewed it
RENEW_SECONDS = 20.0
ANSWER_SECONDS = 10.0

Bundle = Mapping[str, float]
Reserved = dict[str, dict[str, float]]


def clamp(bundles: Sequence[Bundle], capacity: Mapping[str, Any]) -> list[Bundle]:
    """The bundles, in their order, that fit into the largest that the cluster can be; the others are left out.

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
    """Ask the autoscaler for all runs' bundles together, cut to RAYLAB_CLUSTER_CAPACITY where the cluster has one."""
    from ray.autoscaler.sdk import request_resources

    capacity = os.environ.get("RAYLAB_CLUSTER_CAPACITY")
    if capacity is None or label_selectors:
        request_resources(bundles=bundles, bundle_label_selectors=label_selectors)
    else:
        request_resources(bundles=clamp(bundles, json.loads(capacity)))


def coordinator() -> Any:
    """Ray's coordinator of all requests, an actor that the cluster has one of, with `request` as its way out.

    The first run of a cluster makes it, on its own node (the head, which outlives workers).
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_AutoscalingCoordinatorActor)
    name = "AutoscalingCoordinator"
    options = {"name": name, "namespace": name, "get_if_exists": True, "lifetime": "detached"}
    return actor.options(**options, scheduling_strategy=here).remote(send_resources_request=request)


def moved(directory: Path) -> bool:
    """Whether the run's last attempt made way for another."""
    return ledger.is_handed_over(ledger.read_ledger(directory / ledger.FILE))


class ElasticPolicy(ElasticScalingPolicy):
    """Lives in the run's controller. `planned`: the steps of the whole run, `directory`: where its ledger is."""

    def __init__(self, scaling: ScalingConfig, directory: Path, planned: int) -> None:
        super().__init__(scaling)
        self.directory, self.planned = directory, planned
        self.renewed = float("-inf")
        self.seen: tuple[float, int] | None = None  # time and step of the look before
        self.looked = float("-inf")
        self.reserved: Reserved | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """One requester for all attempts of a run: what it has stays reserved from one to the next."""
        self._requester_id = f"raylab:{self.directory}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        self._send_resource_request()

    def _send_resource_request(self) -> None:
        low, high = self.scaling_config.min_workers, self.scaling_config.max_workers
        bundle = dict(self.scaling_config._resources_per_worker_not_none)
        for id, count, priority in self._requests(low, high):
            _ask(
                self._autoscaling_coordinator.request_resources,
                requester_id=id,
                resources=[bundle] * count,
                expire_after_s=EXPIRE_SECONDS,
                priority=priority,
            )
        self.renewed = time.monotonic()

    def _requests(self, low: int, high: int) -> list[tuple[str, int, ResourceRequestPriority]]:
        asked = [(str(self._requester_id), low, ResourceRequestPriority.HIGH)]
        if high > low:
            asked.append((f"{self._requester_id}-growth", high - low, ResourceRequestPriority.LOW))
        return asked

    def _maybe_send_resource_request(self) -> None:
        if time.monotonic() - self.renewed > RENEW_SECONDS:
            self._send_resource_request()

    def _cancel_resource_request(self) -> None:
        # nodes that nothing asks for between two attempts would be given back
        if self._coordinator_client is not None and not moved(self.directory):
            for id, _, _ in self._requests(0, 1):
                _ask(self._autoscaling_coordinator.cancel_request, id)

    def _get_reserved_resources(self) -> Reserved | None:
        """Both requests' resources on nodes that stay, as the cluster is now: Ray's own view is up to 20 s old."""
        now = time.monotonic()
        if now - self.looked < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self.reserved
        self.looked, self.reserved = now, None
        leaving = set(ray._private.state.state.get_draining_nodes())
        total: Reserved = {}
        for id, _, _ in self._requests(0, 1):
            found = _ask(self._autoscaling_coordinator.get_reserved_resources, id, recompute=True)
            if found is None:
                return None
            for node, resources in found.items():
                mine = total.setdefault(node, {})
                for name, amount in resources.items():
                    mine[name] = mine.get(name, 0) + amount
        self.reserved = {node: resources for node, resources in total.items() if node not in leaving}
        return self.reserved

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        """Never Ray's own resize: a note to the workers, when another number is possible and worth it."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, NoopDecision) or (self.directory / NOTE).exists():
            return NoopDecision()
        if self._seconds_left() > self.scaling_config.elastic_resize_monitor_interval_s:
            write_json(self.directory / NOTE, {"workers": decision.num_workers})
        return NoopDecision()

    def _seconds_left(self) -> float:
        """Of the run at its present pace; infinite until it has one."""
        step = max(ledger.steps(ledger.read_ledger(self.directory / ledger.FILE)), default=0)
        now, before = time.monotonic(), self.seen
        self.seen = (now, step)
        if before is None or step <= before[1]:
            return float("inf") if step < self.planned else 0.0
        return (self.planned - step) * (now - before[0]) / (step - before[1])


def _ask(method: Any, *arguments: Any, **options: Any) -> Any:
    """A call of the coordinator; None when it does not answer, for the next look to try again."""
    try:
        return ray.get(method.remote(*arguments, **options), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return None


class ElasticTrainer(TorchTrainer):
    """A TorchTrainer whose controller has the policy above."""

    def __init__(self, *arguments: Any, policy: ElasticPolicy, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.policy = policy

    def _create_default_callbacks(self) -> list[Any]:
        """Without Ray Data, of which nothing is used here: its manager is a process of 200 MB a group of workers."""
        return [one for one in super()._create_default_callbacks() if not isinstance(one, DatasetsCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        coordinator()
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": self.policy})
