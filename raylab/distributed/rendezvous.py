"""Keys and values by which the members of a process group find one another. A Ray actor of a run's driver holds them,
so they outlive members, and who has not the cluster's token reaches none. Nothing here imports torch: its process is
small and starts fast."""

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
        """The values of `keys` as soon as all exist; None if they do not within `seconds`."""
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(lambda: self._has(keys))
                return [self.values[key] for key in keys]
        except TimeoutError:
            return None

    async def has(self, keys: Sequence[str]) -> bool:
        return self._has(keys)

    async def add(self, key: str, amount: int) -> int:
        """Add `amount` to the number at `key`, initially 0, and return it; it is stored in decimal digits."""
        total = int(self.values.get(key, b"0")) + amount
        await self._put(key, str(total).encode())
        return total

    async def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Write `desired` where `expected` is, or where nothing is and `expected` is empty; what is there then.

        Where nothing is and `expected` is not empty, it is given back, as torch's own stores do.
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
        self.values[key] = value  # before the first await: a read and its write are one step
        async with self.changed:
            self.changed.notify_all()
