"""The token file of a home."""

import os
import stat
import threading
from pathlib import Path

import pytest

from raylab.errors import TrackingError
from tests.other_user import NOBODY
from tracking.access import secret


def test_all_who_make_a_token_at_once_get_the_same_private_one(tmp_path: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(secret.create(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = secret.path(tmp_path)
    assert set(made) == {file.read_text()} and len(made) == 8 and len(made[0]) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [one.name for one in file.parent.iterdir()] == ["token"]


def test_a_token_that_others_may_know_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="cannot be read"):
        secret.read(secret.path(tmp_path))
    secret.create(tmp_path)
    file = secret.path(tmp_path)
    file.chmod(0o640)
    with pytest.raises(TrackingError, match="not private"):
        secret.read(file)
    file.chmod(0o600)
    if os.getuid() == 0:
        os.chown(file, NOBODY, NOBODY)
        with pytest.raises(TrackingError, match=f"user {NOBODY}"):
            secret.read(file)
        os.chown(file, 0, 0)
    file.write_text("")
    with pytest.raises(TrackingError, match="does not contain a token"):
        secret.read(file)


def test_each_home_has_its_own_host_name() -> None:
    names = {secret.host_name(token * 64) for token in "abc"}
    assert len(names) == 3 and all(name.startswith("h-") and name.endswith(".localhost") for name in names)
    assert secret.link("a" * 64, 5000).startswith(f"http://{secret.host_name('a' * 64)}:5000/?ticket=")
