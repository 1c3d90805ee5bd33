"""Keeps a run and its MLflow run in step: creates both, forwards the outbox, and records how the run ended.

Only this process talks to MLflow. Training processes only append to the outbox in the run's directory.
"""

import hashlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from jobs.common import description
from jobs.common.console import say, set_status
from jobs.common.home import annotate, home, lock_run, new_directory, note, remove
from jobs.common.interrupts import hold_interrupts
from jobs.common.run_end import Ending, describe_end, explain_end, record_end, reserve_room
from raylab.config.overrides import override
from raylab.config.recipe import IcuData, Recipe, flatten
from raylab.data import datalad
from raylab.data.prepared import Meta, sha256
from raylab.errors import RaylabError, TrackingError, UsageError
from raylab.files import write_json, write_text
from raylab.tasks.plugins import FOLDER, code_of, used_by, versions
from raylab.training.run_record import FILE, Kind, Registration, RunRecord
from raylab.witness import NOTE, witness
from tracking import models as tracked_model
from tracking import runs, views
from tracking.forwarder import Forwarder, LoginRefused, Unavailable, ensure_run
from tracking.outbox import Outbox, RunRequest, read
from tracking.system import SystemMonitor, append_sample

log = logging.getLogger(__name__)
CODE = Path(__file__).resolve().parents[1]
FLUSH_SECONDS = 15.0


class ToOutbox:
    """Appends rows of metrics to a run's outbox, each step only once.

    A resumed run recomputes some steps, with identical results; steps that are already in the outbox are skipped.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.last: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        outbox = Outbox(self.directory / "outbox")
        if self.last is None:
            records = (record for _, record in read(outbox.directory) if record is not None)
            self.last = max((r["step"] for r in records if "epoch" in r.get("values", {})), default=0)
        new = [row for row in rows if row["step"] > self.last]
        if new:
            self.last = new[-1]["step"]
            outbox.append(
                *(
                    {"kind": "metrics", "step": row["step"], "values": {k: v for k, v in row.items() if k != "step"}}
                    for row in new
                )
            )

    def add_node_sample(self, sample: dict[str, float]) -> None:
        """Record the load of one of the run's nodes (`NodeSampler`)."""
        append_sample(Outbox(self.directory / "outbox"), sample)

    def send(self, rows: list[dict[str, Any]]) -> int:
        """The `send` of a run without Ray: what is in the outbox has arrived."""
        self(rows)
        return self.last or 0


@dataclass(frozen=True)
class NewRun:
    """What a run begins with."""

    record: RunRecord
    params: Mapping[str, object]
    files: Mapping[str, str] = field(default_factory=dict)
    """{name: text}, which become artifacts of the MLflow run"""
    records: Sequence[Mapping[str, Any]] = ()
    """more records for MLflow"""
    nested_in: Path | None = None
    """directory of the run under which MLflow shows it"""


def describe_run(
    directory: Path,
    recipe: Recipe,
    meta: Meta,
    data: Path,
    kind: Kind,
    uri: str,
    parent: Path | None = None,
    nested_in: Path | None = None,
    more_tags: Mapping[str, str] | None = None,
    best_step: int = 0,
) -> NewRun:
    """A run in `directory` that trains a recipe, or scores the model of `best_step` that was trained with it.

    `parent` is the run whose weights this one starts from (for an evaluation: the run whose model it scores).
    """
    ancestor = None if parent is None else note(parent)
    dataset = datalad.read_state(data)
    of_parent = {"raylab.parent": ancestor.run_id or "", "raylab.parent_name": ancestor.name} if ancestor else {}
    tags = runs.standard_tags(
        code=CODE,
        task=recipe.task,
        seed=recipe.seed,
        synthetic=meta.synthetic,
        data_hash=meta.data_hash,
        split_hash=meta.split_hash,
    ) | {
        runs.KEY: uuid4().hex,
        "raylab.kind": kind,
        "raylab.name": directory.name,
        "raylab.recipe_hash": hash_text(render_recipe(recipe)),
        "raylab.data_source": meta.origin,
        views.DATA: f"{meta.origin} {meta.data_hash[:8]}",
        **({} if kind in ("evaluate", "benchmark") else {views.WORKERS: describe_workers(recipe, kind)}),
        **({"raylab.cohort": recipe.data.cohort} if isinstance(recipe.data, IcuData) else {}),
        **describe_plugins(recipe),
        **of_parent,
        **({} if dataset is None else describe_dataset(dataset)),
        **(more_tags or {}),
    }
    run_record = RunRecord(
        name=directory.name,
        uri=uri,
        experiment=experiment_name(),
        kind=kind,
        task=recipe.task,
        data=str(data),
        data_hash=meta.data_hash,
        split_hash=meta.split_hash,
        synthetic=meta.synthetic,
        parent=ancestor.name if ancestor else None,
        tags=tags,
        cluster=os.environ.get("RAYLAB_CLUSTER"),
        status="RUNNING",
        best_step=best_step,
    )
    if dataset is not None:
        more = {"datalad": dataset, "annex_keys": datalad.read_keys(data)}
        run_record = run_record.model_copy(update=more)
    if parent is not None:
        run_record = run_record.model_copy(update={"parent_directory": str(parent)})  # it may be in another user's home
    text = description.render(run_record, recipe, {})
    run_record = run_record.model_copy(update={"tags": {**tags, description.TAG: text}})
    source = f"{meta.origin}{' (synthetic)' if meta.synthetic else ''}"
    context = "evaluation" if kind == "evaluate" else "training"
    shown = {"kind": "input", "name": source, "digest": meta.data_hash[:36], "source": source, "context": context}
    files = {"recipe.json": render_recipe(recipe), "attrition.json": render_attrition(meta), **render_code(recipe)}
    return NewRun(run_record, flatten(recipe), files, [shown], nested_in)


