"""Which commands may use a Ray that is kept running; a real one is in tests/ray/test_warm.py."""

import os
import re
from pathlib import Path

import pytest

from jobs.common import session, warm_ray
from jobs.common.warm_ray import WarmRay, find_running, find_usable, identify, record_file
from raylab.errors import UsageError
from raylab.files import write_json
from raylab.processes import StartedProcess


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WarmRay:
    """The record of a Ray whose keeper is this process and at whose port nobody else listens."""
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(warm_ray, "is_own_listener", lambda port: port == 4000)
    of_pytest = "|PYTEST_CURRENT_TEST"  # it changes between the fixture and the test
    monkeypatch.setattr(warm_ray, "OF_SHELLS", re.compile(warm_ray.OF_SHELLS.pattern + of_pytest))
    warm = WarmRay(
        address="127.0.0.1:4000",
        token="secret",
        cpus=2,
        directory="/tmp/rlab-x",
        identity=identify(),
        **StartedProcess.of(os.getpid()).to_json(),
    )
    write_json(record_file(), warm.to_json())
    return warm


def rewrite(warm: WarmRay, **changes: object) -> None:
    write_json(record_file(), {**warm.to_json(), **changes})


def test_a_command_with_the_same_code_and_environment_uses_it(record: WarmRay) -> None:
    assert find_usable() == record


def test_shells_may_differ_in_what_workers_do_not_see(record: WarmRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLDPWD", "/elsewhere")
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 2")
    monkeypatch.setenv("MAKELEVEL", "2")
    monkeypatch.setenv("_RJEM_MALLOC_CONF", "of a process that has imported polars")
    for name, text in {**session.ENVIRONMENT, **session.LOCAL}.items():
        monkeypatch.setenv(name, text)
    assert find_usable() == record


def test_another_environment_is_named(
    record: WarmRay, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert find_usable() is None
    assert "is not used: OMP_NUM_THREADS changed since its start" in caplog.text


def test_edited_code_never_runs_in_it(
    record: WarmRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "code" / "raylab").mkdir(parents=True)
    (tmp_path / "code" / "raylab" / "loop.py").write_text("edited = True\n")
    monkeypatch.setattr(warm_ray, "ROOT", tmp_path / "code")
    assert find_usable() is None
    assert "code" in caplog.text and "changed" in caplog.text


def test_a_changed_lock_file_is_another_set_of_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (warm_ray.ROOT / "requirements.lock").is_file()
    monkeypatch.setattr(warm_ray, "ROOT", tmp_path)
    before = identify()
    (tmp_path / "requirements.lock").write_text("torch==2.16.0\n")
    assert warm_ray.differences(before, identify()) == ["packages"]


def test_one_whose_process_is_gone_is_not_used(record: WarmRay) -> None:
    rewrite(record, start="another boot/1")
    assert find_running() is None and find_usable() is None


def test_a_port_on_which_somebody_else_listens_gets_no_token(record: WarmRay) -> None:
    rewrite(record, address="127.0.0.1:4001")
    assert find_running() is not None and find_usable() is None


def test_a_record_that_others_could_have_written_is_refused(record: WarmRay) -> None:
    record_file().chmod(0o660)
    with pytest.raises(UsageError, match=r"(?s)may be another user's.*0660.*rm "):
        find_usable()


def test_secrets_of_the_environment_are_not_copied(record: WarmRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "open sesame")
    assert "open sesame" not in str(identify()) and identify()["PASSWORD"] != record.identity.get("PASSWORD")


def test_its_token_is_taken_only_where_none_is_set(record: WarmRay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*session.ENVIRONMENT, *session.LOCAL):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    assert session.ray_environment() == record and os.environ["RAY_AUTH_TOKEN"] == "secret"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "one's own")
    assert session.ray_environment() is None and os.environ["RAY_AUTH_TOKEN"] == "one's own"
