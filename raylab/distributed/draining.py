"""A training process that leaves with its node: how a trial in its own process is told."""

import threading

import ray

from raylab.distributed.cluster_allocator import list_draining_nodes
from raylab.training.peers import FixedPeers

LOOK_SECONDS = 1.0


class NodePeers(FixedPeers):
    """This process alone, which must hand over as soon as its node drains. A thread of its own looks."""

    def __init__(self) -> None:
        super().__init__()
        self.node = ray.get_runtime_context().get_node_id()
        self.has_ended = threading.Event()
        self.drains = False
        self.thread = threading.Thread(target=self._watch, name="draining", daemon=True)

    def __enter__(self) -> "NodePeers":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.has_ended.set()
        self.thread.join()

    def is_leaving(self) -> bool:
        return self.drains

    def _watch(self) -> None:
        while not self.drains and not self.has_ended.wait(LOOK_SECONDS):
            self.drains = self.node in list_draining_nodes()
