"""Keeps a run and its MLflow run in step: creates both, forwards the outbox, and records how the run ended.

Only this process talks to MLflow. Training processes only append to the outbox in the run's directory.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.common.console import say
from jobs.common.home import annotate, describe, home, note
from jobs.common.interrupts import hold_interrupts
from jobs.common.run_end import End, describe_end, explain_end, record_end, reserve_room
from raylab.config.overrides import override
from raylab.config.recipe import IcuData, Recipe, flatten
from raylab.data.prepared import Meta, sha256
from raylab.errors import RaylabError, TrackingError
from raylab.files import write_json, write_text
from raylab.training.run_record import Kind, Registration, RunRecord
from raylab.witness import witness
from tracking import models as tracked_model
from tracking import runs
from tracking.forwarder import Forwarder
from tracking.outbox import Outbox, read
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


def create_run(
    directory: Path,
    recipe: Recipe,
    meta: Meta,
    data: Path,
    kind: Kind,
    uri: str,
    parent: RunRecord | None = None,
    nested_in: str | None = None,
    more_tags: Mapping[str, str] | None = None,
) -> RunRecord:
    """Create the MLflow run of a new run directory, write the run's record, and return it.

    `parent` is the run whose weights this one starts from (for an evaluation: the run whose model it scores),
    `nested_in` the id of the MLflow run under which it is shown.
    """
    tags = runs.standard_tags(
        code=CODE,
        task=recipe.task,
        seed=recipe.seed,
        synthetic=meta.synthetic,
        data_hash=meta.data_hash,
        split_hash=meta.split_hash,
    ) | {
        "raylab.kind": kind,
        "raylab.name": directory.name,
        "raylab.data_source": meta.source,
        **({"raylab.cohort": recipe.data.cohort} if isinstance(recipe.data, IcuData) else {}),
        **({"raylab.parent": parent.run_id, "raylab.parent_name": parent.name} if parent else {}),
        **(more_tags or {}),
    }
    experiment = experiment_name()
    run_id = runs.start_run(uri, experiment, directory.name, nested_in, tags)
    run_record = RunRecord(
        name=directory.name,
        run_id=run_id,
        uri=uri,
        experiment=experiment,
        kind=kind,
        task=recipe.task,
        data=str(data),
        data_hash=meta.data_hash,
        split_hash=meta.split_hash,
        synthetic=meta.synthetic,
        parent=parent.name if parent else None,
        tags=tags,
        cluster=os.environ.get("RAYLAB_CLUSTER"),
        status="RUNNING",
    )
    describe(directory, run_record)
    write_text(directory / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
    write_attrition(directory, meta)
    outbox = Outbox(directory / "outbox")
    outbox.bind(uri, run_id)
    values = {path: str(value) for path, value in flatten(recipe).items()}
    outbox.append({"kind": "params", "values": values})
    source = f"{meta.source}{' (synthetic)' if meta.synthetic else ''}"
    context = "evaluation" if kind == "evaluate" else "training"
    outbox.append(
        {"kind": "input", "name": source, "digest": meta.data_hash[:36], "source": source, "context": context}
    )
    for file in ("recipe.json", "attrition.json"):
        outbox.append({"kind": "artifact", "path": str(directory / file), "to": ""})
    return run_record


def open_trial(directory: Path, recipe: Recipe, search: RunRecord, number: int) -> RunRecord:
    """Create the MLflow run of a trial, nested under the run of its search."""
    tags = {**search.tags, "raylab.kind": "trial", "raylab.name": f"{search.name}-{number:03d}"}
    run_id = runs.start_run(search.uri, search.experiment, tags["raylab.name"], search.run_id, tags)
    run_record = RunRecord(
        name=tags["raylab.name"],
        run_id=run_id,
        uri=search.uri,
        experiment=search.experiment,
        kind="trial",
        task=search.task,
        data=search.data,
        data_hash=search.data_hash,
        split_hash=search.split_hash,
        synthetic=search.synthetic,
        parent=None,
        tags=tags,
        number=number,
    )
    describe(directory, run_record)
    write_text(directory / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
    outbox = Outbox(directory / "outbox")
    outbox.bind(search.uri, run_id)
    values = {path: str(value) for path, value in flatten(recipe).items() if not path.startswith("search.")}
    outbox.append({"kind": "params", "values": values})
    outbox.append({"kind": "artifact", "path": str(directory / "recipe.json"), "to": ""})
    return run_record


def open_work(
    directory: Path,
    kind: Kind,
    task: str,
    seed: int,
    synthetic: bool,
    source: str,
    data: Path,
    params: Mapping[str, object],
) -> RunRecord:
    """Create or continue the MLflow run of work that trains nothing (a sweep, a fit); returns its record.

    Its data hash becomes a tag when the work is done.
    """
    if (directory / "run.json").is_file():
        mark_running(directory)
        return note(directory)
    tags = runs.standard_tags(code=CODE, task=task, seed=seed, synthetic=synthetic, data_hash="", split_hash="") | {
        "raylab.kind": kind,
        "raylab.name": directory.name,
        "raylab.data_source": source,
    }
    uri, experiment = checked_address(), experiment_name()
    run_id = runs.start_run(uri, experiment, directory.name, None, tags)
    run_record = RunRecord(
        name=directory.name,
        run_id=run_id,
        uri=uri,
        experiment=experiment,
        kind=kind,
        task=task,
        data=str(data),
        synthetic=synthetic,
        parent=None,
        tags=tags,
    )
    describe(directory, run_record)
    outbox = Outbox(directory / "outbox")
    outbox.bind(uri, run_id)
    outbox.append({"kind": "params", "values": {name: str(value) for name, value in params.items()}})
    return run_record


def write_attrition(directory: Path, meta: Meta) -> None:
    content = meta.to_json()
    attrition = {key: content[key] for key in ("source", "synthetic", "attrition", "label", "counts") if key in content}
    write_json(directory / "attrition.json", attrition)


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
    status: End = "FINISHED"
    why = ""
    try:
        with witness(directory / "death.json", [sys.executable, "-m", "jobs.common.mark_death", str(directory)]):
            yield forwarder
    except BaseException as error:
        explained = None if isinstance(error, RaylabError) else explain_end(error, directory)
        status, why = describe_end(error, explained)
        if explained is not None:
            raise explained from error
        raise
    finally:
        with hold_interrupts():
            if monitor is not None:
                monitor.stop()
            record_end(directory, status, why)
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

    The input example is random numbers of `shape`, never patient data.
    """
    from raylab.training.run import read_model

    run_record = note(directory)
    _, _, _, network = read_model(directory)
    example = tracked_model.synthetic_example(shape)
    try:
        runs.check(run_record.uri)
        with warnings.catch_warnings():  # torch.export warns about its own internals
            warnings.simplefilter("ignore")
            tracked_model.log_model(run_record.uri, run_record.run_id, network, example)
        if run_record.register_as is not None:
            register(directory, run_record, run_record.register_as)
    except RaylabError as error:
        log.warning("the model waits for `raylab sync`: %s", error.what)
        annotate(directory, model_logged=False, input_shape=shape)
        return False
    annotate(directory, model_logged=True, input_shape=shape)
    return True


def register(directory: Path, run_record: RunRecord, to: Registration) -> None:
    """Register the logged model of a search's best trial as `to`, and tag the search's run with the version."""
    try:
        done = tracked_model.register(run_record.uri, run_record.run_id, to.name, to.score, to.loss)
    except TrackingError as error:
        say(f"the best model is logged but not registered: {error.what}")
        return
    annotate(directory, registered=f"{to.name}/{done.version}", best_version=done.best)
    search = directory.parents[1]
    Outbox(search / "outbox").append({"kind": "tags", "values": {"raylab.registered": f"{to.name}/{done.version}"}})
    if done.best != done.version:
        say(f"{to.name} has a better version already: the alias `best` names version {done.best}")


def mark_running(directory: Path) -> None:
    """Mark the run and its MLflow run as RUNNING again. It goes through the outbox, so it works without a server."""
    run_record = annotate(directory, status="RUNNING", cluster=os.environ.get("RAYLAB_CLUSTER"))
    outbox = Outbox(directory / "outbox")
    outbox.bind(run_record.uri, run_record.run_id)
    outbox.append({"kind": "status", "status": "RUNNING"})
