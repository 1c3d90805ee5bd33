"""How many workers each run of a cluster may have, and on which nodes.

- A minimum comes before anybody's growth: every run's minimum is placed first, in the order in which the runs came. So
  no run is kept from starting by another's wish for more.
- Growth is fair: the workers beyond the minimums are shared in proportion to (maximum - minimum) x priority. What a run
  has does not count: one that has more than its share leaves the rest to the others, which repeats no step.
- Nobody asks for more than the cluster can be: such a request launches nothing at all (ray/autoscaler/v2/scheduler.py,
  `_enforce_resource_constraints`), so it is cut to the largest cluster.
- Nodes that are about to leave have no place.
"""

import json
import os
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
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
    priority: float = 1.0
    renewed: float = field(default=0.0, compare=False)

    @property
    def growth(self) -> int:
        """How many workers it could use beyond its minimum."""
        return self.maximum - self.minimum

    @property
    def weight(self) -> Fraction:
        """What its share of the spare workers is proportional to."""
        return self.growth * Fraction(self.priority)


def allocate(claims: Sequence[Claim], nodes: Mapping[str, Bundle]) -> list[Counter[str]]:
    """The workers of each claim by node, of `nodes` {id: resources}; claims keep the places that they have.

    As many spare workers are shared (`apportion`) as have a place. What is left then suits some claims alone, as CPUs
    where others need a GPU, and goes to those.
    """
    start = _Placement(claims, nodes)
    limits = [claim.growth if start.place(number, claim.minimum) else 0 for number, claim in enumerate(claims)]

    def share(spare: int) -> "_Placement | None":
        """A placement with `spare` workers beyond the minimums; None if they do not all have a place."""
        counts = apportion(spare, [claim.weight for claim in claims], limits)
        trial = start.copy()
        return trial if all(trial.place(number, count) for number, count in enumerate(counts)) else None

    most = sum(limits)
    placement = share(most)
    if placement is None:
        fewer = bisect_left(range(1, most), True, key=lambda spare: share(spare) is None)
        placement = share(fewer) or start
    for number in _order_growth(claims):
        if placement.places[number].total() < claims[number].maximum:
            placement.place(number, 1)
    return placement.places


def apportion(spare: int, weights: Sequence[Fraction], limits: Sequence[int]) -> list[int]:
    """How many of `spare` workers each run gets, none more than its limit: in proportion to the weights, as whole
    workers, by the method of largest remainders; of equal remainders the first.

    What a run cannot use because of its limit is shared by the others. All workers are given away if the limits allow.
    """
    given = [0] * len(weights)
    sharing = {run for run, limit in enumerate(limits) if limit > 0}
    while sharing:
        total = sum(weights[run] for run in sharing)
        quotas = {run: spare * weights[run] / total for run in sharing}
        full = {run for run in sharing if quotas[run] >= limits[run]}
        if not full:
            remainders = {run: quota - int(quota) for run, quota in quotas.items()}
            rounded_up = sorted(sharing, key=lambda run: (-remainders[run], run))[: int(sum(remainders.values()))]
            for run, quota in quotas.items():
                given[run] = int(quota) + (run in rounded_up)
            break
        for run in full:
            given[run] = limits[run]
            spare -= limits[run]
        sharing -= full
    return given


def _order_growth(claims: Sequence[Claim]) -> list[int]:
    """Each claim once for each worker beyond its minimum, in an order of which every beginning is about fair."""
    steps = [
        (Fraction(2 * step + 1) / claim.weight, number)
        for number, claim in enumerate(claims)
        for step in range(claim.growth)
    ]
    return [number for _, number in sorted(steps)]


class _Placement:
    """The places of claims on nodes, while they are given away."""

    def __init__(self, claims: Sequence[Claim], nodes: Mapping[str, Bundle]) -> None:
        self.claims = claims
        self.free = {node: dict(resources) for node, resources in nodes.items()}
        self.places: list[Counter[str]] = [Counter() for _ in claims]

    def copy(self) -> "_Placement":
        made = _Placement(self.claims, self.free)
        made.places = [places.copy() for places in self.places]
        return made

    def place(self, number: int, count: int) -> bool:
        """Give claim `number` places for `count` further workers; returns whether there were as many."""
        claim, own = self.claims[number], self.places[number]
        for _ in range(count):
            fitting = [node for node, resources in self.free.items() if _fits(claim.bundle, resources)]
            if not fitting:
                return False
            node = max(fitting, key=lambda node: _preference(node, claim, own, self.claims))
            _take(claim.bundle, self.free[node])
            own[node] += 1
        return True


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
        self.decision: tuple[list[Claim], Mapping[str, Bundle], list[Counter[str]]] = ([], {}, [])  # the last one
        self.requested: list[Bundle] = []

    def claim(
        self,
        run: str,
        membership: str,
        minimum: int,
        maximum: int,
        bundle: Bundle,
        placed: Mapping[str, int],
        priority: float = 1.0,
    ) -> dict[str, int]:
        """Make or renew the claim of `run`; returns {node: workers} that it may have now."""
        with self.lock:
            self._forget()  # a run that is resumed must not wait for its own claim
            self.claims[run] = Claim(membership, minimum, maximum, bundle, placed, priority, self.clock())
            self._request()
            return dict(self._decide()[list(self.claims).index(run)])

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

    def _decide(self) -> list[Counter[str]]:
        """`allocate`, if claims or nodes have changed: every run asks each second."""
        claims, nodes = list(self.claims.values()), self.nodes()
        if (claims, nodes) != self.decision[:2]:
            self.decision = (claims, nodes, allocate(claims, nodes))
        return self.decision[2]

    def _forget(self) -> None:
        """Drop the claims of runs whose process has ended, and those that were not renewed for EXPIRE_SECONDS."""
        now = self.clock()
        self.claims = {
            name: claim
            for name, claim in self.claims.items()
            if now - claim.renewed <= EXPIRE_SECONDS and self.lives(claim.membership)
        }

    def _request(self) -> None:
        claims = list(self.claims.values())
        bundles = [claim.bundle for claim in claims for _ in range(claim.minimum)]
        bundles += [claims[number].bundle for number in _order_growth(claims)]  # a large wish is cut at its end
        if capacity := os.environ.get("RAYLAB_CLUSTER_CAPACITY"):
            bundles = clamp(bundles, json.loads(capacity))
        if bundles != self.requested:
            self.request(bundles)
            self.requested = bundles
