"""One real MLflow server for all tests here, on loopback over SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tracking import runs, server
from tracking.access import secret


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def direct(home: Path) -> str:
    """The address of the embedded store: the database itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return runs.address(home)


@pytest.fixture(scope="session")
def served(home: Path, direct: str) -> Iterator[server.Server]:
    running = server.serve(home, port=0)
    yield running
    running.stop()


def bearer(home: Path) -> dict[str, str]:
    """The header that opens this home's server."""
    return {"Authorization": f"Bearer {secret.read(secret.path(home))}"}