def describe_dataset(state: datalad.DatasetState) -> dict[str, str]:
    """The tags of a run whose data is in a DataLad dataset."""
    return {
        "raylab.datalad_id": state.id,
        "raylab.datalad_commit": f"{state.commit}{'-dirty' if state.is_dirty else ''}",
    }


def describe_trial(recipe: Recipe, search: Path, number: int) -> NewRun:
    """A trial of a search, whose MLflow run is nested under that of the search."""
    parent = note(search)
    name = f"{parent.name}-{number:03d}"
    recipe_hash = hash_text(render_recipe(recipe))
    key = f"{parent.tags.get(runs.KEY, parent.run_id)}-{number:03d}"
    inherited = {tag: value for tag, value in parent.tags.items() if tag != description.TAG}
    own = {"raylab.kind": "trial", "raylab.name": name, "raylab.recipe_hash": recipe_hash, runs.KEY: key}
    run_record = RunRecord(
        name=name,
        uri=parent.uri,
        experiment=parent.experiment,
        kind="trial",
        task=parent.task,
        data=parent.data,
        data_hash=parent.data_hash,
        split_hash=parent.split_hash,
        synthetic=parent.synthetic,
        parent=None,
        tags={**inherited, **own},
        status="RUNNING",
        number=number,
    )
    params = {path: value for path, value in flatten(recipe).items() if not path.startswith("search.")}
    files = {"recipe.json": render_recipe(recipe), **render_code(recipe)}
    return NewRun(run_record, params, files, nested_in=search)


def describe_workers(recipe: Recipe, kind: Kind = "train") -> str:
    """The number of workers of a run, "1:8" if it varies; of a search, that of each trial."""
    if kind == "tune":
        return str(recipe.search.workers_per_trial)
    low, high = recipe.scaling.workers
    return str(low) if low == high else f"{low}:{high}"


def render_recipe(recipe: Recipe) -> str:
    return recipe.model_dump_json(indent=1) + "\n"


def render_code(recipe: Recipe) -> dict[str, str]:
    """{path in the run's directory: text} of the code of own models and tasks."""
    return {f"{FOLDER}/{code.name}": code.text for code in code_of(recipe)}


def describe_plugins(recipe: Recipe) -> dict[str, str]:
    """The tag of the plugins that a recipe uses: files by SHA-256, packages by version; none if it uses none."""
    used = versions(used_by(recipe))
    return {"raylab.plugins": ", ".join(f"{name} {version}" for name, version in used.items())} if used else {}


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def render_attrition(meta: Meta) -> str:
    content = meta.to_json() | {"warnings": meta.printable_warnings}
    shown = ("source", "synthetic", "attrition", "label", "counts", "warnings")
    return json.dumps({key: content[key] for key in shown if key in content}, indent=1) + "\n"


@contextmanager
def open_run(directory: Path, new: NewRun, system: bool = True) -> Iterator[Forwarder]:
    """Open a run in `directory`, which appears with all that the run begins with or not at all, and track it while the
    context is open (`track_run`).

    The MLflow run is created next. A server that has gone away since `checked_address` gets it later, through the
    outbox; one that refuses it raises TrackingError, and the directory is removed.
    """
    with ExitStack() as stack:
        with hold_interrupts():
            with new_directory(directory) as hidden:
                stack.enter_context(lock_run(directory, hidden))
                write_run(directory, new, hidden)
            try:
                ensure_run(directory / "outbox")
            except Unavailable as error:
                if isinstance(error, LoginRefused):
                    remove(directory)
                    raise error.__cause__ or error from None  # no records are kept
                log.warning("%s", error)
            except TrackingError:
                remove(directory)
                raise
            annotate(directory)  # with the id of the MLflow run
            forwarder = stack.enter_context(track_run(directory, system))
        yield forwarder


