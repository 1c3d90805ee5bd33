"""Checkpoints beside training: the state of their step, complete or absent, in the ledger once they are on disk."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from raylab.config.overrides import override
from raylab.errors import CheckpointError
from raylab.files import read_lines
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint
from raylab.training import run as runs
from raylab.training.adamw import AdamW
from raylab.training.checkpoint_writer import CheckpointWriter
from raylab.training.process_group import PeerLost, ProcessGroup
from raylab.training.run import Recorder
from tests.wait import wait_for

RECIPE = override(shipped_recipe("ards", smoke=True), {"loop.max_checkpoints": 2})


def state_of(model: nn.Module, step: int, size: int = 1) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optim": AdamW(list(model.parameters())).state_dict(),
        "average": None,
        "progress": {"step": step, "best_model": {"w": torch.ones(size)}},
        "epoch_loss": torch.zeros((), dtype=torch.float64),
    }


class Gate:
    """`check` of a writer: the thread waits here, when all but the renaming is done, until the gate is open."""

    def __init__(self) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.arrived.set()
        assert self.open.wait(60)


# the copy


def assert_same(value: Any, other: Any) -> None:
    """The same types, keys in the same order, attributes, values, and order of the values in memory."""
    assert type(value) is type(other)
    if isinstance(value, torch.Tensor):
        assert value.dtype == other.dtype and torch.equal(value, other) and value.stride() == other.stride()
    elif isinstance(value, dict):
        assert list(value) == list(other) and getattr(value, "_metadata", None) == getattr(other, "_metadata", None)
        for key in value:
            assert_same(value[key], other[key])
    else:
        assert value == other


def test_a_checkpoint_has_the_state_of_its_step_although_training_goes_on(tmp_path):
    model, gate = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)), Gate()
    model.to(memory_format=torch.channels_last)
    writer = CheckpointWriter(tmp_path / "beside", 2, gate)
    state = {**state_of(model, 5), "rows": [{"step": 5}]}
    there = checkpoint.save(tmp_path / "at once", 5, state)
    writing = writer.start(5, state)
    with torch.no_grad():
        for tensor in [*model.state_dict().values(), *state["optim"]["state"][0].values(), state["epoch_loss"]]:
            tensor.fill_(7)
    gate.open.set()
    here = writing.result().path
    writer.close()
    assert_same(checkpoint.load(here), checkpoint.load(there))
    assert (here / "state.pt").stat().st_size <= (there / "state.pt").stat().st_size


def test_the_next_copy_uses_the_memory_of_the_one_before(tmp_path):
    writer, model = CheckpointWriter(tmp_path, 2, lambda: None), nn.Linear(3, 4)
    places = []
    for step in (1, 2):
        writer.start(step, state_of(model, step)).result()
        places.append({place: buffer.data_ptr() for place, buffer in writer.buffers.items()})
    writer.close()
    assert places[0] == places[1]
    assert ("model", "weight") in places[0] and ("optim", "state", 0, "exp_avg") in places[0]
    assert not any(place[0] == "progress" for place in places[0]), "its tensors never change"


def test_the_copy_from_a_device_does_not_wait_for_it(tmp_path):
    """On torch's meta device, which has no values that a copy could wait for."""
    waits = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and args[1].device.type == "meta":
                waits.append(args[2:] != (True,) and not (kwargs or {}).get("non_blocking"))
                return args[0]
            return func(*args, **(kwargs or {}))

    model, writer = nn.Linear(3, 4, device="meta"), CheckpointWriter(tmp_path, 2, lambda: None)
    with Copies():
        writer.start(1, state_of(model, 1))
    writer.close()
    assert waits == [False] * 8  # weight and bias, and of each two moments and the count of its steps


# the ledger


def begin(directory: Path, group: ProcessGroup | None = None, step: int = 0) -> Recorder:
    recorder = Recorder(directory, RECIPE, {}, lambda rows: 0)
    recorder.start_group(group or ProcessGroup(), step)
    return recorder


