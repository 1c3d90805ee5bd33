"""Keeps MLflow's server from opening files outside the home's store, whatever its database or a request says.

MLflow accepts any address for an experiment's artifacts, including another user's directory with links in it, and reads
and writes there as the server's owner. Here, new addresses outside the store are refused, and the only class that opens
files refuses to leave the store, so an address that is already in the database opens nothing.
"""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.server import handlers
from mlflow.store.artifact.artifact_repository_registry import get_registered_artifact_repositories
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore
from mlflow.utils.file_utils import local_file_uri_to_path

# Schemes of addresses that resolve to files of the store.
INDIRECT = ("runs", "models", "mlflow-artifacts")


def confine(root: Path) -> None:
    """Keep the MLflow server of this process within the directory `root`."""
    store = root.resolve()

    def check(path: str | Path) -> None:
        if not Path(path).resolve().is_relative_to(store):
            raise MlflowException(f"refused: {path} is outside of the store {store}", PERMISSION_DENIED)

    def check_uri(uri: str | None) -> None:
        """Refuse a `uri` that the server would open outside of the store."""
        scheme = urlsplit(uri or "").scheme.lower()
        if scheme in INDIRECT or not uri:
            return
        if scheme not in ("", "file"):
            raise MlflowException(f"refused: {uri} is outside of the store {store}", PERMISSION_DENIED)
        check(local_file_uri_to_path(uri))

    class Files(LocalArtifactRepository):
        """MLflow checks paths against the artifact directory; this class checks the directory too."""

        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            check(self.artifact_dir)

        def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
            for path in Path(self.artifact_dir).rglob("*"):
                check(path)
            super().log_artifacts(local_dir, artifact_path)

        def delete_artifacts(self, artifact_path: str | None = None) -> None:
            check(Path(self.artifact_dir, artifact_path or ""))
            super().delete_artifacts(artifact_path)

        def download_trace_data(self) -> Any:
            for path in Path(self.artifact_dir).iterdir():
                check(path)
            return super().download_trace_data()

    class Tracking(TrackingStore):
        def create_experiment(self, name: str, artifact_location: str | None = None, *rest: Any, **more: Any) -> Any:
            check_uri(artifact_location)
            return super().create_experiment(name, artifact_location, *rest, **more)

    class Registry(RegistryStore):
        def create_model_version(self, name: str, source: str, *rest: Any, **more: Any) -> Any:
            if "/" in source or urlsplit(source).scheme:  # the source of a prompt is a word
                check_uri(source)
            return super().create_model_version(name, source, *rest, **more)

    repositories = get_registered_artifact_repositories()
    for scheme in set(repositories) - set(INDIRECT):
        del repositories[scheme]
    repositories.update({"": Files, "file": Files})
    handlers._tracking_store_registry.register(
        "sqlite", lambda store_uri, artifact_uri: Tracking(store_uri, artifact_uri)
    )
    handlers._model_registry_store_registry.register("sqlite", lambda store_uri: Registry(store_uri))
