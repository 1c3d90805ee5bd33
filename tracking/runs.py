"""The address of MLflow, and the runs there."""

import contextlib
import hashlib
import importlib.metadata
import os
import re
import sqlite3
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname
from uuid import uuid4

from raylab import loopback
from raylab.errors import TrackingError
from raylab.files import hash_files, locked
from raylab.storage import check_writable
from tracking import views
from tracking.access import identity, login, secret

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "raylab.idempotency_key"  # a tag: no two runs have the same one
PRIVACY = "raylab.privacy"  # a tag: what a run has spent of its privacy budget, in words
DATABASE_BYTES = 1 << 20  # of an empty database
CHECK_SECONDS = 5.0  # to connect, and again to read
# MLflow's own defaults block a caller of a dead server for minutes, report usage, and print into training logs.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


# database of a home -> the address that reaches its server from this machine if it runs on another one
_ways: dict[str, str] = {}


def address(home: Path) -> str:
    """MLFLOW_TRACKING_URI without credentials, if set, else a SQLite database under `home`, created when missing.

    A home's server, also behind the relay, is named by that home's database: runs record it, because ports change
    owners. Raises TrackingError if RAYLAB_MLFLOW_TOKEN_PATH says that MLFLOW_TRACKING_URI is such a server, but it is
    not.
    """
    uri = login.tracking_uri()
    if not uri:
        return database_uri(database(home))
    if not identity.is_local(uri):
        return uri
    file = identity.token_file(uri) or secret.path(home)
    if secret.ENVIRONMENT not in os.environ:  # it may be any server
        try:
            identity.prove(uri, secret.read(file))
        except TrackingError:
            return uri
    identity.prove(uri, secret.read(file))
    identity.trust(uri, file)
    embedded = database_uri(file.parent / "mlflow.db")
    _ways[embedded] = uri
    return embedded


def database_uri(path: Path) -> str:
    """The address of the SQLite database `path`, with what an address gives another meaning quoted."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def database_path(uri: str) -> Path:
    """The file of the SQLite database at the address `uri`."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


def database(home: Path) -> Path:
    """HOME/mlflow/mlflow.db with its tables, 0600 in a directory 0700."""
    directory = Path(home).absolute() / "mlflow"
    if not (directory / "mlflow.db").exists():
        check_writable(directory / "mlflow.db", DATABASE_BYTES)
    (directory / "artifacts").mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    path = directory / "mlflow.db"
    # Two concurrent first migrations leave a broken database: one process creates it aside and renames it.
    with locked(directory / "init.lock"):
        if not path.exists():
            _environment()
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            beside = directory / "new.db"
            beside.unlink(missing_ok=True)
            try:
                SqlAlchemyStore(database_uri(beside), (directory / "artifacts").as_uri()).engine.dispose()
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            beside.chmod(0o600)
            beside.rename(path)
    return path


def client(uri: str) -> "MlflowClient":
    """A client that notices a dead server within seconds, for the one writer of a process.

    Raises TrackingError if another user listens at a loopback address.
    """
    _environment()
    return _client(reach(login.split(uri)[0]))


def reach(uri: str) -> str:
    """The address at which to reach the store `uri` from this process.

    An embedded store with a running server is reached through that server, because SQLite allows one writer at a time.
    Raises TrackingError if another user of this machine listens at a loopback address.
    """
    if (home := _home(uri)) is not None:
        from tracking import server

        serving = server.running(home)
        return _ways.get(uri, uri) if serving is None or not serving.is_listening() else serving.uri
    if identity.is_local(uri) and identity.token_file(uri) is None and login.find(uri) is None:
        identity.refuse_stranger(uri)
    return uri


def resolve(uri: str, run_id: str | None, directory: Path) -> str:
    """The store of a run whose record in `directory` says `uri`.

    Older records name the port of a home's server. Such a run is in the database of the home that contains the record,
    whoever listens on that port now.
    """
    uri, _ = login.split(uri)  # older versions stored credentials
    if run_id is not None and identity.is_local(uri):
        for home in Path(directory).absolute().parents:
            path = home / "mlflow" / "mlflow.db"
            if path.is_file() and _has_run(path, run_id):
                return database_uri(path)
    return uri


def is_embedded(uri: str) -> bool:
    """Whether this is the store of a home rather than a team's server."""
    return _home(uri) is not None


def _has_run(path: Path, run_id: str) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is not None
    except sqlite3.Error as error:
        raise TrackingError(f"cannot read the tracking database {path}", str(error), "run raylab sync later") from error


def _home(uri: str) -> Path | None:
    """The home whose embedded store this is, else None."""
    if uri.startswith("sqlite:///") and uri.endswith("/mlflow/mlflow.db"):
        return database_path(uri).parents[1]
    return None