@contextmanager
def reopen_run(directory: Path, system: bool = True) -> Iterator[Forwarder]:
    """Continue a run, which is marked as RUNNING again, and track it while the context is open. It works without a
    server."""
    with lock_run(directory), ExitStack() as stack:
        with hold_interrupts():
            mark_running(directory)
            forwarder = stack.enter_context(track_run(directory, system))
        yield forwarder


@contextmanager
def open_work(
    directory: Path,
    kind: Kind,
    task: str,
    seed: int,
    synthetic: bool,
    source: str,
    data: Path,
    params: Mapping[str, object],
    system: bool = True,
) -> Iterator[None]:
    """Open the run of work that trains nothing (a sweep, a fit), or continue it, and track it while the context is
    open. Raises UsageError if the run in `directory` began with other parameters.

    Its data hash becomes a tag when the work is done.
    """
    if (directory / FILE).is_file():
        records = (record for _, record in read(directory / "outbox") if record is not None)
        first: dict[str, str] = next((record["values"] for record in records if record["kind"] == "params"), {})
        if first != _to_text(params):
            why = f"with the parameters {', '.join(f'{name}={value}' for name, value in first.items())}"
            raise UsageError(f"there is already a run named '{directory.name}'", why, "choose another --name")
        with reopen_run(directory, system):
            yield
        return
    tags = runs.standard_tags(code=CODE, task=task, seed=seed, synthetic=synthetic, data_hash="", split_hash="") | {
        runs.KEY: uuid4().hex,
        "raylab.kind": kind,
        "raylab.name": directory.name,
        "raylab.data_source": source,
    }
    run_record = RunRecord(
        name=directory.name,
        uri=checked_address(),
        experiment=experiment_name(),
        kind=kind,
        task=task,
        data=str(data),
        synthetic=synthetic,
        parent=None,
        tags=tags,
        status="RUNNING",
    )
    with open_run(directory, NewRun(run_record, params), system):
        yield


def write_run(directory: Path, new: NewRun, place: Path | None = None) -> None:
    """Write what a run in `directory` begins with, its record last; the same call completes what a killed one has left.
    `place`: the hidden directory that will be `directory`."""
    place = place or directory
    for name, text in new.files.items():
        (place / name).parent.mkdir(exist_ok=True)
        write_text(place / name, text)
    request = RunRequest(
        experiment=new.record.experiment,
        name=new.record.name,
        tags=new.record.tags,
        time=time.time_ns() // 1_000_000,
        nested_in=None if new.nested_in is None else str(new.nested_in / "outbox"),
    )
    artifacts = [
        {"kind": "artifact", "path": str(directory / name), "to": name.rpartition("/")[0]} for name in new.files
    ]
    params = {"kind": "params", "values": _to_text(new.params)}
    Outbox(place / "outbox").begin(new.record.uri, request, params, *new.records, *artifacts)
    write_json(place / FILE, new.record.to_json())


def _to_text(params: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items()}


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "raylab")


def checked_address() -> str:
    """The tracking address; raises TrackingError if no server answers there. Call this before any training."""
    uri = runs.address(home())
    runs.check(uri)
    return uri


def with_weights(recipe: Recipe, uri: str) -> Recipe:
    """The recipe with a registered MLflow model in `model.weights` replaced by a downloaded file.

    It is downloaded every time, because an alias may have moved. The file stays in the raylab home, named by its
    content, so that a resumed run finds the weights it started with.
    """
    name = recipe.model.weights_path
    if name is None or not name.startswith("models:/"):
        return recipe
    folder = home() / "weights"
    fetched = folder / f".fetched-{os.getpid()}.safetensors"
    tracked_model.fetch_weights(uri, name, fetched)
    kept = folder / f"{sha256(fetched)[:16]}.safetensors"
    fetched.replace(kept)
    return override(recipe, {"model.weights": str(kept)})


