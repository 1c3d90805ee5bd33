"""A private directory for Ray's files: where it is made, who reaches it, when it goes."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from raylab.errors import UsageError
from raylab.scratch import PREFIX, RAY_BYTES, SOCKET_BYTES, Scratch, default_parents
from tests.others import as_other_user


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory like /tmp, which any user may write to, short enough for sockets."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def test_it_is_private_and_goes_at_its_end(shared):
    with Scratch([shared]) as scratch:
        facts = scratch.path.stat()
        assert stat.S_IMODE(facts.st_mode) == 0o700
        assert facts.st_uid == os.geteuid()
        assert scratch.ray.parent == scratch.path
        scratch.ray.mkdir(mode=0o777)
        scratch.ray.chmod(0o777)  # as Ray does
        (scratch.ray / "secret").write_text("patients")
        assert as_other_user(f"cat {scratch.ray}/secret; echo x > {scratch.ray}/secret; ls {scratch.ray}").denied == 3
    assert list(shared.iterdir()) == []


def test_the_longest_socket_of_ray_fits(shared):
    with Scratch([shared]) as scratch:
        added = str(scratch.ray).removeprefix(str(shared))
    session = "/session_2026-11-26_01-02-58_379550_4194304"  # the largest process id of Linux
    assert len(added + session + "/sockets/plasma_store") <= RAY_BYTES


def test_a_long_tmpdir_is_passed_over(shared, monkeypatch):
    long = shared / ("scratch_of_a_job_" * 5)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    assert default_parents()[0] == str(long)
    with Scratch(default_parents()) as scratch:
        assert len(str(scratch.path.parent)) <= SOCKET_BYTES - RAY_BYTES
    with pytest.raises(UsageError) as refused:
        Scratch([long])
    assert str(long) in str(refused.value) and "27 bytes" in str(refused.value)
    assert "export TMPDIR=" in refused.value.do


def test_places_that_cannot_hold_it_are_named_with_the_reason(shared):
    (shared / "file").touch()
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)  # without the sticky bit anybody may rename what others have made there
    with pytest.raises(UsageError) as refused:
        Scratch([shared / "absent", shared / "file", shared / "open"])
    for name in ("absent: No such file", "file: Not a directory", "open: others can rename"):
        assert name in str(refused.value)
    with Scratch([shared / "open", shared]) as scratch:
        assert scratch.path.parent == shared


OWNER = """
import sys, time
from raylab.scratch import Scratch
scratch = Scratch(sys.argv[1:])
print(scratch.path, flush=True)
time.sleep(600)
"""


def test_what_a_killed_owner_leaves_is_removed_by_the_next(shared):
    owners = [
        subprocess.Popen([sys.executable, "-c", OWNER, str(shared)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    dead, alive = (Path(owner.stdout.readline().strip()) for owner in owners)
    owners[0].send_signal(signal.SIGKILL)
    owners[0].wait()
    (dead / "r").mkdir()
    (shared / f"{PREFIX}unlocked").mkdir()  # not made by us: left alone
    try:
        with Scratch([shared]) as scratch:
            assert not dead.exists()
            assert {path.name for path in shared.iterdir()} == {alive.name, scratch.path.name, f"{PREFIX}unlocked"}
    finally:
        owners[1].kill()
        owners[1].wait()


def test_links_and_directories_of_others_are_left_alone(shared, tmp_path):
    """A name like ours that leads elsewhere, with a lock that nobody holds: nothing behind it is removed."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "lock").touch()
    (shared / f"{PREFIX}link").symlink_to(precious)
    trap = shared / f"{PREFIX}trap"
    made = as_other_user(f"mkdir {trap} && touch {trap}/lock && chmod -R 777 {trap}")
    assert made.denied == 0
    with Scratch([shared]):
        assert (precious / "lock").exists()
        assert (trap / "lock").exists()
