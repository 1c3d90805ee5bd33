"""torch.distributed's store over the run's Rendezvous: behind Ray's token, on the cluster's own interface.

Ray Train would use torch's TCPStore, which listens on every interface and lets anyone who connects read and write keys.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

CALL_SECONDS = 1.0  # a wait asks again after this long, so that one of a member that died soon ends


class CallStore(Store):
    """Keys and values at a Rendezvous, whose methods `call` calls by name. `timeout` is set by `set_timeout`.

    A wait for keys ends with DistStoreError when `is_broken` says that whoever was to set them is gone.
    """

    timeout: timedelta  # torch's attribute, missing from its type hints

    def __init__(self, call: Callable[..., Any], is_broken: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.call, self.is_broken = call, is_broken

    def set(self, key: str, value: str | bytes) -> None:
        self.call("set", key, _to_bytes(value))

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._get(keys, self.timeout)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._get(keys, self.timeout if timeout is None else timeout)

    def check(self, keys: list[str]) -> bool:
        there: bool = self.call("has", list(keys))
        return there

    def add(self, key: str, amount: int) -> int:
        total: int = self.call("add", key, amount)
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        present: bytes = self.call("compare_set", key, _to_bytes(expected), _to_bytes(desired))
        return present

    def delete_key(self, key: str) -> bool:
        deleted: bool = self.call("delete", key)
        return deleted

    def list_keys(self) -> list[str]:
        keys: list[str] = self.call("list_keys")
        return keys

    def num_keys(self) -> int:
        return len(self.list_keys())

    def clone(self) -> "CallStore":
        return CallStore(self.call, self.is_broken)

    def _get(self, keys: list[str], timeout: timedelta) -> list[bytes]:
        left = timeout.total_seconds()
        while left > 0 and not self.is_broken():
            seconds = min(left, CALL_SECONDS)
            values: list[bytes] | None = self.call("get", list(keys), seconds)
            if values is not None:
                return values
            left -= seconds
        raise dist.DistStoreError(f"waited {timeout.total_seconds() - left:g} s for {', '.join(keys)}")


def _to_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
