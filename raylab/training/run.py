"""A run and its directory, as executed by `--workers 0`, by a Ray Train worker and by a trial of a search.

run.json       name, run ids, data, parent (run_record.py; written by jobs)
recipe.json    the resolved recipe
ledger.jsonl   one line per step: which attempt computed it, on how many workers (ledger.py)
checkpoints/   see checkpoint.py
model/         the trained network: model.safetensors, and model.json with its recipe and input spec
result.json    or failure.json: how the run ended
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raylab.config.overrides import without_weights
from raylab.config.recipe import Recipe
from raylab.data.samples import Samples
from raylab.errors import CheckpointError, DataError, RaylabError, RunError
from raylab.files import write_json
from raylab.models.baselines import Fitted
from raylab.models.ensemble import Ensemble
from raylab.models.recurrent import GruD, Recurrent
from raylab.models.weights import fill, match_inputs
from raylab.tasks import find_task
from raylab.tasks.base import Task
from raylab.tasks.recipes import parse_recipe, update_recipe
from raylab.training import checkpoint, ledger
from raylab.training.loop import fit, fit_at_once
from raylab.training.process_group import ProcessGroup
from raylab.training.progress import Metrics

Send = Callable[[list[Metrics]], str | None]
"""Forwards rows of metrics (a collective if there are several ranks). Returns None, or why this group of workers must
hand over: a checkpoint is then saved at the next step, and the next attempt resumes from it."""


class AttemptHandedOver(Exception):
    """Raised to end this attempt after a checkpoint; the next attempt resumes from it."""


T = TypeVar("T")


def execute(
    recipe: Recipe,
    data: Path,
    directory: Path,
    send: Send,
    parent: Path | None = None,
    saved: Callable[[Path], None] | None = None,
    flush_seconds: float = 1.0,
) -> dict[str, Any]:
    """Train to the end, from the newest valid checkpoint in `directory`, else `parent`'s weights, else from scratch.

    Every rank of the group calls it; rank 0 writes files and calls `saved` with each new checkpoint. Metrics wait at
    most `flush_seconds` before they are sent. Returns the result of fit() and the summary of the ledger.
    """
    group = ProcessGroup()
    device = "cuda" if recipe.scaling.gpu else "cpu"
    job = find_task(recipe.task)
    scratch = recipe.transfer.mode == "scratch"
    if scratch:
        recipe = without_weights(recipe)
    transferred = not scratch and (parent is not None or recipe.model.weights_path is not None)

    def prepare() -> tuple[Samples, Samples, nn.Module, dict[str, Any] | None, list[Path]]:
        train = job.load(data, "train", recipe.data, None)
        val = job.load(data, "val", recipe.data, train.spec)
        model = job.model(recipe, train.spec)
        newest, damaged = checkpoint.find_newest(directory / "checkpoints")
        if newest is None and parent is not None and not scratch:
            inherit(model, parent, train.spec)
        return train, val, model, None if newest is None else checkpoint.load(newest, device), damaged

    train, val, model, state, damaged = run_on_all_ranks(group, prepare)
    recorder = Recorder(directory, recipe, group, send, saved, flush_seconds)
    recorder.start(state, [p.name for p in damaged])
    if isinstance(model, Fitted):
        result = fit_at_once(recipe, job, model, train, val, recorder, device)
    else:
        result = fit(recipe, job, model, train, val, recorder, state, device, transferred)
    recorder.flush()
    if group.rank == 0:
        write_model(directory / "model", model, recipe, train.spec)
        result |= ledger.summarise_ledger(directory / ledger.FILE)
        write_json(directory / "result.json", result)
    return result


class Recorder:
    """The `report` of a run: writes the ledger and checkpoints, and sends rows of metrics in bundles.

    A bundle can be lost with its worker until the receiver has fetched it, and the next `send` waits for that. The
    checkpoint therefore contains the last bundle and the rows after it, and a resumed run sends them again; the
    receiver ignores steps that it already has.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        group: ProcessGroup,
        send: Send,
        saved: Callable[[Path], None] | None = None,
        flush_seconds: float = 1.0,
    ) -> None:
        self.directory, self.recipe, self.group, self.send, self.saved = directory, recipe, group, send, saved
        self.flush_seconds = flush_seconds
        self.ledger = directory / ledger.FILE
        self.rows: list[Metrics] = []
        self.bundle: list[Metrics] = []  # the last rows that were sent
        self.sent_at = time.monotonic()
        self.moving: str | None = None
        self.attempt = 0

    def start(self, state: dict[str, Any] | None, damaged: list[str]) -> None:
        """Record that an attempt starts from the checkpoint `state`, skipping the newer ones named in `damaged`."""
        self.rows = [] if state is None else state["rows"]
        pids = self.group.gather({self.group.rank: torch.tensor([os.getpid()])}, self.group.size, 1)
        if self.group.rank == 0:
            entries = ledger.read_ledger(self.ledger)
            if self.ledger.is_file() and not self.ledger.read_bytes().endswith(b"\n"):
                with self.ledger.open("a") as file:
                    file.write("\n")  # ends a line that a crash has truncated; readers skip it
            self.attempt = 1 + max((entry.attempt for entry in entries), default=-1)
            self._write(
                ledger.Start(
                    attempt=self.attempt,
                    start=0 if state is None else state["progress"]["step"],
                    workers=self.group.size,
                    pids=tuple(int(pid) for pid in pids[:, 0]),
                    time=time.time(),
                    damaged=tuple(damaged),
                )
            )

    def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
        if state is None:
            self.rows.append(metrics)
            self._write(ledger.Step(attempt=self.attempt, step=metrics["step"], loss=metrics["train/loss"]))
            if self.group.any(time.monotonic() - self.sent_at >= self.flush_seconds):
                self.flush()
            return self.moving is not None
        step, keep = metrics["step"], self.recipe.loop.max_checkpoints
        complete = {**state, "rows": self.bundle + self.rows}

        def save() -> None:
            if self.group.rank == 0:
                path = checkpoint.save(self.directory / "checkpoints", step, complete, keep)
                if self.saved is not None:
                    self.saved(path)

        run_on_all_ranks(self.group, save)
        self._write(ledger.Checkpoint(attempt=self.attempt, checkpoint=step))
        if self.moving is not None:
            # steps after the checkpoint would be computed again by the next attempt
            self._write(ledger.HandOver(attempt=self.attempt, moved=step, why=self.moving))
            raise AttemptHandedOver(self.moving)
        return False

    def flush(self) -> None:
        self.moving = self.send(self.rows)
        self.bundle, self.rows, self.sent_at = self.rows, [], time.monotonic()

    def _write(self, entry: ledger.Entry) -> None:
        if self.group.rank == 0:
            try:
                with self.ledger.open("a") as file:
                    file.write(json.dumps(entry.to_json()) + "\n")
            except OSError as error:
                do = f"free space, then: raylab resume {self.directory.name}"
                raise CheckpointError(f"{self.ledger} could not be written", str(error), do) from error


