"""How many workers each run of a cluster may have, and on which nodes.

- A minimum comes before anybody's growth: every run's minimum is placed first, in the order in which the runs came,
  then what each could use beyond it. So no run is kept from starting by another's wish for more.
- Nobody asks for more than the cluster can be: such a request launches nothing at all (ray/autoscaler/v2/scheduler.py,
  `_enforce_resource_constraints`), so it is cut to the largest cluster.
- Nodes that are about to leave have no place.
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

EXPIRE_SECONDS = 180.0  # a claim is forgotten when its run lives but has not renewed it

Bundle = Mapping[str, float]


@dataclass
class Claim:
    """What a run wants: `minimum` to `maximum` workers of `bundle` each; `placed`: how many it has now, by node.

    `membership`: the id of its Membership, an actor that Ray ends with the process that runs it.
    """

    membership: str
    minimum: int
    maximum: int
    bundle: Bundle
    placed: Mapping[str, int]
    renewed: float = field(default=0.0, compare=False)


def allocate(claims: Sequence[Claim], nodes: Mapping[str, Bundle]) -> list[Counter[str]]:
    """The workers of each claim by node, of `nodes` {id: resources}; claims keep the places that they have."""
    free = {node: dict(resources) for node, resources in nodes.items()}
    places: list[Counter[str]] = [Counter() for _ in claims]
    for wanted in ("minimum", "maximum"):
        for claim, own in zip(claims, places, strict=True):
            while own.total() < getattr(claim, wanted):
                fitting = [node for node, resources in free.items() if _fits(claim.bundle, resources)]
                if not fitting:
                    break
                node = max(fitting, key=lambda node: _preference(node, claim, own, claims))
                _take(claim.bundle, free[node])
                own[node] += 1
    return places


def _preference(node: str, claim: Claim, own: Counter[str], claims: Sequence[Claim]) -> tuple[bool, int]:
    """A node where the claim has a worker that is not counted yet; else where others have the fewest."""
    others = sum(other.placed.get(node, 0) for other in claims if other is not claim)
    return own[node] < claim.placed.get(node, 0), -others


def clamp(bundles: Sequence[Bundle], capacity: Mapping[str, Any]) -> list[Bundle]:
    """The bundles, in their order, that fit into the largest that the cluster can be; the others are left out.

    `capacity`: {"max": nodes in all, "types": [{"count", "resources": of one node}]}.
    """
    room: list[dict[str, float]] = []
    left = [int(kind["count"]) for kind in capacity["types"]]
    fitting = []
    for bundle in bundles:
        at = next((node for node in room if _fits(bundle, node)), None)
        if at is None and len(room) < capacity["max"]:
            for number, kind in enumerate(capacity["types"]):
                if left[number] and _fits(bundle, kind["resources"]):
                    left[number] -= 1
                    at = dict(kind["resources"])
                    room.append(at)
                    break
        if at is not None:
            _take(bundle, at)
            fitting.append(bundle)
    return fitting


def _fits(bundle: Bundle, resources: Bundle) -> bool:
    return all(resources.get(name, 0) >= amount for name, amount in bundle.items())


def _take(bundle: Bundle, resources: dict[str, float]) -> None:
    for name, amount in bundle.items():
        resources[name] = resources.get(name, 0) - amount


class Allocator:
    """The one place of a cluster where its runs claim workers: an actor on the head, which outlives runs.

    `nodes` returns the resources of every node that stays; `request` asks the autoscaler for bundles; `lives` says
    whether there is an actor of this id.
    """

    def __init__(
        self,
        nodes: Callable[[], Mapping[str, Bundle]],
        request: Callable[[list[Bundle]], None],
        lives: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nodes, self.request, self.lives, self.clock = nodes, request, lives, clock
        self.lock = threading.Lock()
        self.claims: dict[str, Claim] = {}
        self.requested: list[Bundle] = []

    def claim(
        self, run: str, membership: str, minimum: int, maximum: int, bundle: Bundle, placed: Mapping[str, int]
    ) -> dict[str, int]:
        """Make or renew the claim of `run`; returns {node: workers} that it may have now."""
        with self.lock:
            self._forget()  # a run that is resumed must not wait for its own claim
            self.claims[run] = Claim(membership, minimum, maximum, bundle, placed, self.clock())
            self._request()
            names = list(self.claims)
            return dict(allocate(list(self.claims.values()), self.nodes())[names.index(run)])

    def release(self, run: str) -> None:
        """`run` wants no workers any more."""
        with self.lock:
            self.claims.pop(run, None)
            self._request()

    def drop_expired(self) -> None:
        """Forget the claims of runs that were killed or hang."""
        with self.lock:
            self._forget()
            self._request()

    def _forget(self) -> None:
        """Drop the claims of runs whose process has ended, and those that were not renewed for EXPIRE_SECONDS."""
        now = self.clock()
        self.claims = {
            name: claim
            for name, claim in self.claims.items()
            if now - claim.renewed <= EXPIRE_SECONDS and self.lives(claim.membership)
        }

    def _request(self) -> None:
        wanted = self.claims.values()
        bundles = [*_repeat(wanted, lambda c: c.minimum), *_repeat(wanted, lambda c: c.maximum - c.minimum)]
        if capacity := os.environ.get("RAYLAB_CLUSTER_CAPACITY"):
            bundles = clamp(bundles, json.loads(capacity))
        if bundles != self.requested:
            self.request(bundles)
            self.requested = bundles


def _repeat(claims: Iterable[Claim], count: Callable[[Claim], int]) -> list[Bundle]:
    return [claim.bundle for claim in claims for _ in range(count(claim))]
