"""The Ray Train backend that starts and ends the process group of a run.

Imported by the run's controller, whose process does not need torch: only the workers load it.
"""

import logging
import secrets
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylab.distributed.rendezvous import Rendezvous

log = logging.getLogger(__name__)

LEAVE_SECONDS = 30.0


def create_rendezvous() -> Any:
    """Start a Rendezvous actor on this driver's node (on a cluster the head, which outlives the workers).

    It lives as long as the driver holds the handle: it survives the death of any worker and spans all attempts.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Rendezvous).options(scheduling_strategy=here).remote()


@dataclass
class StoreConfig(BackendConfig):
    """Config of a process group: torch's `backend`, such as gloo, and the `rendezvous` (`create_rendezvous`)."""

    backend: str
    rendezvous: Any

    @property
    def backend_cls(self) -> type:
        return _StoreBackend

    @property
    def train_func_context(self) -> Any:
        """Ray's own context on GPUs, which makes the worker's GPU torch's default device."""
        if "cuda" not in self.backend:
            return nullcontext
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH


class _StoreBackend(Backend):
    """Runs in the controller of the run."""

    share_cuda_visible_devices = True  # as Ray Train's own backend of torch does

    def on_start(self, worker_group: Any, backend_config: StoreConfig) -> None:
        size = len(worker_group)
        prefix = secrets.token_hex(8)  # keeps a straggler of the previous group out of this one
        rendezvous, backend = backend_config.rendezvous, backend_config.backend
        joined = [
            worker_group.execute_single_async(rank, _join, rendezvous, backend, prefix, rank, size)
            for rank in range(size)
        ]
        ray.get(joined)

    def on_shutdown(self, worker_group: Any, backend_config: StoreConfig) -> None:
        try:
            ray.get(worker_group.execute_async(_leave), timeout=LEAVE_SECONDS)
        except GetTimeoutError:
            log.warning("workers did not leave the process group within %.0f s", LEAVE_SECONDS)


def _join(*arguments: Any) -> None:
    from raylab.distributed.store import join_group

    join_group(*arguments)


def _leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