@lru_cache(maxsize=16)
def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def connect(home: str | Path) -> str:
    """Point MLflow's functions in this process, such as a notebook, at the store of `home`; returns the address."""
    import mlflow

    _environment()
    uri = reach(address(Path(home)))
    mlflow.set_tracking_uri(uri)
    return uri


def check(uri: str) -> None:
    """Raise TrackingError, within about 10 s, unless an MLflow that accepts this login answers at `uri`.

    Credentials in `uri` itself are not used; `login` finds them.
    """
    uri, _ = login.split(uri)
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        path = database_path(uri)
        if not uri.startswith("sqlite:////") or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise TrackingError(
                f"cannot write the tracking database {uri}",
                "the address must be sqlite:////absolute/path/mlflow.db, in a directory of your own",
                "unset MLFLOW_TRACKING_URI to use the one under the raylab home",
            )
        return
    if parts.scheme not in ("http", "https"):
        raise TrackingError(
            f"'{uri}' is not a tracking address that raylab can use",
            "it must begin with http://, https:// or sqlite:/// (MLflow refuses directories; put a team's "
            "PostgreSQL behind an MLflow server)",
            "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000, or unset it",
        )
    if not parts.hostname:
        raise TrackingError(f"'{uri}' names no host", "", "write it as http://HOST:PORT")
    _check_http(uri)


def _check_http(uri: str) -> None:
    import requests

    _environment()
    uri = reach(uri)
    ask = f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1"
    from tracking.access.plugin import Auth

    try:
        answer = requests.get(
            ask,
            timeout=CHECK_SECONDS,
            auth=Auth(),
        )
    except requests.Timeout as error:
        raise TrackingError(
            f"{uri} does not answer within {CHECK_SECONDS:.0f} s",
            "a firewall blocks it, or the server hangs",
            f"curl -m 5 {uri}",
        ) from error
    except (requests.RequestException, ValueError) as error:
        raise TrackingError(
            f"nothing answers at {uri}", _reason(error), "start that server, or unset MLFLOW_TRACKING_URI"
        ) from error
    if answer.status_code == 403 and "host" in answer.text.lower():
        raise TrackingError(
            f"the MLflow server at {uri} refuses the host name in this address",
            "it accepts only the names with which it was started",
            f"start it with --allowed-hosts {urlsplit(uri).netloc}",
        )
    if answer.status_code in (401, 403):
        raise TrackingError(
            f"{uri} refuses the login (HTTP {answer.status_code})",
            "it requires a login, or --allowed-hosts with the name in this address",
            login.advice(),
        )
    if answer.status_code >= 500:
        raise TrackingError(f"{uri} answers with HTTP {answer.status_code}", "the server failed", "read its log")
    try:
        known = (
            answer.ok and isinstance(answer.json(), dict) and answer.json().keys() <= {"experiments", "next_page_token"}
        )
    except ValueError:
        known = False
    if not known:
        raise TrackingError(
            f"{uri} answers, but it is not an MLflow server (HTTP {answer.status_code})",
            "another program uses this port",
            "correct MLFLOW_TRACKING_URI",
        )


def start_run(
    uri: str,
    experiment: str,
    name: str,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    time: int | None = None,
) -> str:
    """Create a run in state RUNNING, and its experiment if it is missing; returns the run id.

    With the tag KEY it is created once: if a run has this key already, from a call that was interrupted, its id is
    returned. `time`: when the run began, in ms since 1970; now by default.
    """
    from mlflow.entities import ViewType
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    every = dict(tags or {})
    if parent_run_id:
        every[MLFLOW_PARENT_RUN_ID] = parent_run_id
    with login.explained(uri):
        id = _experiment(uri, experiment)
        if key := every.get(KEY):
            created = client(uri).search_runs([id], f"tags.`{KEY}` = '{key}'", ViewType.ALL, max_results=1)
            if created:
                return str(created[0].info.run_id)
        run = client(uri).create_run(id, start_time=time, tags=every, run_name=name)
    return str(run.info.run_id)


def resume_run(uri: str, run_id: str) -> None:
    """Set the state of a run to RUNNING again."""
    client(uri).update_run(run_id, "RUNNING")


def delete_run(uri: str, run_id: str) -> None:
    """Mark a run as deleted, as MLflow's page does; nothing happens if it is, or is not there."""
    from mlflow.exceptions import MlflowException

    with login.explained(uri):
        try:
            run = client(uri).get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return
        if run.info.lifecycle_stage == "active":
            client(uri).delete_run(run_id)


