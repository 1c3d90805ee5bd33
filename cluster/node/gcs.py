"""Requests of an agent to Ray's control store (GCS): drain a node, read the cluster's status.

Ray is imported late, because it reads the environment at import, and only nodes need it.
"""

import time
from typing import Any

DRAIN_SECONDS = 3.0  # of one request: a hanging store must not use up the node's remaining time


def drain(address: str, seconds: float, why: str, instance: str | None = None, with_head: bool = False) -> list[str]:
    """Tell Ray that nodes will end in `seconds`: the one started as `instance`, or all, the head's only `with_head`.

    Returns the ids (hex) of the draining nodes. Runs notice it, because Ray lists them as draining.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    client = GcsClient(address=address)
    deadline = int((time.time() + seconds) * 1000)
    drained = []
    for node_id, node in client.get_all_node_info(timeout=DRAIN_SECONDS).items():
        wanted = with_head or not node.is_head_node if instance is None else node.instance_id == instance
        if wanted and node.state == gcs_pb2.GcsNodeInfo.ALIVE:
            # the hexadecimal id: Ray accepts a binary one but drains nothing
            accepted, _ = client.drain_node(
                node_id.hex(), autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION, why, deadline, timeout=DRAIN_SECONDS
            )
            if accepted:
                drained.append(node_id.hex())
    return drained


def status(address: str, dashboard: str) -> dict[str, Any]:
    """{"nodes", "demand", "jobs"}: Ray's nodes, the resource requests that wait, the running jobs."""
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.job_submission import JobSubmissionClient

    state = get_cluster_status(address)
    nodes = []
    for node in (*state.active_nodes, *state.idle_nodes):
        usage = node.resource_usage.usage if node.resource_usage else []
        nodes.append(
            {
                "instance": node.instance_id,
                "type": node.ray_node_type_name,
                "ip": node.ip_address,
                "state": node.node_status,
                "resources": {u.resource_name: [u.used, u.total] for u in usage if u.resource_name in ("CPU", "GPU")},
            }
        )
    demands = state.resource_demands
    demand = [
        {"bundle": dict(bundle.bundle), "count": bundle.count}  # for a task this is a protobuf map
        for one in (
            *demands.ray_task_actor_demand,
            *demands.placement_group_demand,
            *demands.cluster_constraint_demand,
        )
        for bundle in one.bundles_by_count
    ]
    jobs = [
        {"id": job.submission_id, "status": str(job.status), "entrypoint": job.entrypoint}
        for job in JobSubmissionClient(dashboard).list_jobs()
        if job.submission_id and job.status in ("PENDING", "RUNNING")
    ]
    return {"nodes": nodes, "demand": demand, "jobs": jobs}
