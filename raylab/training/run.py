"""A run and its directory: what `--workers 0`, a worker on Ray and a trial of a search all execute.

run.json       name, run ids, data, parent (run_record.py; written by jobs)
recipe.json    the resolved recipe
ledger.jsonl   one line a step: which attempt computed it; and each change of workers; chained by hashes (ledger.py)
work.jsonl     which worker was where, from when to when (raylab/work.py)
checkpoints/   see checkpoint.py
model/         the trained network: model.safetensors, model.json with its recipe and input spec, and plugins/
plugins/       the code of own models and tasks (raylab/tasks/plugins.py); written by jobs
result.json    or failure.json: how the run ended
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raylab.config.overrides import without_weights
from raylab.config.recipe import Recipe
from raylab.data.prepared import sha256
from raylab.data.samples import Samples
from raylab.errors import CheckpointError, DataError
from raylab.files import atomic_write, write_json, write_text
from raylab.models.baselines import Fitted
from raylab.models.ensemble import Ensemble
from raylab.models.first_layer import spread
from raylab.models.recurrent import GruD, Recurrent
from raylab.models.weights import fill, match_inputs
from raylab.storage import describe_cause
from raylab.tasks import find_task
from raylab.tasks.base import Task
from raylab.tasks.plugin_code import explain_own_error
from raylab.tasks.plugins import FOLDER, code_of, load_stored
from raylab.tasks.recipes import parse_stored_recipe
from raylab.training import checkpoint, ledger
from raylab.training.checkpoint_writer import CheckpointWriter, Written
from raylab.training.cpu import WIDTH, cpu_kind, decode_kind, encode_kind
from raylab.training.loop import AttemptHandedOver, Report, fit, fit_at_once
from raylab.training.model_note import read_model_note
from raylab.training.peers import Peers
from raylab.training.process_group import PeerLost, ProcessGroup
from raylab.training.progress import Metrics
from raylab.training.scope import Scope
from raylab.training.step_times import StepTimes

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
POLL_SECONDS = 0.02  # between two looks whether a group still stands

Send = Callable[[list[Metrics]], int]
"""Passes rows of metrics on; returns the last step whose row has arrived for good. Called by rank 0 alone."""


def is_transferred(recipe: Recipe, parent: Path | None) -> bool:
    """Whether a run starts from trained weights: those of the run `parent`, or those that the recipe names."""
    return recipe.transfer.mode != "scratch" and (parent is not None or recipe.model.weights_path is not None)


def load_samples(recipe: Recipe, data: Path) -> tuple[Samples, Samples]:
    """Return the train and val splits of the prepared directory `data`, as the recipe asks for them."""
    task = find_task(recipe.task)
    train = task.load(data, "train", recipe.data, None)
    return train, task.load(data, "val", recipe.data, train.spec)


def execute(
    recipe: Recipe,
    train: Samples,
    val: Samples,
    directory: Path,
    send: Send,
    parent: Path | None = None,
    saved: Callable[[Path], None] | None = None,
    flush_seconds: float = 1.0,
    peers: Peers | None = None,
    on_training: Callable[[], None] = lambda: None,
    step_times: StepTimes | None = None,
    scope: Scope | None = None,
) -> dict[str, Any]:
    """Train to the end, from the newest valid checkpoint in `directory`, else `parent`'s weights, else from scratch.

    Every worker of the run calls it, whenever it comes; rank 0 writes. Checkpoints are written beside the steps that
    follow, unless `saved` is given, which is called with each before the next step. Metrics wait for `flush_seconds` at
    most before they are sent on. `on_training` is called whenever this process is in a new group that trains, and
    `step_times` measures where its time goes; `scope` as for `fit`. Returns fit()'s result with the facts of the
    ledger. Raises AttemptHandedOver in a worker that leaves.
    """
    device = "cuda" if recipe.scaling.gpu else "cpu"
    job = find_task(recipe.task)
    scratch = recipe.transfer.mode == "scratch"
    if scratch:
        recipe = without_weights(recipe)
    transferred = is_transferred(recipe, parent)

    recorder = Recorder(directory, recipe, train.spec, send, saved, flush_seconds, on_training, step_times)

    def load() -> dict[str, Any] | None:
        recorder.start_attempt()
        found, damaged = checkpoint.find_newest(directory / "checkpoints")
        state = None if found is None else checkpoint.load(found, device)
        recorder.resume(state, [path.name for path in damaged])
        return state

    with recorder:
        while True:
            model = job.model(recipe, train.spec)
            if parent is not None and not scratch and not checkpoint.list_checkpoints(directory / "checkpoints"):
                inherit(model, parent, train.spec)
            try:
                if isinstance(model, Fitted):
                    recorder.resume(None, [])
                    return fit_at_once(recipe, job, model, train, val, recorder, peers)
                return fit(recipe, job, model, train, val, recorder, load, device, transferred, peers, scope)
            except PeerLost:  # on a GPU: what its queue has done to the weights is unknown
                continue


class Recorder(Report):
    """The `report` of a run in a directory: ledger, checkpoints, and rows of metrics in bundles to `send`. A context:
    leaving it ends the thread that writes checkpoints.

    Rank 0 writes. Every rank keeps the rows that may not have arrived: they travel in the checkpoint, and whoever is
    rank 0 next sends them again. Whoever receives rows takes each step once.
    """

    def __init__(
        self,
        directory: Path,
        recipe: Recipe,
        spec: dict[str, Any],
        send: Send,
        saved: Callable[[Path], None] | None = None,
        flush_seconds: float = 1.0,
        on_training: Callable[[], None] = lambda: None,
        step_times: StepTimes | None = None,
    ) -> None:
        self.directory, self.recipe, self.spec, self.send, self.saved = directory, recipe, spec, send, saved
        self.step_times = step_times
        self.flush_seconds, self.on_training = flush_seconds, on_training
        self.ledger = directory / ledger.FILE
        self.head = ""  # of the ledger's chain, in the writer
        self.is_writer = False
        self.rows: list[Metrics] = []  # that may not have arrived
        self.group = ProcessGroup()
        self.pids: tuple[int, ...] = ()  # of the group
        self.left: tuple[int, ...] = ()  # processes that left at the last step boundary
        self.noted = 0  # the last step of this attempt in the ledger
        self.sent = 0  # the last step that this rank has sent
        self.last_arrived = 0
        self.sent_at = time.monotonic()
        self.attempt, self.begun = 0, 0  # this attempt, and the step that it began at
        self.damaged: tuple[str, ...] = ()  # checkpoints that it could not read
        self.has_started = False  # whether the ledger has its Start, as far as this rank knows
        self.writer = CheckpointWriter(directory / "checkpoints", recipe.loop.max_checkpoints, self._wait_for_group)
        self.writing: futures.Future[Written] | None = None  # the checkpoint of `last_checkpoint`
        self.last_checkpoint = 0  # the step of the last one in the ledger, or of `writing`
        self.last_checkpoint_time = 0.0  # of its state
        self.is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            failure = self.finish_checkpoint(wait=True)
        except PeerLost:
            failure = None  # the others go on: they write a checkpoint again that is not in the ledger
        finally:
            self.is_closed = True
            self.writer.close()
        if failure is not None and (error is None or isinstance(error, AttemptHandedOver)):
            raise failure
        if failure is not None:
            log.error("%s", failure)

    def start_attempt(self) -> None:
        """This process is rank 0 of a new attempt: what it was still writing for the one before is worth having."""
        self.group = ProcessGroup()  # there is no other writer
        if failure := self.finish_checkpoint(wait=True):
            raise failure

    def resume(self, state: dict[str, Any] | None, damaged: list[str]) -> None:
        """An attempt begins from the checkpoint `state`, past the newer ones named in `damaged`."""
        self.rows = [] if state is None else list(state["rows"])
        entries = ledger.read_ledger(self.ledger)
        self.attempt = max((entry.attempt for entry in entries), default=-1) + 1
        self.begun = 0 if state is None else int(state["progress"]["step"])
        self.damaged, self.has_started = tuple(damaged), False

    def start_group(self, group: ProcessGroup, step: int) -> None:
        """See Report. Rank 0 writes the group into the ledger, after the steps that it has taken over."""
        own = torch.tensor([os.getpid(), *encode_kind(cpu_kind())])
        pids, *kinds = group.gather({group.rank: own}, group.size, 1 + WIDTH).long().T.tolist()
        cpus = tuple(decode_kind(list(kind)) for kind in zip(*kinds, strict=True))
        self.on_training()
        if self.step_times is not None:
            self.step_times.measure_sums(group)
        self.pids = tuple(pids)
        was_writer, self.is_writer, self.group = self.is_writer, group.rank == 0, group
        if not self.is_writer:
            self.writing = None
            return
        if not (was_writer and self.has_started):
            self._take_over()
        facts = {"attempt": self.attempt, "workers": group.size, "pids": self.pids, "time": time.time(), "cpus": cpus}
        is_first = not self.has_started
        if is_first:
            recipe = hash_recipe(self.recipe.model_dump(mode="json"))
            self._write(ledger.Start(start=self.begun, damaged=self.damaged, recipe_sha256=recipe, **facts))
            self.has_started = True
        for row in self.rows:  # of steps that this rank has taken over from one that was ahead
            self._note(row)
        if not is_first:
            self._write(ledger.Regroup(regroup=step, left=self.left, **facts))

    def start_step(self, step: int, group: ProcessGroup, input_seconds: float) -> None:
        if self.step_times is not None:
            self.step_times.start_step(step, group, input_seconds)

    def __call__(self, metrics: Metrics, state: dict[str, Any] | None) -> bool:
        if state is None:
            self.rows.append(metrics)
            if self.is_writer:
                self._note(metrics)
            if self.is_writer and time.monotonic() - self.sent_at >= self.flush_seconds:
                self.flush()
        elif self.is_writer and self.finish_checkpoint(wait=True) is None:
            self.last_checkpoint, self.last_checkpoint_time = metrics["step"], time.time()
            self.writing = self.writer.start(metrics["step"], {**state, "rows": list(self.rows)})
            if self.saved is not None:
                self.finish_checkpoint(wait=True)
        return False

    def finish_checkpoint(self, wait: bool = False) -> CheckpointError | None:
        """See Report. A failure stays one: every later call returns it again."""
        if self.writing is None:
            return None
        while wait and not self.writing.done():
            self._check_group()
            futures.wait([self.writing], POLL_SECONDS)
        if not self.writing.done():
            return None
        try:
            written = self.writing.result()
            facts = {"checkpoint": self.last_checkpoint, "time": self.last_checkpoint_time}
            self._write(ledger.Checkpoint(attempt=self.attempt, state_sha256=written.state_sha256, **facts))
        except CheckpointError as failure:
            self._check_group()  # whoever has taken over removes what this rank was writing
            return failure
        self.writing = None
        if self.saved is not None:
            self.saved(written.path)
        return None

    def saved_step(self, step: int) -> int:
        return min(step, self.last_checkpoint)

    def carried(self) -> dict[str, Any]:
        return {"rows": self.rows, "attempt": self.attempt, "begun": self.begun, "damaged": self.damaged}

    def carry(self, carried: dict[str, Any]) -> None:
        self.rows, self.attempt = list(carried["rows"]), carried["attempt"]
        self.begun, self.damaged = carried["begun"], carried["damaged"]

    def arrived(self) -> int:
        return self.last_arrived if self.is_writer else 0

    def forget(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] > step]

    def note_average(self, step: int, sites: tuple[str, ...], weights_sha256: str) -> None:
        self._write(ledger.Average(attempt=self.attempt, average=step, sites=sites, weights_sha256=weights_sha256))

    def note_leaving(self, ranks: list[int]) -> None:
        self.left = tuple(self.pids[rank] for rank in ranks)

    def hand_over(self, step: int) -> None:
        self._write(ledger.HandOver(attempt=self.attempt, moved=step, why="every worker was told to leave"))

    def flush(self) -> None:
        """Send the rows that were not sent yet, or not by this rank."""
        self._check_group()
        self.last_arrived = self.send([row for row in self.rows if row["step"] > self.sent])
        if self.rows:
            self.sent = self.rows[-1]["step"]
        self.sent_at = time.monotonic()

    def finish(self, result: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        if not self.is_writer:
            return result
        self.flush()
        write_model(self.directory / "model", weights, self.recipe, self.spec)
        hashes = {
            "weights_sha256": result["weights_sha256"],
            "model_sha256": sha256(self.directory / "model" / WEIGHTS),
        }
        self._write(ledger.Finish(attempt=self.attempt, finished=result["steps"], **hashes))
        complete = result | ledger.summarise_ledger(self.ledger) | {"ledger_sha256": self.head}
        self._check_group()
        write_json(self.directory / "result.json", complete)
        return complete

    def _take_over(self) -> None:
        """Be the writer of this attempt from now on; rows are sent again."""
        content = b""
        if self.ledger.is_file():
            # in a new file, without the line that a crash has torn: a writer that hung since it has opened the old one,
            # and is expelled, still writes to that
            try:
                with atomic_write(self.ledger) as copied:
                    content = ledger.complete_lines(self.ledger.read_bytes())
                    copied.write_bytes(content)
                    shutil.copymode(self.ledger, copied)
            except OSError as error:
                raise self._ledger_error(error) from error
        self.head = ledger.find_head(content)
        entries = ledger.read_ledger(self.ledger)
        own = [entry for entry in entries if entry.attempt == self.attempt]
        self.sent, self.has_started = 0, bool(ledger.starts(own))
        self.noted = max(ledger.steps(own), default=self.begun)
        written = [entry.checkpoint for entry in own if isinstance(entry, ledger.Checkpoint)]
        self.last_checkpoint = max(written, default=self.begun)

    def _note(self, row: Metrics) -> None:
        if row["step"] > self.noted:
            self._write(ledger.Step(attempt=self.attempt, step=row["step"], loss=row["train/loss"]))
            self.noted = row["step"]

    def _write(self, entry: ledger.Entry) -> None:
        if self.is_writer:
            try:
                line, head = ledger.render_line(entry, self.head)
                with self.ledger.open("ab") as file:
                    self._check_group()
                    file.write(line)
                self.head = head
            except OSError as error:
                raise self._ledger_error(error) from error

    def _ledger_error(self, error: OSError) -> CheckpointError:
        do = f"free space, then: raylab resume {self.directory.name}"
        return CheckpointError(f"{self.ledger} could not be written", describe_cause(error), do)

    def _wait_for_group(self) -> None:
        """Return in the writer of a group that stands; raise PeerLost where the others have gone on without it. While
        they form the next group, nobody knows."""
        while self.group.is_broken():
            if self.is_closed:
                raise PeerLost("this group has ended")
            time.sleep(POLL_SECONDS)
        if not self.is_writer:
            raise PeerLost("another process writes")

    def _check_group(self) -> None:
        """Raise PeerLost in a writer that others have gone on without, as after a long stop of its process."""
        if self.group.is_broken():
            raise PeerLost("this group has ended")


def hash_recipe(document: dict[str, Any]) -> str:
    """Return the SHA-256 of all that a recipe's JSON document says of the result: not of the workers, of a search, or
    of weights that training from scratch ignores."""
    own = {part: fields for part, fields in document.items() if part not in ("scaling", "search")}
    if own.get("transfer", {}).get("mode") == "scratch":
        own["model"] = {name: value for name, value in own["model"].items() if name != "weights"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def write_model(directory: Path, weights: dict[str, torch.Tensor], recipe: Recipe, spec: dict[str, Any]) -> None:
    """Write a network with the state `weights`, so that read_model finds it."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, directory / WEIGHTS)
    write_json(directory / "model.json", {"recipe": recipe.model_dump(mode="json"), "spec": spec})
    for code in code_of(recipe):
        (directory / FOLDER).mkdir(exist_ok=True)
        write_text(directory / FOLDER / code.name, code.text)


