"""An address is no identity: what clients send when something else listens where a home's server was."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.common import home as jobs_home
from raylab.errors import TrackingError
from tests.other_user import as_other_user
from tracking import compare, runs, server
from tracking.access import identity, secret
from tracking.forwarder import forward, sync, unsent
from tracking.outbox import Outbox

# Takes what comes, as an MLflow server would, and tells it at the end. With a port: passes everything on to there.
IMPOSTOR = """
seen, listener = [], socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)

def pump(source, sink, record):
    with source, sink:
        while data := source.recv(65536):
            record.append(data)
            sink.sendall(data)

def serve(connection):
    if len(sys.argv) > 1:
        far = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
        threading.Thread(target=pump, args=(far, connection, []), daemon=True).start()
        return pump(connection, far, seen)
    with connection:
        seen.append(connection.recv(65536))
        body = b'{"experiments": []}'
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nRaylab-Proof: 00\\r\\nContent-Type: application/json\\r\\n"
                           b"Connection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)

def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

threading.Thread(target=accept, daemon=True).start()
sys.stdin.readline()
print(json.dumps([data.decode(errors="replace") for data in seen]), flush=True)
"""


class Impostor:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        self.uri = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def received(self) -> list[str]:
        """All that it was sent; it ends."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return list(json.loads(self.process.stdout.readline()))


@contextlib.contextmanager
def impostor(who: str, *words: object) -> Iterator[Impostor]:
    """A listener that another user, or this one ("ours"), has opened."""
    if who != "ours":
        with as_other_user(IMPOSTOR, *words) as process:
            yield Impostor(process)
        return
    code = "import json, socket, sys, threading\n" + IMPOSTOR
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code, *map(str, words)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield Impostor(process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process learns of servers ends with the test."""
    monkeypatch.setattr(identity, "trusted", {})
    monkeypatch.setattr(runs, "_ways", {})
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_AUTH", secret.ENVIRONMENT):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def old_run(home: Path, uri: str, run_id: str, name: str) -> Outbox:
    """A run whose record names a port, as raylab 0.1 wrote it, with a score and a plot to send."""
    directory = home / "runs" / name
    outbox = Outbox(directory / "outbox")
    outbox.bind(uri, run_id)
    described = {"name": name, "run_id": run_id, "uri": uri, "experiment": "old", "kind": "train", "task": "ards"}
    (directory / "run.json").write_text(json.dumps(described | {"data": "prepared", "synthetic": True}))
    (directory / "plot.png").write_bytes(b"a plot")
    outbox.append({"kind": "metrics", "step": 1, "values": {"test/auroc": 0.7}})
    outbox.append({"kind": "artifact", "path": directory / "plot.png", "to": "plots"})
    return outbox


@pytest.mark.parametrize("who", ["ours", "another user"])
def test_older_runs_of_the_home_go_to_the_home(
    home: Path, direct: str, served: server.Server, who: str, fresh: None
) -> None:
    run_id = runs.start_run(direct, "old", "old")
    with impostor(who) as other:
        outbox = old_run(home, other.uri, run_id, f"old-{who.split()[0]}")
        assert jobs_home.note(outbox.directory.parent).uri == direct
        assert forward(outbox.directory) == 2
        assert other.received() == []
    assert runs.client(direct).get_run(run_id).data.metrics == {"test/auroc": 0.7}
    assert compare.artifacts(direct, run_id, "plots", ".png") == {"plots/plot.png": b"a plot"}


def test_an_older_run_of_no_home_is_kept_and_the_stranger_named(home: Path, direct: str, fresh: None) -> None:
    with impostor("another user") as other:
        outbox = old_run(home, other.uri, "f" * 32, "nobody-s")
        with pytest.raises(TrackingError, match="another user listens"):
            forward(outbox.directory)
        told = sync(outbox.directory.parent)
        assert "another user listens" in str(told["errors"]) and unsent(outbox.directory) == 2
        with pytest.raises(TrackingError, match="another user listens"):
            runs.check(other.uri)
        assert other.received() == []


@pytest.mark.parametrize("who", ["ours", "another user", "another user, who passes it on"])
def test_a_shell_of_a_cluster_refuses_who_does_not_prove_himself(
    home: Path, direct: str, served: server.Server, who: str, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `raylab cluster env`, when the relay has ended. Who passes all on has a good proof to show."""
    words = [served.uri.rpartition(":")[2]] if "passes" in who else []
    with impostor(who, *words) as other:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_AUTH", identity.AUTH)
        monkeypatch.setenv(secret.ENVIRONMENT, str(secret.path(home)))
        with pytest.raises(TrackingError, match="does not prove" if who == "ours" else "another user listens"):
            runs.address(home)
        # plain MLflow, in the same shell
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        with pytest.raises(MlflowException, match="nothing was sent"):
            MlflowClient(other.uri).create_experiment("a score of 0.7")
        received = "".join(other.received())
    if who == "ours":  # questions who it is, and no more
        assert "Raylab-Challenge" in received
        assert not any(word in received for word in ("0.7", "Authorization", secret.read(secret.path(home))))
    else:
        assert received == ""


def test_the_server_is_reached_through_a_tunnel_of_ours_and_runs_remember_the_home(
    home: Path, direct: str, served: server.Server, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssh -L` and the relay are forwarders of our own on another port."""
    with impostor("ours", served.uri.rpartition(":")[2]) as tunnel:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tunnel.uri)
        assert runs.address(home) == direct
        monkeypatch.setenv("MLFLOW_TRACKING_AUTH", identity.AUTH)
        monkeypatch.setenv(secret.ENVIRONMENT, str(secret.path(home)))
        from mlflow import MlflowClient

        assert MlflowClient(tunnel.uri).search_experiments()
        monkeypatch.setattr(server, "running", lambda home: None)  # as seen from another machine
        assert runs.reach(runs.address(home)) == tunnel.uri
        run_id = runs.start_run(direct, "tunnel", "through")
        assert run_id in compare.collect(direct, "tunnel")["run_id"]
        assert runs.connect(home) == tunnel.uri  # what a notebook calls
        assert secret.read(secret.path(home)) in "".join(tunnel.received())


def test_a_team_s_own_server_is_left_as_it_is(home: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word of ours in the environment, and with the accounts of that server, it may be anybody's."""
    with impostor("another user") as other:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "mine")
        assert runs.address(home) == other.uri
        runs.check(other.uri)
        received = other.received()
    assert len(received) == 1 and "Authorization: Basic" in received[0] and "Bearer" not in received[0]


def test_a_proxy_of_the_site_does_not_stand_between(
    home: Path, direct: str, served: server.Server, fresh: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # nothing answers there
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        environment = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "http_proxy")}
        environment |= {"http_proxy": address, "HTTP_PROXY": address, "RAYLAB_HOME": str(home)}
        runs.start_run(direct, "proxied", "r")
        words = [sys.executable, "-m", "jobs.cli", "compare", "--experiment", "proxied", "--out", str(home / "r.html")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()
