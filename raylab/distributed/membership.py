"""Who trains: the one place that decides which workers form the process group of a run, and when it forms anew.

A group lasts for one generation. It is broken when a member dies, falls silent, or sees a collective fail; it changes
at a step boundary when a worker has come or must go. Either way everyone who is left says how far its state is, the
next roster is closed as soon as all of them have, and whoever is behind takes the state of whoever is ahead. A worker
that was expelled, because it fell silent, belongs to no later generation, whatever it does when it wakes up.

Like the rendezvous below it, this is an actor of the run's driver: it outlives every worker, and the side of a
partitioned network that cannot reach it forms no group.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylab.distributed.rendezvous import Rendezvous

START_SECONDS = 60.0  # in which a process that starts says at least once that it is alive: imports may hold it up
LOAD_SECONDS = 300.0  # that a start may take in any case: it imports libraries, checks the data and loads it
SLOWEST = 10  # how many times longer than the quickest worker another may take to start
WATCH_SECONDS = 1.0  # a worker's watch is answered at least this often: its next one is its heartbeat
LEFT = "it has left"


@dataclass(frozen=True)
class Roster:
    """The members of one generation, rank by rank, and how far the state of each is (-1: it has none)."""

    generation: int
    members: tuple[str, ...]
    positions: tuple[int, ...]

    @property
    def leader(self) -> int | None:
        """The rank whose state the others take: of those farthest ahead the first; None where all are equally far."""
        farthest = max(self.positions)
        return None if min(self.positions) == farthest else self.positions.index(farthest)


@dataclass(frozen=True)
class Signal:
    """What a worker learns from its watch.

    `is_broken`: its group is of no more use; `is_changing`: a new one is due at the next step boundary; `is_leaving`:
    it must hand over there; `expelled`: why it must stop.
    """

    is_broken: bool = False
    is_changing: bool = False
    is_leaving: bool = False
    expelled: str | None = None


class Delivery(NamedTuple):
    """What the driver takes at a time: `rows` of metrics, by member the load of its node, why each worker that is gone
    is gone, by member records of its work, and by member since how many seconds it starts."""

    rows: list[dict[str, Any]]
    node_samples: list[tuple[str, dict[str, float]]]
    gone: dict[str, str]
    work: list[tuple[str, dict[str, Any]]]
    starting: dict[str, float]


class Membership(Rendezvous):
    """Workers `greet` while they start, `join` when they could train, `form` a group, train and `watch` meanwhile, and
    `form` again when told to.

    `minimum`: workers with which an attempt begins. A worker is expelled that does not watch for `silence_seconds`,
    keeps all others waiting for as long, does not greet for START_SECONDS while it starts, or is not ready when another
    one has long been, as where its data is on a disk that hangs.
    """

    def __init__(self, minimum: int, silence_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.minimum, self.silence_seconds, self.clock = minimum, silence_seconds, clock
        self.identity: Mapping[str, str] | None = None
        self.roster = Roster(0, (), ())
        self.is_broken = False
        self.starting: dict[str, float] = {}  # of each worker that is yet to join: when it last called
        self.began: dict[str, float] = {}  # of each worker that is yet to join: when it first called
        self.quickest: float | None = None  # seconds that a worker took to start
        self.heard: dict[str, float] = {}  # of each worker that may train: when it last called
        self.leaving: set[str] = set()
        self.expelled: dict[str, str] = {}
        self.positions: dict[str, int] = {}  # of those who have come to form the next group
        self.waiting_since: float | None = None  # since when a member of the group waits for the others to come
        self.rows: list[dict[str, Any]] = []  # of metrics, on their way to the driver
        self.delivered = 0  # the last step whose row the driver has
        self.node_samples: list[tuple[str, dict[str, float]]] = []  # member and the load of its node, on their way
        self.work: list[tuple[str, dict[str, Any]]] = []  # member and a record of its work, on their way

    async def greet(self, member: str) -> bool:
        """Note that `member` is alive; returns whether it is yet to join."""
        if member in self.heard or member in self.expelled:
            return False
        self.starting[member] = self.clock()
        self.began.setdefault(member, self.starting[member])
        return True

    async def join(self, member: str, identity: Mapping[str, str]) -> str | None:
        """Count on `member`, unless it has been told to leave; returns why not, where what it runs or trains on differs
        from what the others do."""
        if self.identity is None:
            self.identity = dict(identity)
        for name, own in identity.items():
            if own != self.identity.get(name):
                return f"its {name} is {own}, that of the other workers {self.identity.get(name)}"
        self.starting.pop(member, None)
        began = self.began.pop(member, None)
        if member not in self.expelled:
            self.heard[member] = self.clock()
            if began is not None:
                took = self.heard[member] - began
                self.quickest = took if self.quickest is None else min(took, self.quickest)
        return None

    async def form(self, member: str, generation: int, position: int, seconds: float) -> Roster | str | None:
        """The next roster after `generation` with `member` in it; why it is in none any more; None when that takes over
        `seconds`, after which it asks again."""

        def is_decided() -> bool:
            return member in self.expelled or (self.roster.generation > generation and member in self.roster.members)

        if member in self.heard and not is_decided():
            if member in self.roster.members and not set(self.positions) & set(self.roster.members):
                self.waiting_since = self.clock()
            self.heard[member], self.positions[member] = self.clock(), position
            await self._close_roster()
            await self._notify()
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(is_decided)
        except TimeoutError:
            return None
        return self.expelled.get(member, self.roster)

    async def watch(self, member: str, generation: int, known: Signal, seconds: float) -> Signal:
        """What `member` of `generation` must know: at once where that differs from `known`, else after `seconds`."""
        if member in self.heard:
            self.heard[member] = self.clock()
        await self.expel_silent()
        try:
            async with asyncio.timeout(seconds), self.changed:
                await self.changed.wait_for(lambda: self._signal(member, generation) != known)
        except TimeoutError:
            pass
        return self._signal(member, generation)

    async def report_failure(self, generation: int) -> None:
        """A collective of `generation` has failed at some member."""
        if generation == self.roster.generation:
            self.is_broken = True
            await self._notify()

    async def leave(self, member: str) -> None:
        """`member` is to hand over at the next step boundary; one that is in no group yet has nothing to hand over."""
        if member in self.roster.members and member in self.heard:
            self.leaving.add(member)
            await self._notify()
        elif member not in self.expelled:
            self.expelled[member] = LEFT
            await self.remove(member, LEFT)

    async def remove(self, member: str, why: str, was_needed: bool = True) -> None:
        """`member` has died, has left or is expelled; the others go on, in a new group if it `was_needed`."""
        self._forget_start(member)
        if self.heard.pop(member, None) is None:
            return
        self.expelled[member] = why
        self.positions.pop(member, None)
        if was_needed and member in self.roster.members and member not in self.leaving:
            self.is_broken = True
        self.leaving.discard(member)
        if not set(self.positions) & set(self.roster.members):
            self.waiting_since = None
        await self._close_roster()
        await self._notify()

    async def expel_silent(self) -> None:
        """Expel whoever has not called for too long, or does not come while the others wait."""
        now, limit = self.clock(), self.silence_seconds
        to_start = max(limit, START_SECONDS)
        for member in [m for m, at in self.starting.items() if now - at > to_start]:
            self._forget_start(member)
            self.expelled[member] = f"it was silent for {to_start:g} s while it started"
        if self.quickest is not None:
            to_load = max(LOAD_SECONDS, SLOWEST * self.quickest)
            for member in [m for m, at in self.began.items() if now - at > to_load]:
                self._forget_start(member)
                self.expelled[member] = (
                    f"it was not ready after {to_load:.0f} s, another worker after {self.quickest:.0f} s"
                )
        for member in [m for m, at in self.heard.items() if now - at > limit]:
            await self.remove(member, f"it was silent for {limit:g} s")
        if self.waiting_since is not None and now - self.waiting_since > limit:
            for member in (set(self.heard) & set(self.roster.members)) - set(self.positions):
                await self.remove(member, f"it kept the others waiting for {limit:g} s")

    async def send(self, rows: list[dict[str, Any]]) -> int:
        """Take rows of metrics for the driver; returns the last step whose row it has."""
        self.rows += rows
        return self.delivered

    async def send_node_sample(self, member: str, sample: dict[str, float]) -> None:
        """Take the load of the node of `member` for the driver."""
        self.node_samples.append((member, sample))

    async def send_work(self, member: str, record: dict[str, Any]) -> None:
        """Take a record of the work of `member` for the driver."""
        self.work.append((member, record))

    async def receive(self, delivered: int) -> Delivery:
        """The driver, which has the rows up to step `delivered`, takes what has come since: each step's row once, also
        where a new writer sends again what the one before has sent."""
        await self.expel_silent()
        self.delivered = max(self.delivered, delivered)
        rows: list[dict[str, Any]] = []
        for row in self.rows:
            if row["step"] > (rows[-1]["step"] if rows else self.delivered):
                rows.append(row)
        self.rows = []
        samples, self.node_samples = self.node_samples, []
        work, self.work = self.work, []
        starting = {member: self.clock() - at for member, at in self.began.items()}
        return Delivery(rows, samples, self.expelled, work, starting)

    def _forget_start(self, member: str) -> None:
        self.starting.pop(member, None)
        self.began.pop(member, None)

    def _signal(self, member: str, generation: int) -> Signal:
        if member in self.expelled:
            return Signal(expelled=self.expelled[member])
        if generation == 0:  # it is in no group yet
            return Signal()
        members = set(self.roster.members)
        return Signal(
            is_broken=self.is_broken or generation != self.roster.generation,
            is_changing=not set(self.positions) <= members or bool(self.leaving & members),
            is_leaving=member in self.leaving,
        )

    async def _close_roster(self) -> None:
        """Close the next roster when everyone who trains has come; an attempt begins with the minimum. Who trains does
        not wait for a newcomer, which may hang before it comes."""
        here = set(self.positions)
        training = set(self.heard) & set(self.roster.members)
        if not here or not (training or set(self.heard)) <= here:
            return
        if max(self.positions.values()) < 0 and len(here) < self.minimum:
            return
        stay = [member for member in self.roster.members if member in here]
        members = (*stay, *(member for member in self.heard if member in here and member not in stay))
        positions = tuple(self.positions[member] for member in members)
        self.roster = Roster(self.roster.generation + 1, members, positions)
        self.is_broken, self.positions, self.waiting_since = False, {}, None
        await self._notify()

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()
