"""The embedded MLflow server: one process group on loopback that serves HOME/mlflow to the owner of that home."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from raylab.documents import read_document
from raylab.errors import TrackingError
from raylab.files import locked, write_json
from raylab.loopback import listener_uids
from raylab.processes import StartedProcess, end_tree, find_own
from raylab.storage import check_writable
from tracking.access import identity, secret
from tracking.runs import database, database_uri

START_SECONDS = 180.0  # on a busy machine; about 5 s otherwise
STOP_SECONDS = 10.0
HOST = "127.0.0.1"
APP = "raylab"  # guard.py, in MLflow's group of applications (pyproject.toml)
# Replace defaults of MLflow that lose points (a pool of 5 connections), execute code of model files, send usage data,
# or keep idle helper processes.
ENVIRONMENT = {
    "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "64",
    "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "64",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


# MLflow's default, uvicorn, also serves an "assistant" that runs shell commands, outside the Flask application and so
# outside the check (guard.py). gunicorn serves the Flask application alone. Threads rather than processes: one process
# with one pool of connections is enough for one user.
GUNICORN = "--worker-class gthread --threads 16 --graceful-timeout 3 --no-control-socket"


class Facts(StartedProcess):
    """server.json"""

    uri: str
    host: str
    app: str = ""


@dataclass(frozen=True)
class Server:
    """A running server: `uri` reaches it, `pid` is its process group, `app` the application that MLflow serves.

    `is_new`: this call of `serve` has started it; else others may use it.
    """

    uri: str
    pid: int
    home: Path
    app: str = APP
    is_new: bool = field(default=False, compare=False)

    def is_listening(self) -> bool:
        """Whether it takes connections by now; True if the kernel does not say."""
        return listener_uids(urlsplit(self.uri).port or 80) != set()

    def stop(self) -> None:
        """End this process group and no other; does nothing if it has already ended."""
        if running(self.home) != self:
            return
        end_tree(psutil.Process(self.pid), lambda: os.killpg(self.pid, signal.SIGTERM), STOP_SECONDS)
        (self.home / "mlflow" / "server.json").unlink(missing_ok=True)


def serve(home: Path, port: int = 5000) -> Server:
    """Start a server on HOME/mlflow, or return the one that is already running.

    If `port` is taken, another free one is used. Raises TrackingError, with the end of HOME/mlflow/server.log, if the
    server does not answer in time.
    """
    if not entry_points(group="mlflow.app", name=APP):
        raise TrackingError(
            "MLflow does not find raylab's check of who may use the server",
            "this Python environment belongs to an older raylab",
            "run make setup, or rebuild the image",
        )
    home = Path(home).absolute()
    db = database(home)
    directory = db.parent
    check_writable(directory / "server.json")
    with locked(directory / "server.lock"):
        if ours := running(home):
            if ours.app == APP:
                return ours
            ours.stop()  # that of an older raylab, which admits everybody
        token = secret.create(home)
        port = _free(port)
        artifacts = (directory / "artifacts").as_uri()
        command = [sys.executable, "-m", "mlflow", "server"]
        command += ["--backend-store-uri", database_uri(db), "--workers", "1", "--host", HOST, "--port", str(port)]
        # The root is a file address, not mlflow-artifacts:/, so that server and sqlite:// clients can read each
        # other's artifacts. Both see the same file system.
        command += ["--artifacts-destination", artifacts, "--default-artifact-root", artifacts]
        command += ["--gunicorn-opts", GUNICORN, "--app-name", APP]
        # MLflow variables of the caller's shell are for clients; with them a server could serve other hosts or routes.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "_MLFLOW_", "GUNICORN_"))}
        environment = inherited | ENVIRONMENT | {
            # The option --allowed-hosts is for uvicorn only; its variable also works for gunicorn.
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(_names(token)),
            secret.ENVIRONMENT: str(secret.path(home)),
        }  # fmt: skip
        log = os.open(directory / "server.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            # A session of its own: stop() ends all of it, and a Ctrl-C for another process does not.
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=directory,
                umask=0o077,
            )
        finally:
            os.close(log)
        server = Server(f"http://{HOST}:{port}", process.pid, home, is_new=True)
        started = StartedProcess.of(process.pid).to_json()
        facts = Facts(uri=server.uri, host=socket.gethostname(), app=APP, **started)
        write_json(directory / "server.json", facts.to_json())
        identity.trust(server.uri, secret.path(home))
        try:
            _wait(server, process)
        except BaseException:
            server.stop()
            raise
        return server


def _wait(server: Server, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_serving(server):
        if process.poll() is not None or time.monotonic() > deadline:
            log = server.home / "mlflow" / "server.log"
            why = "it ended" if process.poll() is not None else f"no answer within {START_SECONDS:.0f} s"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise TrackingError(f"the MLflow server for {server.home} did not start: {why}", tail, f"read {log}")
        time.sleep(0.2)


def is_serving(server: Server) -> bool:
    """Whether this server answers and proves that it belongs to its home."""
    try:
        identity.prove(server.uri, secret.read(secret.path(server.home)))
    except TrackingError:
        return False
    return True


def running(home: Path) -> Server | None:
    """The server of this home, if its process is alive on this machine: the same pid, start time and user."""
    path = home / "mlflow" / "server.json"
    if not path.exists():
        return None
    known = read_document(path, Facts, f"end the MLflow server that serves {home}, if any, and remove the file")
    if known.host != socket.gethostname():
        return None
    if find_own(known) is None:
        return None
    identity.trust(known.uri, secret.path(home))
    return Server(known.uri, known.pid, home, known.app)


def _free(port: int) -> int:
    for wanted in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, wanted))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise TrackingError(f"no port can be opened on {HOST}", do="choose another port: raylab ui --port N")


def _names(token: str) -> list[str]:
    """The accepted Host headers: loopback at any port, because a tunnel may end at another one."""
    hosts = ("localhost", "127.0.0.1", secret.host_name(token))
    return [name for host in hosts for name in (host, f"{host}:*")]
