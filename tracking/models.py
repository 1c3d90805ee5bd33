"""Models in MLflow, without pickle, and their registry."""

import contextlib
import copy
import hashlib
import importlib.metadata
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylab.errors import TrackingError
from tracking import runs
from tracking.access import login

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

log = logging.getLogger(__name__)

FILES = "model"  # the artifact of a predictor
BEST = "best"  # the alias of a registered model
WEIGHTS_TAG = "raylab.weights_sha256"  # of a logged model
SCORE_TAG, LOSS_TAG = "raylab.score", "raylab.loss"  # of a registered version
MOST_VERSIONS = 10_000  # MLflow's limit on a page
WEIGHTS_ONLY = """This directory contains only the weights: model.safetensors.

torch.export could not trace the model, so MLflow has no graph to run, and raylab stores no pickles:
    {reason}
To use the weights, build the model from the run's recipe and load them:
    safetensors.torch.load_model(model, "model.safetensors")
"""


def synthetic_example(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random normal float32 values of this shape: an input example without patient data."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def log_model(uri: str, run_id: str, model: "torch.nn.Module", example: np.ndarray, name: str = "model") -> str:
    """Log a run's model with its signature and a SYNTHETIC input example; returns its MLflow address.

    The format is torch.export's pt2: a graph with weights, loaded without running stored code, for
    any batch size. A model that cannot be traced is logged as weights (safetensors) and a note instead.
    A run has one logged model: weights that are already logged are not logged again, and the remains of an interrupted
    upload are deleted.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    runs.refuse_outside(uri, runs.client(uri).get_run(run_id).info.artifact_uri)
    # A copy, because logging must not move a model in training off its GPU or out of train mode.
    plain = copy.deepcopy(model).cpu().eval()
    if example.shape[0] == 1:
        example = np.concatenate([example, example])  # export would fix the batch size to one
    with torch.no_grad():
        output = plain(torch.from_numpy(example))
    signature = infer_signature(example, _arrays(output))

    def save(saved: Path) -> None:
        try:
            mlflow.pytorch.save_model(
                plain,
                saved,
                signature=signature,
                input_example=example,
                pip_requirements=_requirements("torch", "numpy"),
                serialization_format="pt2",
            )
        except Exception as error:  # export fails with torch's, sympy's or Python's own errors
            raise _Untraceable(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            ) from error

    try:
        return _log_once(uri, run_id, name, _hash_weights(plain), save)
    except _Untraceable as error:
        log.warning("logging weights only, the model cannot be exported: %s", error)
        with tempfile.TemporaryDirectory() as scratch:
            return _log_weights(uri, run_id, plain, Path(scratch) / name, str(error))


class _Untraceable(Exception):
    """torch.export cannot trace the model."""


@dataclass(frozen=True)
class Predictor:
    """A model that MLflow runs from code: `code` is a Python file that calls mlflow.models.set_model, `files` the
    directory that it gets as its artifact `model`. `columns`: (name, type, whether it is required) of its frame;
    `results`: (name, type) of its answer, in which `strings` is a list of them. `example` is a synthetic frame."""

    code: Path
    files: Path
    columns: Iterable[tuple[str, str, bool]]
    results: Iterable[tuple[str, str]]
    example: "pd.DataFrame"


def log_predictor(uri: str, run_id: str, model: "torch.nn.Module", predictor: Predictor, name: str = "model") -> str:
    """Log a run's model as a function of named columns, without pickle ("models from code"); returns its MLflow
    address. As `log_model`, a run has one logged model, known by the weights of `model`.
    """
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import DataType
    from mlflow.types.schema import Array, ColSpec, Schema

    runs.refuse_outside(uri, runs.client(uri).get_run(run_id).info.artifact_uri)
    inputs = Schema([ColSpec(kind, column, required=required) for column, kind, required in predictor.columns])
    strings = {"strings": Array(DataType.string)}
    outputs = Schema([ColSpec(strings.get(kind, kind), column) for column, kind in predictor.results])

    def save(saved: Path) -> None:
        mlflow.pyfunc.save_model(
            saved,
            python_model=str(predictor.code),
            artifacts={FILES: str(predictor.files)},
            signature=ModelSignature(inputs=inputs, outputs=outputs),
            input_example=predictor.example,
            pip_requirements=_requirements("torch", "numpy", "polars"),
        )

    return _log_once(uri, run_id, name, _hash_weights(model), save)


def _requirements(*packages: str) -> list[str]:
    """Listed explicitly; otherwise MLflow loads the model in a new process to find out."""
    return [f"{package}=={importlib.metadata.version(package)}" for package in packages]


def _log_once(uri: str, run_id: str, name: str, weights: str, save: Callable[[Path], None]) -> str:
    """Return the address of the run's logged model with these weights. If there is none, upload what `save` writes."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.models.model import MLMODEL_FILE_NAME

    client = runs.client(uri)
    run = client.get_run(run_id)
    logged = None
    for one in _list_logged_models(client, run, name):
        if logged is None and one.status == "READY" and one.tags.get(WEIGHTS_TAG) == weights:
            logged = one
        else:
            client.delete_logged_model(one.model_id)
    if logged is None:
        with tempfile.TemporaryDirectory() as scratch, _here(uri):
            saved = Path(scratch) / "saved"
            save(saved)
            # Not MLflow's own log_model: it logs the model of a run given by id into MLflow's default experiment,
            # where runs:/ID/NAME does not find it.
            logged = client.create_logged_model(
                run.info.experiment_id, name, run_id, {WEIGHTS_TAG: weights}, params=run.data.params
            )
            described = Model.load(str(saved))
            described.run_id, described.artifact_path = run_id, logged.artifact_location
            described.model_id = described.model_uuid = logged.model_id
            described.save(str(saved / MLMODEL_FILE_NAME))
            client.log_model_artifacts(logged.model_id, str(saved))
            client.finalize_logged_model(logged.model_id, "READY")
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    return str(logged.model_uri)


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and the version to which the alias `best` points now."""

    version: int
    best: int


def register(uri: str, run_id: str, registered_name: str, score: float | None, loss: float) -> Registered:
    """Make the run's logged model a version of `registered_name`, and point the alias `best` to the best version.

    That is the version with the highest `score`; among equal scores, the one with the lowest `loss`, then the oldest.
    Versions without a score come last. A model that is already a version does not get a second one.
    Raises TrackingError if the run has no model that MLflow can load.
    """
    from mlflow.exceptions import MlflowException

    client = runs.client(uri)
    logged = next((m for m in _list_logged_models(client, client.get_run(run_id)) if m.status == "READY"), None)
    if logged is None:
        raise TrackingError(
            f"run {run_id} has no model to register",
            "it logged none, or only its weights (see its artifacts)",
            "register a run whose model could be exported",
        )
    try:
        client.create_registered_model(registered_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = list(client.search_model_versions(f"name = '{registered_name}'", max_results=MOST_VERSIONS))
    version = next((v for v in versions if v.source == logged.artifact_location), None)
    if version is None:
        tags = {LOSS_TAG: repr(float(loss))} | ({} if score is None else {SCORE_TAG: repr(float(score))})
        version = client.create_model_version(
            registered_name, logged.artifact_location, run_id=run_id, model_id=logged.model_id, tags=tags
        )
        versions.append(version)
    best = max(versions, key=_rank_version)
    client.set_registered_model_alias(registered_name, BEST, best.version)
    return Registered(int(version.version), int(best.version))


def _rank_version(version: "ModelVersion") -> tuple[float, float, int]:
    """A key that is greatest for the best version."""
    score = float(version.tags.get(SCORE_TAG, -math.inf))
    return score, -float(version.tags.get(LOSS_TAG, math.inf)), -int(version.version)


def _list_logged_models(client: "MlflowClient", run: "Run", name: str = "model") -> list["LoggedModel"]:
    """The run's logged models of this name, newest first."""
    found: list[LoggedModel] = []
    token = None
    while True:
        page = client.search_logged_models(
            [run.info.experiment_id],
            f"name = '{name}' AND source_run_id = '{run.info.run_id}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
            page_token=token,
        )
        found += page
        token = page.token
        if not token:
            return found


def _hash_weights(model: "torch.nn.Module") -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def fetch(uri: str, name: str) -> Iterator[Path]:
    """Download a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`, for a while: its directory. Raises
    TrackingError if there is no such model."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as scratch:
        with _here(uri):
            try:
                found = mlflow.artifacts.download_artifacts(artifact_uri=name, dst_path=scratch, tracking_uri=uri)
            except (MlflowException, OSError) as error:
                why = str(error).partition("\n")[0]
                do = "write models:/NAME/VERSION or models:/NAME@ALIAS"
                raise TrackingError(f"no registered model {name} at {uri}", why, do) from error
        yield Path(found)


def find_files(fetched: Path, name: str) -> Path:
    """The directory of a predictor's files in a fetched model, to read as data; TrackingError if it is none."""
    files = fetched / "artifacts" / FILES
    if not files.is_dir():
        raise TrackingError(
            f"{name} has no weights with a recipe",
            "it is a graph, of a task whose models do not predict raw data, or of an earlier version",
            "load the run itself, or train again",
        )
    return files


def fetch_weights(uri: str, name: str, target: Path) -> None:
    """Write the weights of a registered model to the safetensors file `target`. No stored code is run: the graph is
    read as data. Raises TrackingError if there is no such model, or no weights that can be read this way.
    """
    import torch
    from safetensors.torch import save_file

    with fetch(uri, name) as found:
        graph = next(iter(sorted(found.rglob("*.pt2"))), None)
        if graph is None:
            raise TrackingError(f"{name} has no torch.export graph", "pickled models are not loaded")
        tensors = {key: value.detach().clone() for key, value in torch.export.load(graph).state_dict.items()}
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside)
        beside.replace(target)


