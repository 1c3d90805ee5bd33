"""The keys and values of a rendezvous behave as those of torch's own stores do."""

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from raylab.distributed.rendezvous import Rendezvous


def run(call: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(call)


def test_the_same_answers_as_torchs_own_store():
    ours, theirs = Rendezvous(), dist.HashStore()
    run(ours.set("k", b"v"))
    theirs.set("k", "v")
    assert run(ours.get(["k"], 1)) == [theirs.get("k")]
    for amount in (3, -1):
        assert run(ours.add("n", amount)) == theirs.add("n", amount)
    assert run(ours.get(["n"], 1)) == [theirs.get("n")] == [b"2"]
    assert run(ours.has(["k", "n"])) == theirs.check(["k", "n"]) is True
    assert run(ours.has(["k", "absent"])) == theirs.check(["k", "absent"]) is False
    for expected, desired in (("v", "w"), ("v", "x"), ("w", "y")):
        same = theirs.compare_set("k", expected, desired)
        assert run(ours.compare_set("k", expected.encode(), desired.encode())) == same
    assert run(ours.compare_set("new", b"", b"first")) == theirs.compare_set("new", "", "first")
    assert run(ours.compare_set("none", b"some", b"x")) == b"some"
    assert run(ours.delete("k")) == theirs.delete_key("k") is True
    assert run(ours.delete("k")) == theirs.delete_key("k") is False
    assert sorted(run(ours.list_keys())) == ["n", "new"]


def test_a_wait_ends_as_soon_as_the_last_key_is_there():
    async def both() -> Any:
        rendezvous = Rendezvous()
        waiting = asyncio.ensure_future(rendezvous.get(["a", "b"], 60))
        await rendezvous.set("b", b"2")
        await asyncio.sleep(0)
        assert not waiting.done()
        await rendezvous.set("a", b"1")
        return await waiting

    assert run(both()) == [b"1", b"2"]


def test_a_wait_for_what_does_not_come_ends():
    assert run(Rendezvous().get(["never"], 0.01)) is None


def test_concurrent_additions_are_all_counted():
    async def all_of_them() -> Any:
        rendezvous = Rendezvous()
        await asyncio.gather(*(rendezvous.add("n", 1) for _ in range(100)))
        return await rendezvous.get(["n"], 1)

    assert run(all_of_them()) == [b"100"]


def test_the_interface_of_an_address():
    from raylab.errors import RunError
    from raylab.interfaces import interface_of

    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(RunError, match=r"192\.0\.2\.99"):
        interface_of("192.0.2.99")


def test_a_store_waits_no_longer_than_its_timeout_or_its_group():
    from raylab.distributed.store import CallStore

    rendezvous, is_broken = Rendezvous(), False

    def call(method: str, *values: Any) -> Any:
        return run(getattr(rendezvous, method)(*values))

    store = CallStore(call, lambda: is_broken)
    prefixed = dist.PrefixStore("group", store)
    prefixed.set("k", "v")
    assert prefixed.get("k") == b"v"
    assert store.list_keys() == ["group/k"]
    store.set_timeout(timedelta(seconds=0.02))
    with pytest.raises(dist.DistStoreError, match=r"waited 0\.02 s for absent"):
        store.wait(["absent"])
    store.set_timeout(timedelta(seconds=60))
    is_broken = True
    with pytest.raises(dist.DistStoreError, match="waited 0 s for absent"):
        store.wait(["absent"])