def checkpoints(directory: Path) -> tuple[list[int], list[int]]:
    """Those in the ledger, and those on disk."""
    lines = [line["checkpoint"] for line in read_lines(directory / "ledger.jsonl") if "checkpoint" in line]
    found = [path for path in checkpoint.list_checkpoints(directory / "checkpoints") if checkpoint.is_valid(path)]
    return lines, sorted(int(path.name.removeprefix("step-")) for path in found)


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Gate]]:
    """The gate of the checkpoint of a step, in every recorder."""
    gates: dict[int, Gate] = {}
    save = checkpoint.save

    def gate(step: int) -> Gate:
        return gates.setdefault(step, Gate())

    def wait_and_save(directory: Path, step: int, state: Any, keep: int, check: Callable[[], None]) -> Path:
        is_written = iter((False, True))  # at the two looks of a save

        def check_at_gate() -> None:
            if next(is_written):
                gate(step)()
            check()

        return save(directory, step, state, keep, check_at_gate)

    monkeypatch.setattr(checkpoint, "save", wait_and_save)
    yield gate
    for each in gates.values():
        each.open.set()


def test_the_ledger_has_a_checkpoint_once_it_is_on_disk(gates, tmp_path):
    model = nn.Linear(3, 4)
    with begin(tmp_path) as recorder:
        recorder({"step": 5}, state_of(model, 5))
        assert gates(5).arrived.wait(60)
        assert recorder.finish_checkpoint() is None
        assert checkpoints(tmp_path) == ([], [])
        gates(5).open.set()
        assert wait_for(lambda: recorder.finish_checkpoint() is None and recorder.writing is None, 60, "the checkpoint")
        assert checkpoints(tmp_path) == ([5], [5])


def test_a_second_checkpoint_waits_for_the_first(gates, tmp_path):
    model = nn.Linear(3, 4)
    with begin(tmp_path) as recorder:
        recorder({"step": 5}, state_of(model, 5))
        assert gates(5).arrived.wait(60)
        gates(10).open.set()
        threading.Timer(0.05, gates(5).open.set).start()
        recorder({"step": 10}, state_of(model, 10))
        assert gates(5).open.is_set() and checkpoints(tmp_path)[0] == [5]
    assert checkpoints(tmp_path) == ([5, 10], [5, 10])


def test_whoever_leaves_completes_its_checkpoint_first(gates, tmp_path):
    model = nn.Linear(3, 4)
    with begin(tmp_path) as recorder:
        recorder({"step": 5}, state_of(model, 5))
        threading.Timer(0.05, gates(5).open.set).start()
    assert gates(5).open.is_set() and checkpoints(tmp_path) == ([5], [5])


def test_whoever_asks_to_be_told_hears_of_a_checkpoint_before_the_next_step(tmp_path):
    told: list[Path] = []
    with Recorder(tmp_path, RECIPE, {}, lambda rows: 0, saved=told.append) as recorder:
        recorder.start_group(ProcessGroup(), 0)
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        assert [path.name for path in told] == ["step-00000005"]


# changes of workers


class Group(ProcessGroup):
    """This process as rank 0, in a group that can break."""

    def __init__(self) -> None:
        super().__init__()
        self.has_ended = False
        self.is_broken = lambda: self.has_ended


def test_a_writer_that_was_expelled_leaves_no_checkpoint(gates, tmp_path):
    group = Group()
    with pytest.raises(PeerLost, match="expelled"), begin(tmp_path, group) as recorder:
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        assert gates(5).arrived.wait(60)
        group.has_ended = True  # while the process hung
        gates(5).open.set()
        with pytest.raises(PeerLost):
            recorder.finish_checkpoint(wait=True)
        assert checkpoints(tmp_path) == ([], [])
        raise PeerLost("expelled")
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert checkpoints(tmp_path) == ([], [])


def test_a_process_that_is_no_longer_the_writer_drops_its_checkpoint(gates, tmp_path):
    group, other = Group(), Group()
    other.rank = 1
    with begin(tmp_path, group) as recorder:
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        assert gates(5).arrived.wait(60)
        group.has_ended = True
        other.gather = lambda rows, count, width: torch.zeros(count, width)
        recorder.start_group(other, 5)
        gates(5).open.set()
        assert recorder.finish_checkpoint(wait=True) is None
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_writer_that_stays_the_writer_completes_its_checkpoint(gates, tmp_path):
    group = Group()
    with begin(tmp_path, group) as recorder:
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        assert gates(5).arrived.wait(60)
        group.has_ended = True  # another member has died
        gates(5).open.set()
        with pytest.raises(PeerLost):
            recorder.finish_checkpoint(wait=True)
        assert recorder.saved_step(5) == 5, "it is not due again"
        recorder.start_group(Group(), 6)
        assert recorder.finish_checkpoint(wait=True) is None
        assert checkpoints(tmp_path) == ([5], [5])


