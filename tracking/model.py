"""Models in MLflow, without pickle, and their registry."""

import contextlib
import copy
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raylab.errors import TrackingError
from tracking import login, runs

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Named, because MLflow would otherwise load the model in a new process to find out.
PACKAGES = ("torch", "numpy")
WEIGHTS_ONLY = """This directory holds the weights only: model.safetensors.

torch.export could not trace the model, so MLflow has no graph to run, and raylab stores no pickles:
    {reason}
To use the weights, build the model from the run's recipe and load them:
    safetensors.torch.load_model(model, "model.safetensors")
"""


def synthetic_example(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random normal float32 of this shape: an input example that came from no patient."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def log_model(uri: str, run_id: str, model: "torch.nn.Module", example: np.ndarray, name: str = "model") -> str:
    """Log a model with its signature and a SYNTHETIC input example; returns its MLflow address.

    The format is torch.export's pt2: a graph with weights, loaded without running stored code, for
    any batch size. A model that cannot be traced leaves its weights (safetensors) and a note instead.
    """
    import mlflow.pytorch
    import torch
    from mlflow.models import infer_signature

    runs.refuse_outside(uri, runs.client(uri).get_run(run_id).info.artifact_uri)
    # A copy: logging must not move a model that is being trained off its GPU or out of train mode.
    plain = copy.deepcopy(model).cpu().eval()
    if example.shape[0] == 1:
        example = np.concatenate([example, example])  # export would fix a batch of one for ever
    with torch.no_grad():
        output = plain(torch.from_numpy(example))
    signature = infer_signature(example, _arrays(output))
    requirements = [f"{package}=={importlib.metadata.version(package)}" for package in PACKAGES]
    with tempfile.TemporaryDirectory() as scratch, _here(uri):
        try:
            # Once beside, for the answer to "can it be exported": a failed log_model leaves a broken model.
            mlflow.pytorch.save_model(
                plain, f"{scratch}/try", signature=signature, input_example=example, pip_requirements=requirements
            )
        except Exception as error:  # export fails with torch's, sympy's or Python's own errors
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            log.warning("logging weights only, the model cannot be exported: %s", reason)
            return _log_weights(uri, run_id, plain, Path(scratch) / name, reason)
        info = mlflow.pytorch.log_model(
            plain,
            name=name,
            signature=signature,
            input_example=example,
            pip_requirements=requirements,
            serialization_format="pt2",
            run_id=run_id,
        )
    return str(info.model_uri)


def register(uri: str, run_id: str, registered_name: str, alias: str) -> int:
    """Make the run's newest model a version of `registered_name` and give it `alias`; returns the version.

    TrackingError when the run has no model that MLflow can load.
    """
    from mlflow.exceptions import MlflowException

    client = runs.client(uri)
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    if not models:
        raise TrackingError(
            f"run {run_id} has no model to register",
            "it logged none, or its weights only (see its artifacts)",
            "register a run whose model could be exported",
        )
    newest = max((client.get_logged_model(m.model_id) for m in models), key=lambda m: m.creation_timestamp)
    try:
        client.create_registered_model(registered_name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        registered_name, newest.artifact_location, run_id=run_id, model_id=newest.model_id
    )
    client.set_registered_model_alias(registered_name, alias, version.version)
    return int(version.version)


def fetch_weights(uri: str, name: str, target: Path) -> None:
    """Write the weights of a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`, to the safetensors file
    `target`. Nothing stored is run: the graph is read as data. TrackingError when there is no such model, or no weights
    that can be read so.
    """
    import mlflow.artifacts
    import torch
    from mlflow.exceptions import MlflowException
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as scratch, _here(uri):
        try:
            found = Path(mlflow.artifacts.download_artifacts(artifact_uri=name, dst_path=scratch, tracking_uri=uri))
        except (MlflowException, OSError) as error:
            why = str(error).partition("\n")[0]
            do = "write models:/NAME/VERSION or models:/NAME@ALIAS"
            raise TrackingError(f"no registered model {name} at {uri}", why, do) from error
        graph = next(iter(sorted(found.rglob("*.pt2"))), None)
        if graph is None:
            raise TrackingError(f"{name} holds no torch.export graph", "models that are pickles are not loaded")
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
    """MLflow's model functions know no address but the global one: lend it ours."""
    import mlflow

    runs.client(uri)  # its environment
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
