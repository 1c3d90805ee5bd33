"""How the workers of a run become one process group: over a store behind Ray's token, on the cluster's own interface.

Ray Train's own way is torch's TCPStore: it listens on every interface, and whoever connects reads and writes keys.
"""

import os
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from raylab.errors import RunError

# Of this process's groups, until its end: torch holds the C++ half of a store only, which calls its Python half
_stores: list[Store] = []
TIMEOUT_SECONDS = 1800.0
CALL_SECONDS = 10.0  # a wait asks again after this long, so that one of a member that died soon ends


class RayStore(Store):
    """torch.distributed's store over a Rendezvous actor. `timeout`, as of every store, is set by `set_timeout`."""

    timeout: timedelta  # torch's own, which its type hints leave out

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
        there: bool = ray.get(self.rendezvous.has.remote(list(keys)))
        return there

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
    """Make this process rank `rank` of `size` of a new process group, whose data goes over this node's interface.

    Keys are found at `rendezvous` below `prefix`. A collective that takes `timeout_s` raises.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # = is exact; without it eth1 means eth10 as well
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray Train does: fail where a collective hangs
    _stores.append(RayStore(rendezvous))
    dist.init_process_group(
        backend,
        store=PrefixStore(prefix, _stores[-1]),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )


def interface_of(address: str) -> str:
    """The network interface that has the IPv4 or IPv6 `address`: lo of a local Ray, the site's on a cluster."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in [a.address.partition("%")[0] for a in addresses]:
            return str(name)
    raise RunError(
        f"no network interface of this node has the address {address}",
        "Ray calls this node by it, and the workers of a run would talk to one another over it",
        "start Ray with --node-ip-address=ADDRESS of an interface of this node",
    )
