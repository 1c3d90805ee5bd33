"""MLflow in JupyterLab, through jupyter-server-proxy: for whoever Jupyter lets in, without a token in the browser."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from PIL import Image

from scripts.browser import browser, find
from tests.wait import wait_for
from tracking import runs, views
from tracking.access import secret

pytestmark = pytest.mark.timeout(300)
SCORE = "0.812 [0.760, 0.861] auroc"


@dataclass
class Jupyter:
    """A running Jupyter server, and what its user's MLflow is reached by."""

    port: int
    token: str
    home: Path
    run: str
    """the id of a run with scores and a picture"""

    def get(self, path: str, login: bool = True, data: bytes | None = None, **headers: str) -> tuple[int, str, str]:
        """Status, headers and body of an answer; of a redirect, too."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, headers)
        if login:
            request.add_header("Authorization", f"token {self.token}")
        try:
            with urllib.request.build_opener(KeepRedirects).open(request, timeout=150) as answer:
                return answer.status, str(answer.headers), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, str(error.headers), error.read().decode()


class KeepRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *answer: object) -> None:
        return None


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    place = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Jupyter(port, secrets.token_hex(16), place / "home", write_run(place / "home"))
    environment = {
        **os.environ,
        "RAYLAB_HOME": str(made.home),
        "JUPYTER_TOKEN": made.token,
        **{f"JUPYTER_{name}_DIR": str(place / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")},
        "IPYTHONDIR": str(place / "ipython"),
    }
    options = {"port": port, "allow_root": True, "allow_remote_access": True}
    command = [sys.executable, "-m", "jupyter_server", *(f"--ServerApp.{name}={set}" for name, set in options.items())]
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, cwd=place, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: is_listening(port), 60, f"Jupyter, see {place}/log")
        yield made
    finally:
        own = [server.pid, *(child.pid for child in psutil.Process(server.pid).children(recursive=True))]
        server.terminate()
        server.wait(30)
        processes = [psutil.Process(pid) for pid in own if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(processes, timeout=20)
        for process in alive:
            process.send_signal(signal.SIGKILL)
        assert not alive, "MLflow and the proxy end with Jupyter"


def write_run(home: Path) -> str:
    """Write a run with a score and a picture into the store of a home; returns its id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = runs.address(home)
    client = runs.client(uri)
    tags = {"raylab.task": "ards", "raylab.kind": "train", views.DATA: "synthetic", views.WORKERS: "0"}
    scores = {views.VAL_SCORE: SCORE, views.TEST_SCORE: SCORE}
    run: str = runs.start_run(uri, "raylab", "first", tags=tags | scores)
    client.log_param(run, "model.name", "gru")
    picture = home / "roc.png"
    Image.new("RGB", (321, 200)).save(picture)
    client.log_artifact(run, str(picture), "plots")
    return run


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_mlflow_is_reached_without_its_token_in_the_browser(jupyter: Jupyter) -> None:
    first, _, page = jupyter.get("raylab-mlflow/")  # Jupyter gives up a process that answers nothing for long
    assert first == 200 or (first == 503 and "Starting ..." in page), page
    wait_for(lambda: jupyter.get("raylab-mlflow/")[0] == 200, 150, "MLflow")
    status, headers, page = jupyter.get("raylab-mlflow/")
    assert status == 200 and "<title>MLflow</title>" in page, page
    token = secret.read(secret.path(jupyter.home))
    assert token not in headers + page and "Set-Cookie: raylab" not in headers
    asked = json.dumps({"max_results": 5}).encode()
    path, kind = "raylab-mlflow/ajax-api/2.0/mlflow/experiments/search", {"Content-Type": "application/json"}
    status, _, found = jupyter.get(path, data=asked, **kind)
    assert status == 200 and json.loads(found)["experiments"][0]["name"] == "raylab"
    status, _, _ = jupyter.get("raylab-mlflow/", Host="jupyter.example.org")
    assert status == 200, "MLflow allows its own names alone"


def test_nobody_else_is_let_in(jupyter: Jupyter) -> None:
    status, _, page = jupyter.get("raylab-mlflow/", login=False)
    assert status in (302, 403) and "MLflow" not in page
    status, _, page = jupyter.get("raylab-mlflow/", **{"Sec-Fetch-Site": "cross-site"})
    assert (status, page) == (403, "403: this request comes from another page.\n")


def test_the_launcher_opens_the_runs_in_a_browser(jupyter: Jupyter) -> None:
    """The stored view, links and pictures below Jupyter's path; and the way in from another page, as after a login
    elsewhere."""
    if find() is None:
        pytest.skip("no Chromium or Chrome is installed")
    base = f"http://127.0.0.1:{jupyter.port}/raylab-mlflow"
    with browser() as tab:
        tab.open(f"{base}/runs?token={jupyter.token}", 1900, 900)
        shows = f"document.body?.innerText.includes('{SCORE}')"
        tab.wait_for(shows, 150)
        assert "viewStateShareKey=raylab" in tab.run("location.hash")
        shown = tab.text()
        assert all(name in shown for _, name in views.COLUMNS) and "Error loading" not in shown

        foreign = f"http://localhost:{jupyter.port}/raylab-mlflow"  # to the browser another site
        for path, proof in (("ajax-api/2.0/mlflow/experiments/search", "403: this request"), ("runs", SCORE)):
            tab.open(f"{foreign}/static-files/manifest.json?token={jupyter.token}")
            tab.wait_for("location.hostname == 'localhost' && document.readyState == 'complete'")
            tab.run(f"location.assign('{base}/{path}')")
            tab.wait_for(f"location.hostname == '127.0.0.1' && document.body?.innerText.includes('{proof}')", 60)

        tab.open(f"{base}/#/experiments/1/runs/{jupyter.run}/artifacts/plots/roc.png", 1500, 900)
        tab.wait_for("[...document.querySelectorAll('img')].some(one => one.naturalWidth == 321)")


def test_without_a_cluster_the_dashboard_says_how_to_get_one(jupyter: Jupyter) -> None:
    status, _, page = jupyter.get("raylab-dashboard/")
    assert status == 502 and "no cluster in" in page and "raylab cluster up" in page
