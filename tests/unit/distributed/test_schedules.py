"""Workers come, leave, die and hang as a random schedule says: the run ends as one that nothing happened to.

RAYLAB_SCHEDULES says how many schedules are tried. A schedule that fails is printed; to try it again, give it to the
test as an `@example(...)`.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from raylab.config.overrides import override
from raylab.distributed.membership import LEFT
from raylab.tasks.recipes import shipped_recipe
from raylab.training import ledger
from raylab.training.run import execute, load_samples
from tests.crew import Crew
from tests.faults import BY_WRITER, IN_STEP, WHILE_FORMING, Fault, arm

COUNT = int(os.environ.get("RAYLAB_SCHEDULES", "10"))
STEPS, INTERVAL, MAXIMUM = 16, 5, 5
RECIPE = override(  # shards of 32 rows, so that those of a rank share a pass; a fifth worker has none
    shipped_recipe("surrogate", smoke=True),
    {"loop.shards": 4, "loop.ema_decay": 0.9, "model.dropout": 0.2, "schedule.kind": "plateau",
     "loop.epochs": STEPS // 4, "loop.checkpoint_steps": INTERVAL},
)  # fmt: skip
SILENCE_SECONDS = 2.0
FACTS = ("steps", "val", "best", "weights_sha256")


@dataclass(frozen=True)
class Join:
    """A worker comes once `step` steps are done; `fault` strikes it on its way into the group."""

    step: int
    fault: Fault | None = None


@dataclass(frozen=True)
class Leave:
    """The worker of rank `rank` (modulo the size of the group) is told to leave once `step` steps are done."""

    step: int
    rank: int


@dataclass(frozen=True)
class Break:
    """The group breaks once `step` steps are done."""

    step: int


@dataclass(frozen=True)
class Schedule:
    """`workers` begin; a Fault strikes where it says."""

    workers: int
    events: tuple[Join | Leave | Break | Fault, ...]


def faults(phases: tuple[str, ...], steps: st.SearchStrategy[int], ranks: st.SearchStrategy[int | None]) -> Any:
    how = st.sampled_from([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    return st.builds(Fault, how, st.sampled_from(phases), steps, ranks)


steps, ranks = st.integers(0, STEPS - 1), st.integers(0, MAXIMUM - 1)
newcomer_faults = faults(("form", "connect", "after connect", "state", "after state", "pids"), st.just(0), st.none())
events = st.one_of(
    st.builds(Join, steps, st.one_of(st.none(), st.none(), newcomer_faults)),
    st.builds(Leave, steps, ranks),
    faults(IN_STEP, steps, ranks),
    faults(BY_WRITER, steps, ranks),
    st.builds(lambda fault: (fault, Break(fault.step)), faults(WHILE_FORMING, steps, ranks)),
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    chosen = draw(st.lists(events, min_size=3, max_size=6))
    flat = [part for event in chosen for part in (event if isinstance(event, tuple) else (event,))]
    return Schedule(draw(st.integers(1, MAXIMUM)), tuple(sorted(flat, key=lambda event: event.step)))


def train(data: Path, directory: Path, peers: Any, send: Callable[..., int]) -> None:
    execute(RECIPE, *load_samples(RECIPE, data), directory, send, peers=peers, flush_seconds=0)


class Play:
    """One schedule on real processes."""

    def __init__(self, schedule: Schedule, data: Path, folder: Path) -> None:
        self.schedule, self.folder = schedule, folder
        self.directory = folder / "run"
        self.directory.mkdir()
        self.faults = [event for event in schedule.events if isinstance(event, Fault)]
        self.stops = [event for event in schedule.events if not isinstance(event, Fault)]  # at which the run waits
        self.crew = Crew(self.directory, partial(train, data), schedule.workers, SILENCE_SECONDS)
        self.arm = partial(arm, self.faults, [event.step for event in self.stops], folder)
        self.newcomers: dict[int, str] = {}  # by the stop at which they came

    def run(self) -> None:
        deadline = time.monotonic() + 90
        with self.crew:
            for _ in range(self.schedule.workers):
                self.crew.start(self.arm)
            while not (self.directory / "result.json").is_file() or self.alive():
                assert time.monotonic() < deadline, self.describe()
                self.wake_hung()
                self.keep_minimum()
                for number, event in enumerate(self.stops):
                    if (self.folder / f"at-{number}").exists() and not (self.folder / f"go-{number}").exists():
                        self.serve(number, event)
                time.sleep(0.01)
            self.crew.wait_for_end()

    def alive(self) -> list[str]:
        """The workers that train, or may; at the end nobody is left but those who wait for a group that never forms."""
        waiting = self.crew.desk.membership.positions if (self.directory / "result.json").is_file() else {}
        return [name for name in self.crew.processes if name not in self.crew.ended and name not in waiting]

    def serve(self, number: int, event: Join | Leave | Break) -> None:
        """Let `event` happen; the run goes on as soon as it has."""
        membership = self.crew.desk.membership
        if isinstance(event, Leave):
            members = membership.roster.members
            self.crew.leave(members[event.rank % len(members)])
        elif isinstance(event, Break):
            self.crew.desk.call("report_failure", membership.roster.generation)
        elif number not in self.newcomers:
            if len(self.alive()) < MAXIMUM:
                self.newcomers[number] = self.start_newcomer(number, event)
                return
        else:
            name = self.newcomers[number]
            has_come = name in membership.positions or name in membership.roster.members
            if not has_come and name not in self.crew.ended and not self.has_struck(name):
                return
        (self.folder / f"go-{number}").touch()

    def start_newcomer(self, number: int, event: Join) -> str:
        if event.fault is None:
            return self.crew.start(self.arm)
        own = self.folder / f"newcomer-{number}"
        own.mkdir()
        return self.crew.start(partial(arm_twice, self.arm, partial(arm, [event.fault], [], own)))

    def struck(self) -> list[tuple[Path, str]]:
        """The mark of each fault that has struck, and whom."""
        marks = [*self.folder.glob("fault-*"), *self.folder.glob("newcomer-*/fault-*")]
        return [(mark, self.crew.name_of(int(text))) for mark in marks if (text := mark.read_text())]

    def has_struck(self, name: str) -> bool:
        return name in [victim for _, victim in self.struck()]

    def wake_hung(self) -> None:
        """Who hangs goes on once the others have gone on without it, or, if it has not joined, late."""
        membership = self.crew.desk.membership
        for _, name in self.struck():
            if name not in membership.heard and name not in self.crew.ended:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    self.crew.kill(name, signal.SIGCONT)

    def keep_minimum(self) -> None:
        """Start a worker where too few are left: for the first group, and later where nobody is, for a new attempt."""
        gone = self.crew.desk.membership.expelled
        left = [name for name in self.crew.processes if name not in self.crew.ended and name not in gone]
        if self.crew.members:
            self.crew.desk.membership.minimum = 1
        if len(left) < self.crew.desk.membership.minimum and not (self.directory / "result.json").is_file():
            self.crew.start(self.arm)

    def check(self, expected: dict[str, Any]) -> None:
        result = json.loads((self.directory / "result.json").read_text())
        assert {name: result[name] for name in FACTS} == expected
        entries = ledger.read_ledger(self.directory / ledger.FILE)
        reached, saved, has_moved, begun = 0, 0, False, 0
        before: tuple[int, ...] = ()  # the group
        gone: set[int] = set()  # the last groups of earlier attempts
        for entry in entries:
            if isinstance(entry, ledger.Start):
                begun += 1
                assert entry.attempt == begun - 1
                repeated = reached - entry.start
                # the newest checkpoint, and one that was being written
                assert 0 <= repeated <= (0 if has_moved else 2 * INTERVAL), f"{repeated} steps were repeated"
                assert entry.start >= saved
                reached, has_moved = entry.start, False
                gone |= set(before)
            if isinstance(entry, ledger.Group):
                before = entry.pids
                assert not gone & set(before), "the attempt is new, though a worker of the one before was left"
            assert entry.attempt == begun - 1
            if isinstance(entry, ledger.Step):
                assert entry.step == reached + 1, "no step twice, and none is missing"
                reached = entry.step
            saved = entry.checkpoint if isinstance(entry, ledger.Checkpoint) else saved
            has_moved |= isinstance(entry, ledger.HandOver)
        assert reached == expected["steps"]
        assert [row["step"] for row in self.crew.rows] == list(range(1, expected["steps"] + 1)), "each row once"
        for name, code in self.crew.ended.items():
            assert code in (0, 3, -signal.SIGKILL), f"{name} ended with {code}"
            why = self.crew.desk.membership.expelled.get(name, "")
            assert code != 0 or why in ("", LEFT, "it has died"), f"{name} was expelled and went on"

    def describe(self) -> str:
        membership = self.crew.desk.membership
        lines = "\n".join(map(str, self.crew.ledger()[-12:]))
        return f"{self.crew.ended}\n{vars(membership)}\n{self.struck()}\n{lines}"


def arm_twice(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


@pytest.fixture(scope="module")
def calm(surrogate_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("calm") / "run"
    directory.mkdir()
    result = execute(RECIPE, *load_samples(RECIPE, surrogate_data), directory, lambda rows: 0)
    assert result["steps"] == STEPS
    return {name: result[name] for name in FACTS}


@pytest.mark.timeout(60 + 60 * COUNT)
@settings(max_examples=COUNT, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
@given(schedule=schedules())
def test_any_schedule_ends_as_the_undisturbed_run(schedule, surrogate_data, calm, tmp_path_factory):
    play = Play(schedule, surrogate_data, tmp_path_factory.mktemp("schedule"))
    play.run()
    play.check(calm)