def read_model(directory: Path) -> tuple[Task, Recipe, dict[str, Any], nn.Module]:
    """Return (task, recipe, spec, trained network) of a run directory; DataError if it has no finished model."""
    path = directory / "model" / "model.json"
    if not path.is_file():
        raise DataError(
            f"run {directory.name} has no trained model yet",
            "it did not reach its last step",
            f"raylab resume {directory.name}",
        )
    note = read_model_note(directory)
    load_stored(path.parent)
    do = f"restore it; or remove the run's result.json, then: raylab resume {directory.name}"
    recipe = parse_stored_recipe(note.recipe, f"{path} has no valid recipe", do)
    job = find_task(recipe.task)
    try:
        # The weights that it started from are not needed, and may no longer exist
        model = job.model(without_weights(recipe), note.spec)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        if explain_own_error(error) is not None:
            raise
        why = f"no network can be built for its inputs ({type(error).__name__}: {error})"
        raise DataError(f"{path} is damaged", why, do) from error
    weights = path.with_name(WEIGHTS)
    try:
        model.load_state_dict(_tensors(weights))
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        raise DataError(f"{weights} does not have the weights of the network in {path.name}", why, do) from error
    return job, recipe, note.spec, model


def inherit(model: nn.Module, parent: Path, spec: dict[str, Any]) -> None:
    """Load the weights of run `parent` into `model`; the head stays new if the classes differ.

    For series, whose inputs have names, the weights of the inputs that both have are loaded, whatever their order:
    another hospital measures other things. For scenes, the weights of the first layer are spread over the bands
    (first_layer.py). Raises DataError if the parent was trained on another kind of input, or if its layers do not fit.
    """
    note = read_model_note(parent)
    parent_spec = note.spec
    if parent_spec["kind"] != spec["kind"]:
        raise DataError(
            f"run {parent.name} was trained on '{parent_spec['kind']}', this data is '{spec['kind']}'",
            do="choose a parent run of the same task",
        )
    same = parent_spec["classes"] == spec["classes"]
    path = parent / "model" / WEIGHTS
    state = _tensors(path)
    network = model.members[0] if isinstance(model, Ensemble) else model
    if isinstance(network, Recurrent | GruD):
        state = match_inputs(model.state_dict(), state, network.inputs(spec), network.inputs(parent_spec))
    elif "bands" in spec:
        state = spread(model, state, parent_spec["bands"], spec["bands"])
    try:
        fill(model, state, str(path), own_head=same)
    except DataError as error:
        do = f"use the parent's model, {note.recipe['model']['name']}, with its options (--set model....)"
        raise DataError(error.what, error.why, do) from error


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        run = path.parents[1].name
        do = f"restore it; or remove the run's result.json, then: raylab resume {run}"
        raise DataError(f"{path} could not be read as safetensors", str(error), do) from error
