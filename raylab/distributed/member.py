"""A worker's side of the membership of its run: it joins, forms groups, and watches while it trains."""

import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import PrefixStore, Store

from raylab.distributed.membership import LEFT, WATCH_SECONDS, Roster, Signal
from raylab.distributed.store import CallStore
from raylab.errors import RunError
from raylab.training.process_group import ProcessGroup

Call = Callable[..., Any]
"""Calls a method of the run's Membership by its name, and waits for the answer."""

ANSWER_SECONDS = 10.0  # a wait for a roster asks again after so long
FORMATIONS = 10  # groups in a row that may break while they form


class Expelled(Exception):
    """Raised in a worker that the run goes on without."""


class Refused(Exception):
    """Raised, with the reason, in a worker whose code, packages or data differ from those of the run."""


class Member:
    """This process as the worker `name` of a run: its `peers`.

    `silence_seconds` is the membership's; a collective fails after as long.
    """

    def __init__(
        self,
        name: str,
        call: Call,
        silence_seconds: float,
        identity: Mapping[str, str],
        on_gpu: bool = False,
    ) -> None:
        self.name, self.call, self.on_gpu = name, call, on_gpu
        self.identity, self.silence_seconds = identity, silence_seconds
        self.generation = 0
        self.answer = (0, Signal())  # the last one to a watch, and the generation that it is about
        self.asked_at = time.monotonic()  # when this process asked for it: from then on it counts as alive
        self.retired: list[tuple[float, Any]] = []  # groups that broke: gloo's threads may still be in a collective
        self.backend: Any = None
        self.store: CallStore | None = None  # torch holds its C++ half only, which calls this one
        self.watcher = threading.Thread(target=self._watch, name="membership", daemon=True)

    @property
    def signal(self) -> Signal:
        """What this worker knows about its present group."""
        generation, signal = self.answer
        return signal if generation == self.generation or signal.expelled is not None else Signal()

    def must_regroup(self) -> bool:
        return self.signal.is_changing

    def is_leaving(self) -> bool:
        return self.signal.is_leaving

    def form_group(self, position: int) -> tuple[ProcessGroup, int | None]:
        """See Peers. Raises Expelled where the run goes on without this worker."""
        if self.watcher.ident is None:
            self._join()
        elif self.signal.is_broken or not self.signal.is_changing:
            self.call("report_failure", self.generation)
        for _ in range(FORMATIONS):
            self._retire()
            roster = None
            while roster is None:
                if self.signal.expelled is not None:
                    raise Expelled(self.signal.expelled)
                roster = self.call("form", self.name, self.generation, position, ANSWER_SECONDS)
            if isinstance(roster, str):
                raise Expelled(roster)
            self.generation = roster.generation
            try:
                return self._connect(roster), roster.leader
            except (RuntimeError, dist.DistStoreError):
                self.call("report_failure", roster.generation)
        raise RunError(
            f"the workers of this run could not connect to one another, {FORMATIONS} times in a row",
            do="see Ray's logs, and raylab doctor for the network between the nodes",
        )

    def leave(self) -> None:
        """This worker has handed over: the others need not wait for it."""
        self.call("remove", self.name, LEFT)

    def _join(self) -> None:
        why = self.call("join", self.name, self.identity)
        if why is not None:
            raise Refused(why)
        self.watcher.start()

    def _connect(self, roster: Roster) -> ProcessGroup:
        rank, size = roster.members.index(self.name), len(roster.members)
        generation = roster.generation

        def is_broken() -> bool:
            is_cut_off = time.monotonic() - self.asked_at > self.silence_seconds
            is_expelled = self.signal.expelled is not None
            return is_cut_off or is_expelled or self.signal.is_broken or self.generation != generation

        if size == 1:
            return ProcessGroup(None, is_broken)
        self.store = CallStore(self.call, is_broken)
        store, timeout = PrefixStore(f"{generation}", self.store), timedelta(seconds=self.silence_seconds)
        self.backend = gloo = ProcessGroupGloo(store, rank, size, timeout)
        if self.on_gpu:
            self.backend = _with_nccl(gloo, PrefixStore("nccl", store), rank, size, timeout)
        return ProcessGroup(self.backend, is_broken)

    def _retire(self) -> None:
        """Put the broken group away until its last collective has timed out: to end it earlier would block."""
        now = time.monotonic()
        self.retired = [(at, group) for at, group in self.retired if now - at < 2 * self.silence_seconds]
        if self.backend is not None:
            if self.on_gpu:
                self.backend.abort()
            self.retired.append((now, self.backend))
            self.backend = None

    def _watch(self) -> None:
        seconds = min(WATCH_SECONDS, self.silence_seconds / 4)
        while self.signal.expelled is None:
            asked_at, generation, known = time.monotonic(), self.generation, self.signal
            try:
                signal = self.call("watch", self.name, generation, known, seconds)
            except Exception as error:  # whatever Ray raises when the driver is gone
                signal = Signal(expelled=f"the run's driver does not answer: {error}")
            # In this order, and not the time of the answer, which may have waited for a process that hung
            self.answer, self.asked_at = (generation, signal), asked_at


def _with_nccl(gloo: ProcessGroupGloo, store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A group that takes tensors of the CPU to `gloo` and those of a GPU to NCCL."""
    from torch.distributed import ProcessGroupNCCL

    group = dist.ProcessGroup(store, rank, size)
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    for device, kind, backend in (
        ("cpu", dist.ProcessGroup.BackendType.GLOO, gloo),
        ("cuda", dist.ProcessGroup.BackendType.NCCL, ProcessGroupNCCL(store, rank, size, options)),
    ):
        backend._set_sequence_number_for_group()
        group._register_backend(torch.device(device), kind, backend)
    return group
