"""A team's MLflow server, started as docs/security.md says, but over SQLite."""

import configparser
import contextlib
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.server import get_app_client

from tests.wait import wait_for

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text()


@dataclass
class Team:
    """The server's address, and the passwords of its accounts by name."""

    uri: str
    directory: Path
    passwords: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def acting(self, name: str | None, password: str | None = None) -> Iterator[None]:
        """Within it this process is `name`, or nobody."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", self.uri)
            patch.setenv("MLFLOW_TRACKING_TOKEN", "")
            patch.setenv("MLFLOW_TRACKING_USERNAME", name or "")
            patch.setenv("MLFLOW_TRACKING_PASSWORD", (password or self.passwords[name]) if name else "")
            yield

    def add(self, name: str, password: str | None = None) -> str:
        """A new account; its password."""
        self.passwords[name] = password or secrets.token_hex(12)
        with self.acting("admin"):
            self.client().create_user(name, self.passwords[name])
        return self.passwords[name]

    def client(self) -> Any:
        return get_app_client("basic-auth", self.uri)


def block(kind: str) -> str:
    """The page's one code block of this kind that has to do with the server."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[Team]:
    """The server while open, its files in `directory`."""
    config = configparser.ConfigParser()
    config.read_string(block("ini"))
    assert config["mlflow"]["database_uri"].startswith("postgresql://")
    config["mlflow"]["database_uri"] = f"sqlite:///{directory}/accounts.db"
    with (directory / "accounts.ini").open("w") as file:
        config.write(file)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = block("sh").replace("\\\n", " ")
    words = shlex.split(script.partition("\nmlflow ")[2])
    put = {"--backend-store-uri": f"sqlite:///{directory}/mlflow.db", "--port": port, "--workers": "1"}
    for option, value in put.items():
        words[words.index(option) + 1] = value
    words[words.index("--artifacts-destination") + 1] = (directory / "artifacts").as_uri()
    made = Team(f"http://127.0.0.1:{port}", directory, {"admin": secrets.token_hex(12)})
    environment = os.environ | dict(re.findall(r"(MLFLOW_\w+)=(true|false)", script)) | {
        "MLFLOW_AUTH_CONFIG_PATH": str(directory / "accounts.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_AUTH_ADMIN_PASSWORD": made.passwords["admin"],
    }  # fmt: skip
    with (directory / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=environment, cwd=directory, stdout=log, stderr=log, start_new_session=True, umask=0o077,
        )  # fmt: skip

    def answers() -> bool:
        assert server.poll() is None, (directory / "server.log").read_text()[-3000:]
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{made.uri}/health", timeout=5).ok
        return False

    try:
        wait_for(answers, 200, "the team's server")
        yield made
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended itself
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
