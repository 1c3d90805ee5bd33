"""When a group of workers starts, grows and hands over: Ray Train's elastic policy with four additions.

- Minimum before growth: a run requests its minimum with high priority and the rest with low priority. Each of several
  runs on a cluster gets its minimum, and none is blocked by another run's request to grow.
- No request exceeds the cluster's maximum size, because the autoscaler launches nothing at all for such a request
  (ray/autoscaler/v2/scheduler.py, `_enforce_resource_constraints`).
- Checkpoint before resize: the policy writes a note to the run directory; the workers see it at their next report,
  save a checkpoint and end; the next attempt starts with the new size. Ray's own resize loses unsaved steps.
- Draining nodes do not count, and a run is not resized if it will end sooner than a resize pays off.
"""

import time
from pathlib import Path
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import ResourceRequestPriority
from ray.train import ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raylab.distributed.autoscaling import coordinator
from raylab.files import write_json
from raylab.training import ledger

NOTE = "resize.json"  # in a run directory: asks its workers to hand over to an attempt of another size
EXPIRE_SECONDS = 180.0  # a request expires unless its run renews it
RENEW_SECONDS = 20.0
ANSWER_SECONDS = 10.0

Reserved = dict[str, dict[str, float]]


def has_handed_over(directory: Path) -> bool:
    """Whether the run's last attempt ended to hand over to the next one."""
    return ledger.is_handed_over(ledger.read_ledger(directory / ledger.FILE))


class ElasticPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy with the additions above; runs in the controller of the run.

    `planned`: total steps of the run; `directory`: the run directory, which contains the ledger.
    """

    def __init__(self, scaling: ScalingConfig, directory: Path, planned: int) -> None:
        super().__init__(scaling)
        self.directory, self.planned = directory, planned
        self.renewed = float("-inf")
        self.last_progress: tuple[float, int] | None = None  # time and step at the previous check
        self.reserved_at = float("-inf")
        self.reserved: Reserved | None = None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Use one requester id for all attempts of a run, so that its resources stay reserved between them."""
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
        requests = [(str(self._requester_id), low, ResourceRequestPriority.HIGH)]
        if high > low:
            requests.append((f"{self._requester_id}-growth", high - low, ResourceRequestPriority.LOW))
        return requests

    def _maybe_send_resource_request(self) -> None:
        if time.monotonic() - self.renewed > RENEW_SECONDS:
            self._send_resource_request()

    def _cancel_resource_request(self) -> None:
        # the autoscaler would release nodes that nothing requests between two attempts
        if self._coordinator_client is not None and not has_handed_over(self.directory):
            for id, _, _ in self._requests(0, 1):
                _ask(self._autoscaling_coordinator.cancel_request, id)

    def _get_reserved_resources(self) -> Reserved | None:
        """Return the resources of both requests on nodes that are not draining; Ray's own view is up to 20 s old."""
        now = time.monotonic()
        if now - self.reserved_at < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self.reserved
        self.reserved_at, self.reserved = now, None
        leaving = set(ray._private.state.state.get_draining_nodes())
        total: Reserved = {}
        for id, _, _ in self._requests(0, 1):
            by_node = _ask(self._autoscaling_coordinator.get_reserved_resources, id, recompute=True)
            if by_node is None:
                return None
            for node, resources in by_node.items():
                node_total = total.setdefault(node, {})
                for name, amount in resources.items():
                    node_total[name] = node_total.get(name, 0) + amount
        self.reserved = {node: resources for node, resources in total.items() if node not in leaving}
        return self.reserved

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        """Write a note to the workers if another size is possible and worth it; Ray itself never resizes the group."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, NoopDecision) or (self.directory / NOTE).exists():
            return NoopDecision()
        if self._seconds_left() > self.scaling_config.elastic_resize_monitor_interval_s:
            write_json(self.directory / NOTE, {"workers": decision.num_workers})
        return NoopDecision()

    def _seconds_left(self) -> float:
        """Estimate the remaining time of the run from its recent speed; infinite until that is known."""
        step = max(ledger.steps(ledger.read_ledger(self.directory / ledger.FILE)), default=0)
        now, before = time.monotonic(), self.last_progress
        self.last_progress = (now, step)
        if before is None or step <= before[1]:
            return float("inf") if step < self.planned else 0.0
        return (self.planned - step) * (now - before[0]) / (step - before[1])


def _ask(method: Any, *arguments: Any, **options: Any) -> Any:
    """Call the coordinator; return None if it does not answer, so that the next check tries again."""
    try:
        return ray.get(method.remote(*arguments, **options), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return None


class ElasticTrainer(DataParallelTrainer):
    """Ray Train's trainer of data-parallel workers, with `ElasticPolicy` in its controller."""

    def __init__(self, *arguments: Any, policy: ElasticPolicy, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.policy = policy

    def _create_default_callbacks(self) -> list[Any]:
        """Return Ray's callbacks without that of Ray Data, which is unused and costs a 200 MB process per group."""
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        coordinator()
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": self.policy})
