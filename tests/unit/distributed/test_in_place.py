"""Workers die while a run trains: no step is repeated, and the weights are those of one process."""

import json
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raylab.config.overrides import override
from raylab.config.recipe import Recipe
from raylab.tasks.recipes import shipped_recipe
from raylab.training import checkpoint, loop, scope
from raylab.training.adamw import AdamW
from raylab.training.batchnorm import ShardStatistics
from raylab.training.deferred_metrics import DeferredMetrics
from raylab.training.ledger import summarise_ledger
from raylab.training.peers import Peers
from raylab.training.process_group import ProcessGroup
from raylab.training.run import Recorder, execute, load_samples
from tests.crew import Crew
from tests.wait import wait_for

SMALL = {"loop.shards": 5, "loop.ema_decay": 0.9, "model.dropout": 0.2, "schedule.kind": "plateau"}
ARDS = override(shipped_recipe("ards", smoke=True), {**SMALL, "loop.epochs": 100, "loop.checkpoint_steps": 20})
COVIDNET = override(
    shipped_recipe("covidnet", smoke=True), {**SMALL, "loop.epochs": 6, "loop.checkpoint_steps": 4, "data.size": 64}
)
FACTS = ("steps", "val", "best", "weights_sha256")


def train(recipe: Recipe, data: Path, directory: Path, peers: Peers, send: Callable[..., int]) -> None:
    execute(recipe, *load_samples(recipe, data), directory, send, peers=peers, flush_seconds=0)


def undisturbed(recipe: Recipe, data: Path, directory: Path) -> dict[str, Any]:
    directory.mkdir()
    result = execute(recipe, *load_samples(recipe, data), directory, lambda rows: 0)
    return {name: result[name] for name in FACTS}


def check(crew: Crew, expected: dict[str, Any], attempts: int = 1) -> None:
    """The run has ended as one that nothing happened to."""
    result = json.loads((crew.directory / "result.json").read_text())
    assert {name: result[name] for name in FACTS} == expected
    facts = summarise_ledger(crew.directory / "ledger.jsonl")
    assert facts["gaps"] == 0
    assert facts["attempts"] == attempts
    if attempts == 1:
        assert facts["steps_repeated"] == 0
    assert [row["step"] for row in crew.rows] == list(range(1, expected["steps"] + 1)), "each step's row, once"


# a death in each phase of a step

Victim = tuple[str, int]


