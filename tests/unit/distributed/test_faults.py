"""Bad days of a run on real processes: hangs, growth, notices, partitions, newcomers that do not fit."""

import json
import signal
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jobs.common.progress import describe_group
from raylab.config.overrides import override
from raylab.files import atomic_write
from raylab.tasks.recipes import shipped_recipe
from raylab.training import ledger
from raylab.training.ledger import summarise_ledger
from raylab.training.run import execute, load_samples
from tests.crew import IDENTITY, Crew, Relay
from tests.faults import Fault, arm
from tests.wait import wait_for

STEPS, INTERVAL = 16, 5
RECIPE = override(
    shipped_recipe("surrogate", smoke=True),
    {"loop.shards": 5, "loop.ema_decay": 0.9, "model.dropout": 0.2, "loop.epochs": STEPS // 4,
     "loop.checkpoint_steps": INTERVAL},
)  # fmt: skip
FACTS = ("steps", "val", "best", "weights_sha256")
LONG, SHORT = 60.0, 4.0  # silence limits: where nobody must be expelled, and where somebody must


def train(data: Path, directory: Path, peers: Any, send: Any) -> None:
    execute(RECIPE, *load_samples(RECIPE, data), directory, send, peers=peers, flush_seconds=0)


class Run(Crew):
    """A crew whose run waits before the step after each of `gates`, until `pass_gate`; `faults` strike its workers."""

    def __init__(self, folder: Path, data: Path, workers: int, silence: float, *gates: int, faults: Any = ()) -> None:
        (folder / "run").mkdir()
        super().__init__(folder / "run", partial(train, data), workers, silence)
        self.folder, self.gates, self.workers = folder, gates, workers
        self.arm = partial(arm, faults, gates, folder)

    def __enter__(self) -> "Run":
        super().__enter__()
        for _ in range(self.workers):
            self.start(self.arm)
        return self

    def wait_for_group(self) -> None:
        """From then on, the run goes on with whoever is left."""
        wait_for(lambda: self.members, 60, "the first group")
        self.desk.membership.minimum = 1

    def wait_for_gate(self, step: int) -> None:
        wait_for((self.folder / f"at-{self.gates.index(step)}").exists, 60, f"step {step}")

    def pass_gate(self, step: int, is_change: bool = False, leaving: Sequence[str] = ()) -> None:
        """Let the run go on, where the group changes as soon as the writer knows that, and those who are `leaving` as
        soon as they know."""
        pids = [str(self.processes[name].pid) for name in leaving]
        with atomic_write(self.folder / f"go-{self.gates.index(step)}") as go:
            go.write_text(" ".join(["change", *pids]) if is_change or leaving else "")

    def wait_until_stopped(self, fault: int = 0) -> str:
        """The worker that `fault` has stopped."""
        mark = self.folder / f"fault-{fault}"
        name = self.name_of(int(wait_for(lambda: mark.exists() and mark.read_text(), 60, f"fault {fault}")))
        state = Path(f"/proc/{self.processes[name].pid}/stat")
        wait_for(lambda: state.read_text().rpartition(") ")[2][0] == "T", 60, f"{name} to stop")
        return name

    def wait_until_gone(self, name: str) -> int:
        """The exit code of a worker."""
        wait_for(lambda: name in self.ended, 60, f"the end of {name}")
        return self.ended[name]

    def wait_until_it_waits(self, name: str) -> None:
        """A newcomer has loaded, and asks for a group."""
        wait_for(lambda: name in self.desk.membership.positions, 60, f"{name} to come")

    def groups(self) -> list[ledger.Group]:
        return ledger.groups(ledger.read_ledger(self.directory / ledger.FILE))

    def sizes(self) -> list[int]:
        return [group.workers for group in self.groups()]

    def check(self, expected: dict[str, Any], attempts: int = 1) -> None:
        """The run has ended as one that nothing happened to, and no step was done twice."""
        self.wait_for_end()
        result = json.loads((self.directory / "result.json").read_text())
        assert {name: result[name] for name in FACTS} == expected
        facts = summarise_ledger(self.directory / ledger.FILE)
        assert (facts["attempts"], facts["steps_repeated"], facts["gaps"]) == (attempts, 0, 0)
        assert [row["step"] for row in self.rows] == list(range(1, STEPS + 1)), "each step's row, once"