def test_a_new_writer_knows_from_the_ledger_what_was_completed(gates, tmp_path):
    gates(5).open.set()
    gone = begin(tmp_path)
    gone({"step": 5}, state_of(nn.Linear(3, 4), 5))
    gone.finish_checkpoint(wait=True)
    gone({"step": 10}, state_of(nn.Linear(3, 4), 10))
    assert gates(10).arrived.wait(60)
    other = Recorder(tmp_path, RECIPE, {}, lambda rows: 0)
    other.start_group(ProcessGroup(), 11)
    assert other.saved_step(10) == 5


def test_a_new_attempt_begins_when_the_checkpoint_before_is_complete(gates, tmp_path):
    """As on a GPU, where every rank goes back to the newest checkpoint when one is lost."""
    group = Group()
    with begin(tmp_path, group) as recorder:
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        assert gates(5).arrived.wait(60)
        group.has_ended = True
        gates(5).open.set()
        recorder.start_attempt()
        assert checkpoints(tmp_path) == ([5], [5])


# failures


def test_a_full_disk_is_an_error_at_the_next_boundary(small_disk):
    with pytest.raises(CheckpointError, match="step 10 could not be written"), begin(small_disk) as recorder:
        recorder({"step": 5}, state_of(nn.Linear(3, 4), 5))
        recorder({"step": 10}, state_of(nn.Linear(3, 4), 10, size=400_000))
        failure = wait_for(recorder.finish_checkpoint, 60, "the failure")
        assert failure.exit_code == 1 and "free space" in failure.do
        recorder({"step": 15}, state_of(nn.Linear(3, 4), 15))
        assert recorder.finish_checkpoint() is failure, "it is the run's error, whatever comes after it"
    assert checkpoints(small_disk) == ([5], [5])
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000005"]


def test_the_error_that_ends_the_run_is_not_replaced_by_a_failed_checkpoint(small_disk, caplog):
    with pytest.raises(ZeroDivisionError), begin(small_disk) as recorder:
        recorder({"step": 10}, state_of(nn.Linear(3, 4), 10, size=400_000))
        raise ZeroDivisionError
    assert "step 10 could not be written" in caplog.text


POINTS = [
    (torch, "save"),
    (os, "fsync"),
    (os, "open"),
    (Path, "mkdir"),
    (Path, "open"),
    (Path, "rename"),
    (checkpoint.HashingFile, "flush"),
    (os, "unlink"),
    (checkpoint.shutil, "rmtree"),
    (runs.ledger, "Checkpoint"),
]


@pytest.mark.parametrize(("owner", "name"), POINTS, ids=[name for _, name in POINTS])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_any_point_leaves_checkpoints_complete_or_absent(owner, name, moment, tmp_path):
    """A kill -9 of the process at each call of that function while the third checkpoint is written."""
    model = nn.Linear(3, 4)
    for number in range(1, 10):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        child = os.fork()
        if child == 0:
            _die_while_writing(directory, model, owner, name, moment, number)
        _, status = os.waitpid(child, 0)
        lines, found = checkpoints(directory)
        assert set(lines) <= {5, 10, 15} and lines in ([5, 10], [5, 10, 15])
        assert found in ([5, 10], [5, 10, 15], [10, 15]) and max(lines) in found
        assert len(found) == len(checkpoint.list_checkpoints(directory / "checkpoints")), "none is half one"
        with begin(directory, step=max(found)) as recorder:
            recorder({"step": 20}, state_of(model, 20))
        assert checkpoints(directory)[1] == [max(found), 20]
        assert len(list((directory / "checkpoints").iterdir())) == 2, "what was left is cleared up"
        if status == 0:
            assert number > 1
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError(f"{name} is called for ever")


def _die_while_writing(directory: Path, model: nn.Module, owner: Any, name: str, moment: str, number: int) -> None:
    """Write three checkpoints, and be killed at call `number` of the function while the third is written."""
    calls, original = 0, getattr(owner, name)

    def call(*values: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        outcome = original(*values, **named)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome

    try:
        with begin(directory) as recorder:
            for step in (5, 10):
                recorder({"step": step}, state_of(model, step))
            recorder.finish_checkpoint(wait=True)
            setattr(owner, name, call)
            recorder({"step": 15}, state_of(model, 15))
        os._exit(0)
    finally:
        os._exit(1)
