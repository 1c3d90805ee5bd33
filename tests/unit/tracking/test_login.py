"""Credentials: taken out of addresses, kept in the environment or a 0600 file, sent to their own server only."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jobs.common import home
from raylab.errors import TrackingError
from tracking import forwarder, runs
from tracking.access import login
from tracking.access.login import Login
from tracking.outbox import Outbox, Target, target

SECRET = "hunter2-Z9"


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's own logins; what a test puts into the environment goes with it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("MLFLOW_TRACKING_URI", login.FILE, *login.VARIABLES.values()):
        monkeypatch.setenv(name, "")


class _Server(http.server.BaseHTTPRequestHandler):
    """Answers like an MLflow without experiments, and keeps what it was shown."""

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b"{}" if self.server.status == 200 else b"You are not authenticated.")  # type: ignore[attr-defined]

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[http.server.HTTPServer]]:
    made = [http.server.HTTPServer(("127.0.0.1", 0), _Server) for _ in range(2)]
    for server in made:
        server.seen, server.status = [], 200  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def write_file(path: Path, logins: dict, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(logins))
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("text", "address", "found"),
    [
        ("http://me:pw@host:5000/", "http://host:5000", Login("me", "pw")),
        ("https://me%40x.org:p%2F%3A%40@host/mlflow", "https://host/mlflow", Login("me@x.org", "p/:@")),
        ("http://me@host", "http://host", Login("me")),
        ("http://me:p@w@host", "http://host", Login("me", "p@w")),
        ("postgresql://me:pw@db/mlflow", "postgresql://db/mlflow", Login("me", "pw")),
        ("http://host:5000", "http://host:5000", Login()),
        ("sqlite:////data/a@b.org/mlflow.db", "sqlite:////data/a@b.org/mlflow.db", Login()),
        ("me:pw@host:5000", "host:5000", Login()),
        ("", "", Login()),
    ],
)
def test_an_address_and_its_credentials(text: str, address: str, found: Login) -> None:
    assert login.split(text) == (address, found)


@pytest.mark.parametrize(
    "text",
    [
        f"http://me:a/{SECRET}@host",
        f"http://me:a?{SECRET}@host",
        f"http://me:a#{SECRET}@host",
        f"http://host/?token={SECRET}",
        f"http://host/mlflow#{SECRET}",
        f"postgresql://db/mlflow?password={SECRET}",
        f"sqlite:////data/mlflow.db?key={SECRET}",
    ],
)
def test_an_address_whose_secrets_are_uncertain_is_refused_without_a_word_of_it(text: str) -> None:
    for uses in (login.split, runs.check, runs.client):
        with pytest.raises(TrackingError) as caught:
            uses(text)
        assert SECRET not in str(caught.value) and "MLFLOW_TRACKING_PASSWORD" in caught.value.do


@given(name=st.text(min_size=1), password=st.text(min_size=1), host=st.sampled_from(["h", "h:1", "[::1]:5000"]))
def test_what_is_quoted_comes_back(name: str, password: str, host: str) -> None:
    from urllib.parse import quote

    address = f"https://{quote(name, safe='')}:{quote(password, safe='')}@{host}"
    assert login.split(address) == (f"https://{host}", Login(name, password))


def test_no_error_shows_the_credentials_of_an_address() -> None:
    text = str(TrackingError(f"no http://me:{SECRET}@host", f"proxy https://{SECRET}@p:1 is away", "ftp://a:b/c@x"))
    assert SECRET not in text and "http://***@host" in text and "ftp://a:b/c@x" in text
    assert SECRET not in repr(Login("me", SECRET, SECRET))


def test_credentials_of_the_address_move_to_the_environment_and_reach_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list
) -> None:
    port = servers[0].server_port
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{port}/")
    uri = runs.address(tmp_path)
    assert uri == f"http://127.0.0.1:{port}" and login.find(uri) == Login("me", SECRET)
    runs.check(uri)
    assert servers[0].seen == [Login("me", SECRET).header]
    outbox = Outbox(tmp_path / "outbox")
    outbox.bind(f"http://me:{SECRET}@127.0.0.1:{port}", "0" * 32)
    assert SECRET not in (tmp_path / "outbox" / "target.json").read_text()


def test_addresses_that_older_versions_stored_are_read_without_credentials(tmp_path: Path) -> None:
    old = {"uri": f"http://me:{SECRET}@host", "run_id": "0" * 32}
    described = {"name": "old", "experiment": "old", "kind": "train", "task": "ards", "data": "d", "synthetic": True}
    (tmp_path / "target.json").write_text(json.dumps(old))
    (tmp_path / "run.json").write_text(json.dumps(old | described))
    assert target(tmp_path) == Target(uri="http://host", run_id="0" * 32)
    assert home.note(tmp_path).uri == "http://host"
    home.annotate(tmp_path, status="RUNNING")
    assert SECRET not in (tmp_path / "run.json").read_text()


def test_a_login_goes_to_its_own_server_and_to_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, servers: list
) -> None:
    ours, other = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ours)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    for uri in (ours, other):
        runs.check(uri)
        runs.client(uri).search_experiments()
    header = Login("me", SECRET).header
    assert set(servers[0].seen) == {header} and set(servers[1].seen) == {None}
    servers[1].seen.clear()
    write_file(login.file(), {other: {"token": "t0"}})
    runs.check(other)
    runs.client(other).search_experiments()
    assert set(servers[1].seen) == {"Bearer t0"}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_login_file_that_others_may_read_is_refused(mode: int) -> None:
    path = write_file(login.file(), {"http://host": {"username": "me", "password": SECRET}}, mode)
    with pytest.raises(TrackingError, match="chmod 600") as caught:
        login.find("http://host")
    assert SECRET not in str(caught.value)
    path.chmod(0o600)
    assert login.find("http://host/api") == Login("me", SECRET) and login.find("http://host:81") is None


@pytest.mark.parametrize("text", [f"{SECRET}", "[]", f'{{"http://h": {{"pass": "{SECRET}"}}}}', f'{{"a": "{SECRET}"}}'])
def test_a_login_file_that_is_none_is_refused_without_its_content(text: str) -> None:
    path = login.file()
    path.parent.mkdir(parents=True)
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(TrackingError, match="not a login file") as caught:
        login.find("http://host")
    assert SECRET not in str(caught.value)


def test_sync_without_the_login_keeps_the_records_and_says_what_is_missing(tmp_path: Path, servers: list) -> None:
    servers[0].status = 401
    outbox = Outbox(tmp_path / "run" / "outbox")
    outbox.bind(f"http://127.0.0.1:{servers[0].server_port}", "0" * 32)
    outbox.append({"kind": "metrics", "step": 1, "values": {"train/loss": 0.5}})
    done = forwarder.sync(tmp_path)
    assert done["unsent"] == 1 and done["rejected"] == 0
    (error,) = done["errors"].values()
    assert "HTTP 401" in error and "MLFLOW_TRACKING_PASSWORD" in error and "raylab sync" in error