def find_run(uri: str, name_or_id: str) -> str:
    """The id of the run with this id, or of the newest with this name. Raises TrackingError if there is none."""
    if re.fullmatch(r"[0-9a-f]{32}", name_or_id):
        from mlflow.exceptions import MlflowException

        try:
            return str(client(uri).get_run(name_or_id).info.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    quoted = name_or_id.replace("'", "")
    found = client(uri).search_runs(
        [e.experiment_id for e in client(uri).search_experiments()],
        f"attributes.run_name = '{quoted}'",
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    if not found:
        raise TrackingError(f"no run is named '{name_or_id}' at {uri}", "", "raylab compare lists the runs")
    return str(found[0].info.run_id)


def standard_tags(
    *,
    code: Path,
    task: str,
    seed: int,
    synthetic: bool,
    data_hash: str,
    split_hash: str,
) -> dict[str, str]:
    """The tags that make a run reproducible from MLflow alone, all named raylab.*.

    `code` is a directory of the code; its git repository gives the revision, unless
    RAYLAB_CODE_REVISION does (a container has no .git).
    """
    tags = {
        "task": task,
        "seed": str(seed),
        "synthetic": str(synthetic).lower(),
        "data_hash": data_hash,
        "split_hash": split_hash,
        "code_revision": code_revision(code),
        "lock_hash": _lock_hash(code),
        "ray_version": _version("ray"),
        "torch_version": _version("torch"),
    }
    places = {
        "slurm_job_id": "SLURM_JOB_ID",
        "slurm_nodelist": "SLURM_JOB_NODELIST",
        "image_digest": "RAYLAB_IMAGE_DIGEST",
    }
    for name, variable in places.items():
        if variable in os.environ:
            tags[name] = os.environ[variable]
    return {f"raylab.{name}": value for name, value in tags.items()}


def code_revision(code: Path) -> str:
    """The git commit, with "-dirty" if tracked files differ from it; without git a hash of the Python files."""
    if revision := os.environ.get("RAYLAB_CODE_REVISION"):
        return revision

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(code), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git on this node, or a file system that is too slow
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:  # for example a submitted job's copy of the code
        found = sorted(code.rglob("*.py"))
        visible = [path for path in found if not any(p.startswith(".") for p in path.relative_to(code).parts)]
        return f"files-{hash_files(visible, code)[:16]}"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit if changed == "" else f"{commit}-dirty"


def _lock_hash(code: Path) -> str:
    """SHA-256 of the lock file; if the code has none, `installed-...`, a hash of the installed packages."""
    for directory in (code.absolute(), *code.absolute().parents):
        if (lock := directory / "requirements.lock").is_file():
            return hashlib.sha256(lock.read_bytes()).hexdigest()
    installed = sorted(f"{one.name}=={one.version}" for one in importlib.metadata.distributions())
    return f"installed-{hashlib.sha256(chr(10).join(installed).encode()).hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _experiment(uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client(uri).get_experiment_by_name(name)
    if found is None:
        try:
            return str(
                client(uri).create_experiment(
                    name,
                    artifact_location=_artifact_location(uri, name),
                    tags=views.new_tags(),
                )
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client(uri).get_experiment_by_name(name)  # another driver was faster
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment '{name}' was deleted at {uri}",
            "MLflow does not release the name",
            "restore it in the MLflow UI, or use another name",
        )
    refuse_outside(uri, found.artifact_location)
    return str(found.experiment_id)


def refuse_outside(uri: str, location: str) -> None:
    """Raise TrackingError if artifacts of the embedded store `uri` would be written outside of it."""
    home = _home(uri)
    if home is None:
        return
    root, place = home / "mlflow" / "artifacts", urlsplit(location)
    path = Path(url2pathname(place.path))
    if place.scheme not in ("", "file") or not path.resolve().is_relative_to(root.resolve()):
        raise TrackingError(
            f"refused to write artifacts to {location}",
            f"it is outside of this home's store, {root}",
            "set another name in MLFLOW_EXPERIMENT_NAME; the MLflow pages can delete the experiment",
        )


def _artifact_location(uri: str, name: str) -> str | None:
    """A file address next to a SQLite database, which a direct client and a server can both read; None for a server.

    (mlflow-artifacts:/ works through a server only; MLflow's default for SQLite is ./mlruns in the working directory of
    the process.) A server decides for itself.
    """
    if not uri.startswith("sqlite:///"):
        return None
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "experiment"
    return (database_path(uri).parent / "artifacts" / f"{slug}-{uuid4().hex[:8]}").as_uri()


def _environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(
        "MLFLOW_TRACKING_AUTH", identity.AUTH
    )  # the plugin that checks the server before each request
    os.environ.update(loopback.no_proxy(dict(os.environ)))


def _reason(error: Exception) -> str:
    text = str(error)
    for known in ("Connection refused", "Name or service not known", "No route to host", "CERTIFICATE_VERIFY_FAILED"):
        if known in text:
            return known
    return text.splitlines()[0][:200] if text else type(error).__name__