def arm(victims: list[Victim], folder: Path) -> None:
    """Patch this worker so that at each phase and step of `victims` whoever comes there first is killed."""
    step = 0
    compute_shards = loop.Training.compute_shards

    def at_step(self: Any, number: int, *rest: Any) -> Any:
        nonlocal step
        step = number
        return compute_shards(self, number, *rest)

    def die(phase: str) -> None:
        for name, number in victims:
            if name == phase and number <= step:
                try:
                    os.close(os.open(folder / phase, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, phase: str, matters: Callable[..., bool] = lambda *a: True) -> None:
        original = getattr(owner, name)

        def patched(*values: Any, **named: Any) -> Any:
            if matters(*values):
                die(phase)
            outcome = original(*values, **named)
            if matters(*values):
                die(f"after {phase}")
            return outcome

        setattr(owner, name, patched)

    loop.Training.compute_shards = at_step  # type: ignore[method-assign]
    before(ProcessGroup, "start_add_up", "boundary")
    before(ProcessGroup, "start_gather", "gather")
    before(ProcessGroup, "all_to_all", "sum")
    before(ProcessGroup, "all_gather", "parts of the sum")
    before(ShardStatistics, "fold", "batch norm")
    before(AdamW, "step", "optimizer")
    before(DeferredMetrics, "fetch", "metrics")
    before(scope, "validate", "validation")
    before(Recorder, "_note", "ledger")
    before(checkpoint.HashingFile, "flush", "checkpoint")
    before(ProcessGroup, "broadcast", "state")


PHASES = [
    ("boundary", "gather", "sum", "parts of the sum"),
    ("after parts of the sum", "batch norm", "optimizer", "after optimizer"),
    ("metrics", "validation", "after validation", "ledger"),
    ("after ledger", "checkpoint", "after checkpoint", "after gather"),
]


@pytest.fixture(scope="module")
def calm(covidnet_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return undisturbed(COVIDNET, covidnet_data, tmp_path_factory.mktemp("calm") / "run")


@pytest.mark.parametrize("phases", PHASES)
def test_a_death_in_any_phase_of_a_step_repeats_nothing(phases, covidnet_data, calm, tmp_path):
    """Five workers, of whom four die."""
    directory = tmp_path / "run"
    directory.mkdir()
    fault = partial(arm, [(phase, 2 + 3 * number) for number, phase in enumerate(phases)], tmp_path)
    with Crew(directory, partial(train, COVIDNET, covidnet_data), minimum=5) as crew:
        for _ in range(5):
            crew.start(fault)
        crew.wait_for_end()
        check(crew, calm)
        saved = [line["checkpoint"] for line in crew.ledger() if "checkpoint" in line]
        assert saved == sorted(set(saved)), "each once"
        for due in (*range(4, calm["steps"], 4), calm["steps"]):
            assert any(due <= step < due + 4 for step in saved), "a death during a save costs no checkpoint"
        assert crew.exit_codes() == [-signal.SIGKILL] * 4 + [0]


# a checkpoint that is being written


def fail_while_saving(folder: Path, at: int, how: signal.Signals) -> None:
    """Patch this worker so that whoever first writes the checkpoint of step `at` is killed when it only has to be
    renamed, or stopped one step later and goes on renaming when there is a file `go`."""
    save, note = checkpoint.save, Recorder._note
    is_ready = threading.Event()

    def save_and_fail(directory: Path, step: int, state: Any, keep: int, check: Callable[[], None]) -> Path:
        def wait_and_check() -> None:
            if how == signal.SIGKILL:
                os.kill(os.getpid(), how)
            is_ready.set()
            wait_for((folder / "go").exists, 120, "go")
            check()

        if step != at or (folder / "pid").exists():
            return save(directory, step, state, keep, check)
        (folder / "pid").write_text(str(os.getpid()))
        path = save(directory, step, state, keep, wait_and_check)
        (folder / "renamed").touch()
        return path

    def note_and_stop(recorder: Recorder, row: dict[str, Any]) -> None:
        note(recorder, row)
        if row["step"] == at + 1 and recorder.is_writer and not (folder / "stopped").exists():
            is_ready.wait()
            (folder / "stopped").touch()
            os.kill(os.getpid(), how)

    checkpoint.save = save_and_fail  # type: ignore[assignment]
    Recorder._note = note_and_stop  # type: ignore[method-assign]


def test_a_writer_expelled_while_it_writes_is_replaced_and_renames_nothing(covidnet_data, calm, tmp_path):
    """It hangs when the others have gone on from the state that it writes."""
    directory = tmp_path / "run"
    directory.mkdir()
    with Crew(directory, partial(train, COVIDNET, covidnet_data), minimum=3) as crew:
        for _ in range(3):
            crew.start(partial(fail_while_saving, tmp_path, 4, signal.SIGSTOP))
        wait_for((tmp_path / "stopped").exists, 120, "the checkpoint")
        pid = int((tmp_path / "pid").read_text())
        name, writer = next(each for each in crew.processes.items() if each[1].pid == pid)
        crew.desk.call("remove", name, "it hangs")
        saved = wait_for(lambda: [e["checkpoint"] for e in crew.ledger() if "checkpoint" in e], 120, "its successor's")
        assert saved[0] in (5, 6), "the next writer does not let an interval pass"
        (tmp_path / "go").touch()
        os.kill(pid, signal.SIGCONT)
        wait_for(lambda: writer.exitcode is not None, 120, "the end of the one expelled")
        assert writer.exitcode == 3 and not (tmp_path / "renamed").exists()
        crew.wait_for_end()
        check(crew, calm)
        assert not list((directory / "checkpoints").glob(".*"))


def test_a_death_while_the_last_checkpoint_is_written_repeats_nothing(covidnet_data, calm, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    with Crew(directory, partial(train, COVIDNET, covidnet_data), minimum=2) as crew:
        for _ in range(2):
            crew.start(partial(fail_while_saving, tmp_path, calm["steps"], signal.SIGKILL))
        crew.wait_for_end()
        assert [process.exitcode for process in crew.processes.values()].count(-signal.SIGKILL) == 1
        check(crew, calm)
        assert [e["checkpoint"] for e in crew.ledger() if "checkpoint" in e][-1] == calm["steps"]
