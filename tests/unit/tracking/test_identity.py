"""Who answers at an address, against small listeners."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylab.errors import TrackingError, UsageError
from tracking import runs
from tracking.access import identity, secret


class _Answering(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.server.heard.append(dict(self.headers))  # type: ignore[attr-defined]
        self.send_response(401)
        challenge = self.headers[identity.CHALLENGE]
        if self.server.token:  # type: ignore[attr-defined]
            self.send_header(identity.PROOF, secret.proof(self.server.token, challenge))  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answering)
    server.heard, server.token = [], ""  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_a_holder_of_the_token_proves_it_and_never_hears_it(other: http.server.HTTPServer, tmp_path: Path) -> None:
    token, uri = secret.create(tmp_path), f"http://localhost:{other.server_port}"
    for theirs in ("", "b" * 64):
        other.token = theirs  # type: ignore[attr-defined]
        with pytest.raises(TrackingError, match="does not prove"):
            identity.prove(uri, token)
    other.token = token  # type: ignore[attr-defined]
    identity.prove(uri, token)
    heard = other.heard  # type: ignore[attr-defined]
    assert len({one[identity.CHALLENGE] for one in heard}) == 3 and token not in str(heard)


def test_nothing_that_answers_is_said(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="nothing answers"):
        identity.prove("http://127.0.0.1:1", secret.create(tmp_path))


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("http://127.0.0.1:5000", True), ("http://localhost", True), ("http://h-ab.localhost:1", True),
        ("http://[::1]:5000", True), ("https://127.0.0.1:5000", False), ("http://mlflow:5000", False),
        ("http://127.0.0.1:port", False), ("sqlite:////a/mlflow/mlflow.db", False), ("", False),
    ],
)  # fmt: skip
def test_local_addresses(uri: str, local: bool) -> None:
    assert identity.is_local(uri) == local


def test_a_cluster_is_not_told_a_port_of_this_machine(
    other: http.server.HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.cluster import tracking_for_nodes

    monkeypatch.setattr(identity, "trusted", {})
    monkeypatch.setattr(runs, "_ways", {})
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "")
    (tmp_path / "mlflow").mkdir(mode=0o700)
    (tmp_path / "mlflow" / "mlflow.db").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_for_nodes(tmp_path) == ""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert tracking_for_nodes(tmp_path) == "https://mlflow.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{other.server_port}")
    with pytest.raises(UsageError, match="a port of this machine"):
        tracking_for_nodes(tmp_path)
    other.token = secret.create(tmp_path)  # type: ignore[attr-defined]
    assert tracking_for_nodes(tmp_path) == "" and os.environ["MLFLOW_TRACKING_AUTH"] == identity.AUTH


def test_artifacts_of_a_home_stay_in_its_store(tmp_path: Path) -> None:
    uri, store = f"sqlite:///{tmp_path}/mlflow/mlflow.db", tmp_path / "mlflow" / "artifacts"
    store.mkdir(parents=True)
    (store / "link").symlink_to(tmp_path)
    runs.refuse_outside(uri, (store / "a b" / "1").as_uri())
    runs.refuse_outside("http://team:5000", "s3://bucket")
    for location in (
        tmp_path.as_uri(),
        str(tmp_path),
        f"{store.as_uri()}/../..",
        f"{store}/link",
        "s3://b",
        "mlruns/0",
    ):
        with pytest.raises(TrackingError, match="outside of this home's store"):
            runs.refuse_outside(uri, location)
