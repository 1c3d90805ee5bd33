"""Addresses and tags, without a server."""

import hashlib
import http.server
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylab.errors import TrackingError
from raylab.files import write_json
from raylab.processes import StartedProcess
from tracking import runs, server
from tracking.access import login, secret


class _Other(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other() -> Iterator[http.server.HTTPServer]:
    """A web server that is no MLflow; `answer` is its (status, body)."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Other)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("127.0.0.1:5000", "not a tracking address"),
        ("./mlruns", "not a tracking address"),
        ("file:///tmp/mlruns", "not a tracking address"),
        ("postgresql://db/mlflow", "not a tracking address"),
        ("http://", "names no host"),
        ("http://127.0.0.1:1", "nothing answers"),
        ("http://127.0.0.1:notaport", "nothing answers"),
        ("sqlite:///relative.db", "cannot write"),
        ("sqlite:////nowhere/at/all/mlflow.db", "cannot write"),
    ],
)
def test_wrong_addresses_are_named_at_once(uri: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match=says):
        runs.check(uri)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, b"<html>hello</html>"), "not an MLflow"),
        ((200, b'{"ok": true}'), "not an MLflow"),
        ((404, b"{}"), "not an MLflow"),
        ((403, b"Invalid Host header - possible DNS rebinding attack detected"), "--allowed-hosts"),
        ((401, b"login"), "MLFLOW_TRACKING_USERNAME"),
        ((503, b"busy"), "HTTP 503"),
    ],
)
def test_what_answers_but_is_no_mlflow(other: http.server.HTTPServer, answer: tuple[int, bytes], says: str) -> None:
    other.answer = answer  # type: ignore[attr-defined]
    with pytest.raises(TrackingError) as caught:
        runs.check(f"http://127.0.0.1:{other.server_port}")
    assert says in str(caught.value)


def test_the_environment_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000/")
    assert runs.address(tmp_path) == "http://tracking:5000"
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_listen_yet_is_not_asked(tmp_path: Path) -> None:
    """A command that comes while a home's server starts uses the database, as without a server."""
    database = runs.database(tmp_path)
    secret.create(tmp_path)
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{port.getsockname()[1]}"
        host = socket.gethostname()
        facts = server.Facts(uri=uri, host=host, app=server.APP, **StartedProcess.of(os.getpid()).to_json())
        write_json(database.parent / "server.json", facts.to_json())
        assert runs.reach(runs.database_uri(database)) == runs.database_uri(database)
        port.listen()
        assert runs.reach(runs.database_uri(database)) == uri


def test_the_revision_of_code_without_git_hashes_its_visible_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYLAB_CODE_REVISION", raising=False)
    for name in ("b.py", "a/c.py", ".venv/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    expected = hashlib.sha256(b"a/c.py# a/c.pyb.py# b.py").hexdigest()
    assert runs.code_revision(tmp_path) == f"files-{expected[:16]}", "stored in tags: it must stay what it was"


def test_tags_make_a_run_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYLAB_CODE_REVISION", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("RAYLAB_IMAGE_DIGEST", "sha256:ab")
    given = {"task": "ards", "seed": 3, "synthetic": True, "data_hash": "d", "split_hash": "s"}
    tags = runs.standard_tags(code=tmp_path, **given)
    assert tags["raylab.synthetic"] == "true" and tags["raylab.seed"] == "3" and tags["raylab.slurm_job_id"] == "17"
    assert tags["raylab.image_digest"] == "sha256:ab"
    assert tags["raylab.code_revision"].startswith("files-") and tags["raylab.lock_hash"].startswith("installed-")
    assert tags["raylab.torch_version"].startswith("2.")

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "requirements.lock").write_text("torch==1\n")
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD").strip()
    inside = tmp_path / "package"
    inside.mkdir()
    tags = runs.standard_tags(code=inside, **given)
    assert tags["raylab.code_revision"] == head and len(tags["raylab.lock_hash"]) == 64
    (tmp_path / "requirements.lock").write_text("torch==2\n")
    assert runs.code_revision(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("RAYLAB_CODE_REVISION", "image-1")
    assert runs.code_revision(tmp_path) == "image-1"


@pytest.mark.parametrize("name", ["plain", "a b", "100%", "%41", "why?", "why%3Fnot", "no#1", "ü", "a@b", "a:b@c"])
def test_a_home_may_have_any_name(name: str, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    path = tmp_path / name / "mlflow" / "mlflow.db"
    uri = runs.database_uri(path)
    assert make_url(uri).database == str(path) and runs.database_path(uri) == path
    assert runs._home(uri) == tmp_path / name and login.split(uri) == (uri, login.Login())


def test_importing_tracking_needs_neither_mlflow_nor_torch() -> None:
    modules = ("outbox", "forwarder", "runs", "server", "system", "models")
    code = f"import sys, {', '.join(f'tracking.{name}' for name in modules)}"
    check = f"{code}; assert not {{'mlflow', 'torch', 'ray'}} & set(sys.modules)"
    subprocess.run([os.sys.executable, "-c", check], check=True, env=os.environ | {"PYTHONPATH": "."})