@contextmanager
def track_run(directory: Path, system: bool = True) -> Iterator[Forwarder]:
    """Forward the run's outbox and sample this node's load while the context is open. On exit the run is marked
    FINISHED, FAILED (an error) or KILLED (an interrupt), and the outbox is sent unless the server is unavailable."""
    outbox = Outbox(directory / "outbox")
    reserve_room(directory)
    forwarder = Forwarder()
    forwarder.add(outbox.directory)
    monitor = SystemMonitor(outbox) if system else None
    ending = Ending("FINISHED")
    try:
        with witness(directory / NOTE, [sys.executable, "-m", "jobs.common.mark_death", str(directory)]):
            yield forwarder
    except BaseException as error:
        explained = None if isinstance(error, RaylabError) else explain_end(error, directory)
        ending = describe_end(error, explained)
        if explained is not None:
            raise explained from error
        raise
    finally:
        with hold_interrupts():
            if monitor is not None:
                monitor.stop()
            record_end(directory, ending)
        set_status("sending the last records to MLflow")
        left = forwarder.close(FLUSH_SECONDS)
        if left:
            say(f"{left} records wait on disk for the MLflow server; send them with: raylab sync")


def forward_now(directory: Path) -> None:
    """Send new records of a finished run's outbox, for up to FLUSH_SECONDS; the rest waits on disk."""
    forwarder = Forwarder()
    forwarder.add(directory / "outbox")
    if left := forwarder.close(FLUSH_SECONDS):
        say(f"{left} records wait on disk for the MLflow server; send them with: raylab sync")


def log_model(directory: Path, shape: tuple[int, ...]) -> bool:
    """Log the finished model to MLflow, and register it if the run's record names a registered model. Returns False
    when the server is unavailable: `raylab sync` then does it. Repeating it changes nothing.

    A model of a task that predicts frames is a function of such a frame, by the same steps as `raylab.load`; any other
    is a graph, whose input example is random numbers of `shape`. Examples are never patient data.
    """
    from jobs.common.predictors import make_predictor
    from raylab.training.trained_model import TrainedModel

    run_record, outbox = note(directory), directory / "outbox"
    trained = TrainedModel.read(directory)
    predictor = make_predictor(trained, directory / "model")
    try:
        runs.check(run_record.uri)
        with warnings.catch_warnings():  # torch.export warns about its own internals
            warnings.simplefilter("ignore")
            run_id = ensure_run(outbox)
            if predictor is not None:
                tracked_model.log_predictor(run_record.uri, run_id, trained.network, predictor)
            else:
                example = tracked_model.synthetic_example(shape)
                tracked_model.log_model(run_record.uri, run_id, trained.network, example)
        if run_record.register_as is not None:
            register(directory, run_record.uri, run_id, run_record.register_as)
    except RaylabError as error:
        log.warning("the model waits for `raylab sync`: %s", error.what)
        annotate(directory, model_logged=False, input_shape=shape)
        return False
    annotate(directory, model_logged=True, input_shape=shape)
    return True


def register(directory: Path, uri: str, run_id: str, to: Registration) -> None:
    """Register the logged model of a search's best trial as `to`, and tag the search's run with trial and version."""
    search = Outbox(directory.parents[1] / "outbox")
    search.append({"kind": "tags", "values": {"raylab.best_run": run_id}})
    try:
        done = tracked_model.register(uri, run_id, to.name, to.score, to.loss)
    except TrackingError as error:
        say(f"the best model is logged but not registered: {error.what}")
        return
    annotate(directory, registered=f"{to.name}/{done.version}", best_version=done.best)
    search.append({"kind": "tags", "values": {"raylab.registered": f"{to.name}/{done.version}"}})
    if done.best != done.version:
        say(f"{to.name} has a better version already: the alias `best` names version {done.best}")


def mark_running(directory: Path) -> None:
    """Mark the run and its MLflow run as RUNNING again. It goes through the outbox, so it works without a server."""
    record = annotate(directory, status="RUNNING", cluster=os.environ.get("RAYLAB_CLUSTER"))
    outbox = Outbox(directory / "outbox")
    now = time.time_ns() // 1_000_000
    outbox.bind(
        record.uri,
        record.run_id,
        RunRequest(experiment=record.experiment, name=record.name, tags=record.tags, time=now),
    )
    outbox.append({"kind": "status", "status": "RUNNING"})


def mark_ended(directory: Path) -> None:
    """Mark a run as ended that no process works on any more: as its outbox says, or else as KILLED."""
    outbox = Outbox(directory / "outbox")
    said = [record["status"] for _, record in read(outbox.directory) if record and record["kind"] == "status"]
    if said and said[-1] != "RUNNING":
        annotate(directory, status=said[-1])
    else:
        record_end(directory, Ending("KILLED", "its process was killed"))