def run_on_all_ranks(group: ProcessGroup, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; if it fails on one rank, all raise, so that none hangs."""
    error: RaylabError | None = None
    try:
        outcome = action()
    except RaylabError as caught:
        error = caught
    if group.any(error is not None):
        raise error or RunError("another worker of this run failed", "its error is in failure.json or in Ray's logs")
    return outcome


def write_model(directory: Path, model: nn.Module, recipe: Recipe, spec: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    write_json(directory / "model.json", {"recipe": recipe.model_dump(mode="json"), "spec": spec})


def read_model(directory: Path) -> tuple[Task, Recipe, dict[str, Any], nn.Module]:
    """Return (task, recipe, spec, trained network) of a run directory; DataError if it has no finished model."""
    path = directory / "model" / "model.json"
    if not path.is_file():
        raise DataError(
            f"run {directory.name} has no trained model yet",
            "it did not reach its last step",
            f"raylab resume {directory.name}",
        )
    note = json.loads(path.read_text())
    recipe = parse_recipe(update_recipe(note["recipe"]))
    job = find_task(recipe.task)
    # The weights that it started from are not needed, and may no longer exist
    model = job.model(without_weights(recipe), note["spec"])
    model.load_state_dict(_tensors(path.with_name("model.safetensors")))
    return job, recipe, note["spec"], model


def inherit(model: nn.Module, parent: Path, spec: dict[str, Any]) -> None:
    """Load the weights of run `parent` into `model`; the head stays new if the classes differ.

    For series, whose inputs have names, the weights of the inputs that both have are loaded, whatever their order:
    another hospital measures other things. Raises DataError if the parent was trained on another kind of input, or if
    its layers do not fit.
    """
    note = json.loads((parent / "model" / "model.json").read_text())
    parent_spec = note["spec"]
    if parent_spec["kind"] != spec["kind"]:
        raise DataError(
            f"run {parent.name} was trained on '{parent_spec['kind']}', this data is '{spec['kind']}'",
            do="choose a parent run of the same task",
        )
    same = parent_spec["classes"] == spec["classes"]
    path = parent / "model" / "model.safetensors"
    state = _tensors(path)
    network = model.members[0] if isinstance(model, Ensemble) else model
    if isinstance(network, Recurrent | GruD):
        state = match_inputs(model.state_dict(), state, network.inputs(spec), network.inputs(parent_spec))
    try:
        fill(model, state, str(path), own_head=same)
    except DataError as error:
        do = f"use the parent's model, {note['recipe']['model']['name']}, with its options (--set model....)"
        raise DataError(error.what, error.why, do) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} could not be read as safetensors", str(error)) from error