@pytest.fixture(scope="module")
def calm(surrogate_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    result = execute(RECIPE, *load_samples(RECIPE, surrogate_data), tmp_path_factory.mktemp("calm"), lambda rows: 0)
    assert result["steps"] == STEPS
    return {name: result[name] for name in FACTS}


# hangs


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.fault(3)
def test_a_hung_writer_is_expelled_and_neither_trains_nor_writes_when_it_wakes(workers, surrogate_data, calm, tmp_path):
    """It hangs while it writes a checkpoint, and wakes when the run has come further."""
    fault = Fault(signal.SIGSTOP, "checkpoint", 4)
    with Run(tmp_path, surrogate_data, workers, SHORT, 14, faults=[fault]) as run:
        run.wait_for_group()
        hung = run.wait_until_stopped()
        run.wait_for_gate(14)
        assert run.processes[hung].pid not in run.groups()[-1].pids
        before = sorted(path for path in run.directory.rglob("*"))
        lines = run.ledger()
        run.kill(hung, signal.SIGCONT)
        assert run.wait_until_gone(hung) == 3, "expelled"
        assert (sorted(path for path in run.directory.rglob("*")), run.ledger()) == (before, lines)
        run.pass_gate(14)
        run.check(calm)


# growth


def test_newcomers_join_at_a_step_boundary(surrogate_data, calm, tmp_path):
    with Run(tmp_path, surrogate_data, 1, LONG, 3, 7) as run:
        for gate in (3, 7):
            run.wait_for_gate(gate)
            for name in [run.start(run.arm) for _ in range(2)]:
                run.wait_until_it_waits(name)
            run.pass_gate(gate, is_change=True)
        run.check(calm)
        assert run.sizes() == [1, 3, 5]


@pytest.mark.parametrize("phase", ["form", "after connect", "state", "pids"])
def test_a_newcomer_that_dies_on_its_way_is_forgotten(phase, surrogate_data, calm, tmp_path):
    """Before it has joined; in its first group; while it gets the state; when it has it."""
    with Run(tmp_path, surrogate_data, 2, LONG, 4, 8) as run:
        run.wait_for_gate(4)
        own = tmp_path / "newcomer"
        own.mkdir()
        name = run.start(partial(arm, [Fault(signal.SIGKILL, phase)], (), own))
        if phase != "form":
            run.wait_until_it_waits(name)
        run.pass_gate(4, is_change=phase != "form")
        assert run.wait_until_gone(name) == -signal.SIGKILL
        run.wait_for_gate(8)
        assert set(run.desk.membership.heard) == {"worker-0", "worker-1"}
        run.pass_gate(8)
        run.check(calm)
        assert set(run.sizes()) == {2}


def test_a_newcomer_that_dies_while_it_waits_for_a_boundary_costs_nothing(surrogate_data, calm, tmp_path):
    with Run(tmp_path, surrogate_data, 2, LONG, 4) as run:
        run.wait_for_gate(4)
        name = run.start()
        run.wait_until_it_waits(name)
        run.kill(name)
        run.wait_until_gone(name)
        run.pass_gate(4)
        run.check(calm)
        assert run.sizes()[0] == run.sizes()[-1] == 2 and max(run.sizes()) == 2


@pytest.mark.parametrize("other", [{"version of torch": "2.14.0"}, {"data": "fed"}])
def test_a_worker_with_other_packages_or_data_is_refused(other, surrogate_data, calm, tmp_path):
    with Run(tmp_path, surrogate_data, 1, LONG, 4) as run:
        run.wait_for_gate(4)
        stranger = run.start(identity={**IDENTITY, **other})
        assert run.wait_until_gone(stranger) == 1
        run.pass_gate(4)
        run.check(calm)
        assert run.sizes() == [1]
    (why,) = json.loads((tmp_path / f"{stranger}.json").read_text())
    (name, own), *_ = other.items()
    assert why == f"its {name} is {own}, that of the other workers {IDENTITY[name]}"


# deaths


def test_two_workers_die_at_once(surrogate_data, calm, tmp_path):
    """Of five: the writer and another."""
    with Run(tmp_path, surrogate_data, 5, LONG, 6) as run:
        run.wait_for_gate(6)
        for name in (run.members[0], run.members[3]):
            run.kill(name)
        run.pass_gate(6)
        run.check(calm)
        assert run.sizes()[0] == 5 and run.sizes()[-1] == 3


def test_deaths_while_the_others_form_a_group_and_while_one_saves(surrogate_data, calm, tmp_path):
    """One dies in a step, one when the next group connects, one when it begins, and a writer in a save."""
    faults = [Fault(signal.SIGKILL, *where) for where in (
        ("sum", 3, 1), ("after connect", 3, 0), ("after pids", 3, 1), ("checkpoint", 4),
    )]  # fmt: skip
    with Run(tmp_path, surrogate_data, 5, LONG, faults=faults) as run:
        run.check(calm)
        assert run.exit_codes() == [-signal.SIGKILL] * 4 + [0]


@pytest.mark.parametrize("phase", ["checkpoint", "result", "after result"])
def test_the_writer_dies_after_the_last_step(phase, surrogate_data, calm, tmp_path):
    """While it writes the last checkpoint or the result: the other has not ended yet, and does it."""
    faults = [Fault(signal.SIGKILL, phase, STEPS - 1)]
    with Run(tmp_path, surrogate_data, 2, LONG, faults=faults) as run:
        run.check(calm)
        assert run.exit_codes() == [-signal.SIGKILL, 0]


# notices


def test_workers_that_are_told_to_leave_hand_over(surrogate_data, calm, tmp_path):
    """Of five the writer, then all but one; then the last, and the run goes on from its checkpoint."""
    with Run(tmp_path, surrogate_data, 5, LONG, 4, 8, 12) as run:
        told = []
        for gate, choose in ((4, slice(0, 1)), (8, slice(0, -1)), (12, slice(0, None))):
            run.wait_for_gate(gate)
            leaving = run.members[choose]
            for name in leaving:
                run.leave(name)
            told += leaving
            run.pass_gate(gate, leaving=leaving)
        for name in told:
            assert run.wait_until_gone(name) == 0
        before = run.groups()
        run.desk.membership.minimum = 1
        run.start()
        run.check(calm, attempts=2)
    left = {pid for group in before if isinstance(group, ledger.Regroup) for pid in group.left}
    assert run.processes[told[0]].pid in left
    said = [describe_group(new, old, 0.1) for old, new in pairwise(before)]
    assert any("left at step" in text for text in said) and not any("lost" in text for text in said), said


# partitions


@pytest.mark.parametrize("cut_off", [(0,), (1, 2)])
@pytest.mark.fault(16)
def test_of_a_partitioned_network_only_the_side_with_the_membership_goes_on(cut_off, surrogate_data, calm, tmp_path):
    """Of three workers: the writer, or the two others, who can still reach one another and all workers."""
    with Run(tmp_path, surrogate_data, 0, SHORT, 6, 12) as run:
        relay = Relay(run.socket)
        run.desk.membership.minimum = 3
        for number in range(3):
            name = run.start(run.arm, relay if number in cut_off else None)
            wait_for(lambda name=name: name in run.desk.membership.heard, 60, f"{name} to join")
        run.wait_for_gate(6)
        relay.cut()
        lost = {f"worker-{number}" for number in cut_off}
        wait_for(lambda: set(run.desk.membership.expelled) == lost, 60, "their expulsion")
        run.pass_gate(6)
        run.wait_for_gate(12)
        assert run.sizes()[-1] == 3 - len(cut_off)
        lines = run.ledger()
        assert not lost & set(run.ended), "they wait, and do not know"
        relay.mend()
        for name in lost:
            assert run.wait_until_gone(name) == 3, "expelled"
        assert run.ledger() == lines
        run.pass_gate(12)
        run.check(calm)
