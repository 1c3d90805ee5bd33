"""Forms the process group of a run's workers: through a store behind Ray's token, on the cluster's network interface.

Ray Train would use torch's TCPStore, which listens on every interface and lets anyone who connects read and write keys.
"""

import os
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from raylab.errors import RunError

# Kept until this process ends: torch holds only the C++ half of a store, which calls its Python half
_stores: list[Store] = []
TIMEOUT_SECONDS = 1800.0
CALL_SECONDS = 10.0  # a wait repeats its call this often, so that the wait of a dead member ends soon


class RayStore(Store):
    """A torch.distributed store backed by a Rendezvous actor. `set_timeout` sets `timeout`, as in every store."""

    timeout: timedelta  # torch's attribute, missing from its type hints

    def __init__(self, rendezvous: Any) -> None:
        super().__init__()
        self.rendezvous = rendezvous

    def set(self, key: str, value: str | bytes) -> None:
        ray.get(self.rendezvous.set.remote(key, _to_bytes(value)))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._get(keys, self.timeout)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._get(keys, self.timeout if timeout is None else timeout)

    def check(self, keys: list[str]) -> bool:
        exist: bool = ray.get(self.rendezvous.has.remote(list(keys)))
        return exist

    def add(self, key: str, amount: int) -> int:
        total: int = ray.get(self.rendezvous.add.remote(key, amount))
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        call = self.rendezvous.compare_set.remote(key, _to_bytes(expected), _to_bytes(desired))
        present: bytes = ray.get(call)
        return present

    def delete_key(self, key: str) -> bool:
        deleted: bool = ray.get(self.rendezvous.delete.remote(key))
        return deleted

    def list_keys(self) -> list[str]:
        keys: list[str] = ray.get(self.rendezvous.list_keys.remote())
        return keys

    def num_keys(self) -> int:
        return len(self.list_keys())

    def clone(self) -> "RayStore":
        return RayStore(self.rendezvous)

    def _get(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        left = timeout.total_seconds()
        while left > 0:
            seconds = min(left, CALL_SECONDS)
            values: list[bytes] | None = ray.get(self.rendezvous.get.remote(list(keys), seconds))
            if values is not None:
                return values
            left -= seconds
        raise dist.DistStoreError(f"waited {timeout.total_seconds():g} s for {', '.join(keys)}")


def _to_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def join_group(
    rendezvous: Any, backend: str, prefix: str, rank: int, size: int, timeout_s: float = TIMEOUT_SECONDS
) -> None:
    """Make this process rank `rank` of `size` of a new process group that communicates over this node's interface.

    Its keys are at `rendezvous` under `prefix`. A collective that takes longer than `timeout_s` raises.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # = matches exactly; plain eth1 also matches eth10
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray Train does: fail if a collective hangs
    _stores.append(RayStore(rendezvous))
    dist.init_process_group(
        backend,
        store=PrefixStore(prefix, _stores[-1]),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def interface_of(address: str) -> str:
    """Return the network interface with the IPv4 or IPv6 `address`: lo for a local Ray, the site's on a cluster."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in [a.address.partition("%")[0] for a in addresses]:
            return str(name)
    raise RunError(
        f"no network interface of this node has the address {address}",
        "Ray uses this address for this node, and the workers of a run would communicate over it",
        "start Ray with --node-ip-address=ADDRESS of an interface of this node",
    )
