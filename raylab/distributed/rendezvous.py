"""The key-value store through which the members of a process group find one another.

It is a Ray actor owned by the run's driver: it outlives the members, and only holders of the cluster's token can reach
it. Nothing here imports torch, so that its process is small and starts fast.
"""

import asyncio
from collections.abc import Sequence


class Rendezvous:
    """The interface of torch.distributed.Store, as coroutines; `store.CallStore` is its client in each member."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = asyncio.Condition()

    async def set(self, key: str, value: bytes) -> None:
        await self._put(key, value)

    async def get(self, keys: Sequence[str], seconds: float) -> list[bytes] | None:
        """Wait until all `keys` exist and return their values; None if they do not exist within `seconds`."""
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(lambda: self._has(keys))
                return [self.values[key] for key in keys]
        except TimeoutError:
            return None

    async def has(self, keys: Sequence[str]) -> bool:
        return self._has(keys)

    async def add(self, key: str, amount: int) -> int:
        """Add `amount` to the number at `key`, initially 0, and return the sum; it is stored as decimal digits."""
        total = int(self.values.get(key, b"0")) + amount
        await self._put(key, str(total).encode())
        return total

    async def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Write `desired` if the value is `expected`, or if `key` is missing and `expected` is empty; return the value.

        If `key` is missing and `expected` is not empty, return `expected`, as torch's own stores do.
        """
        present = self.values.get(key)
        if present == expected or (present is None and not expected):
            await self._put(key, desired)
            return desired
        return expected if present is None else present

    async def delete(self, key: str) -> bool:
        return self.values.pop(key, None) is not None

    async def list_keys(self) -> list[str]:
        return list(self.values)

    def _has(self, keys: Sequence[str]) -> bool:
        return all(key in self.values for key in keys)

    async def _put(self, key: str, value: bytes) -> None:
        self.values[key] = value  # before the first await, so that a caller's read and write are atomic
        async with self.changed:
            self.changed.notify_all()