def _log_weights(uri: str, run_id: str, model: "torch.nn.Module", directory: Path, reason: str) -> str:
    from safetensors.torch import save_model

    directory.mkdir()
    save_model(model, str(directory / "model.safetensors"))
    (directory / "README.txt").write_text(WEIGHTS_ONLY.format(reason=reason))
    runs.client(uri).log_artifacts(run_id, str(directory), directory.name)
    return f"runs:/{run_id}/{directory.name}"


def _arrays(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: value.numpy() for key, value in output.items()}
    return (output[0] if isinstance(output, tuple | list) else output).numpy()


@contextlib.contextmanager
def _here(uri: str) -> Iterator[None]:
    """Set MLflow's global address, the only one that its model functions use, to `uri` for a while."""
    import mlflow

    runs.client(uri)  # sets the environment
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    named = os.environ.get("MLFLOW_TRACKING_URI")  # which MLflow sets, for child processes
    mlflow.set_tracking_uri(runs.reach(uri))
    mlflow.set_registry_uri(runs.reach(uri))
    try:
        with login.explained(uri):
            yield
    finally:
        mlflow.set_tracking_uri(before[0])
        mlflow.set_registry_uri(before[1])
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        if named is not None:
            os.environ["MLFLOW_TRACKING_URI"] = named
