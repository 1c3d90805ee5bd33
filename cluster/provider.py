"""Ray's node provider: turns the autoscaler's requests for nodes into Slurm jobs, one per node.

    demand -> autoscaler -> create -> sbatch ... squeue -> non_terminated_nodes -> autoscaler -> terminate -> scancel

This is a node provider v1, which an adapter runs under autoscaler v2. Ray does not support that (ray#57153), so a test
checks it against the locked Ray. It keeps no state: a job's comment says to which cluster, head and type it belongs, so
a new head knows everything at once. A node's id is JOB.RESTARTS: a requeued job is another node.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_LAUNCH_REQUEST,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster import scripts
from cluster.directory import Directory
from cluster.job_tag import JobTag
from cluster.slurm import Job, Slurm
from raylab.errors import SlurmError

HEAD = "head"  # id of the head's node; unless it is listed nothing scales (reconciler.py, Ray 2.60)
FRESH_SECONDS = 5.0  # interval between two calls of squeue; own submissions since are added without it
PROBLEMS = 3  # failed starts within 10 minutes after which no more nodes are requested


class SlurmProvider(NodeProvider):
    """Thread-safe, because Ray launches and terminates nodes from its own threads."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str, slurm: Slurm | None = None) -> None:
        super().__init__(provider_config, cluster_name)
        self.directory = Directory(Path(provider_config["directory"]))
        self.generation = int(provider_config["generation"])
        self.spec = self.directory.spec
        self.slurm = slurm or Slurm()
        self.lock = threading.RLock()
        self.seen: dict[str, tuple[Job, JobTag]] = {}  # current nodes
        self.known: dict[str, tuple[Job, JobTag]] = {}  # and former ones: other threads ask for tags after listing
        self.seen_at = float("-inf")

    def _nodes(self) -> dict[str, tuple[Job, JobTag]]:
        """Our workers by node id. Raises SlurmError if Slurm does not answer: an empty answer would end them all."""
        with self.lock:
            if time.monotonic() - self.seen_at > FRESH_SECONDS:
                found = [(job, JobTag.parse(job.comment)) for job in self.slurm.jobs() if job.alive]
                ours = {
                    f"{job.id}.{job.restarts}": (job, tag)
                    for job, tag in found
                    if tag is not None
                    and (tag.cluster, tag.generation, tag.kind) == (self.spec.id, self.generation, "worker")
                }
                held = {id: job for id, (job, _) in ours.items() if job.failed_to_launch}
                self._give_up(held)
                self.seen = {id: node for id, node in ours.items() if id not in held}
                self.known.update(self.seen)
                self.seen_at = time.monotonic()
            return self.seen

    def _give_up(self, held: Mapping[str, Job]) -> None:
        """Record and cancel jobs that Slurm will never start, so that others take their places."""
        for id, job in held.items():
            self.directory.problem(id, f"its node could not start job {job.id}, so Slurm held it for ever")
        self.slurm.cancel([job.id for job in held.values()])

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        ids = [HEAD, *self._nodes()]
        return [id for id in ids if tag_filters.items() <= self.node_tags(id).items()]

    def is_running(self, node_id: str) -> bool:
        here = self.seen
        return node_id == HEAD or (node_id in here and here[node_id][0].running)

    def is_terminated(self, node_id: str) -> bool:
        return node_id != HEAD and node_id not in self._nodes()

    def node_tags(self, node_id: str) -> dict[str, str]:
        if node_id == HEAD:
            return {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: "head",
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        _, tag = self.known[node_id]
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
            TAG_RAY_USER_NODE_TYPE: tag.type,
            TAG_RAY_LAUNCH_REQUEST: tag.request,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        }

    def internal_ip(self, node_id: str) -> str:
        return self.external_ip(node_id)

    def external_ip(self, node_id: str) -> str:
        return node_id if node_id == HEAD else self.known[node_id][0].node

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Submit `count` jobs. Raises SlurmError or UsageError if Slurm refuses or nodes repeatedly fail to start."""
        problems = self.directory.problems()
        if len(problems) >= PROBLEMS:
            raise SlurmError(f"{len(problems)} nodes failed to start in the last 10 minutes", problems[0]["text"])
        tag = JobTag(self.spec.id, self.generation, "worker", node_config["type"], tags.get(TAG_RAY_LAUNCH_REQUEST, ""))
        with self.lock:
            for _ in range(count):
                id = self.slurm.submit(scripts.worker(self.directory, tag))
                # listed at once, before the next call of squeue
                new = (Job(id, "PENDING", 0, None, "", "None", str(tag)), tag)
                self.seen[f"{id}.0"] = self.known[f"{id}.0"] = new

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        self.create_node_with_resources_and_labels(node_config, tags, count, {}, {})

    def terminate_node(self, node_id: str) -> None:
        self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> None:
        """Cancel the jobs of these nodes; a job that was requeued meanwhile is another node and stays."""
        with self.lock:
            here = self._nodes()
            ending = [id for id in node_ids if id in here]
            self.slurm.cancel([here[id][0].id for id in ending])
            self.seen = {id: node for id, node in here.items() if id not in ending}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Do nothing: tags are derived from Slurm."""
