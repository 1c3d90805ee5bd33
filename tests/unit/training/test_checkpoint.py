"""Checkpoints are whole or absent, and a damaged one is known for what it is."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from raylab.errors import CheckpointError
from raylab.training import checkpoint
from raylab.training.checkpoint import adopt, find_newest, is_valid, list_checkpoints, load, save


def state(step: int, size: int = 100) -> dict:
    return {"model": {"w": torch.full((size,), float(step))}, "progress": {"step": step}}


def filled(directory: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        save(directory, step, state(step), keep)
    return directory


def damage(path: Path) -> None:
    """One bit of the state flips."""
    file = path / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def steps(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "deep" / "checkpoints", 7, state(7))
    assert path.name == "step-00000007" and is_valid(path)
    assert find_newest(path.parent) == (path, [])
    back = load(path)
    assert torch.equal(back["model"]["w"], state(7)["model"]["w"]) and back["progress"] == {"step": 7}
    assert sorted(p.name for p in path.iterdir()) == ["sha256", "state.pt"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert find_newest(tmp_path / "nothing") == (None, [])


def test_the_newest_are_kept(tmp_path):
    assert steps(filled(tmp_path, 5, 10, 15, 99_999_999, keep=2)) == [99_999_999, 15]


# two writers: one that hung was expelled, and wakes while the other writes


class Stale(Exception):
    """Raised where a writer notices that it was expelled."""


def test_a_writer_that_was_expelled_removes_nothing_of_the_other(tmp_path):
    work = tmp_path / ".step-00000010.1"
    work.mkdir()

    def check() -> None:
        raise Stale

    with pytest.raises(Stale):
        save(tmp_path, 5, state(5), check=check)
    assert list(tmp_path.iterdir()) == [work]


def test_a_writer_that_hangs_after_its_last_check_spares_newer_checkpoints(tmp_path):
    checks = iter(range(2))

    def hang() -> None:
        if next(checks) == 1:
            filled(tmp_path, 10, 15, keep=2)
            (tmp_path / ".step-00000005.1").mkdir()  # the other has removed it

    with pytest.raises(CheckpointError):
        save(tmp_path, 5, state(5), check=hang)
    assert steps(tmp_path) == [15, 10]


def test_a_writer_that_wakes_after_its_rename_spares_newer_checkpoints(tmp_path, monkeypatch):
    listed = checkpoint.list_checkpoints

    def hang(directory: Path) -> list[Path]:
        monkeypatch.setattr(checkpoint, "list_checkpoints", listed)
        filled(directory, 10, 15, keep=3)
        return listed(directory)

    monkeypatch.setattr(checkpoint, "list_checkpoints", hang)
    save(tmp_path, 5, state(5), keep=2)
    assert steps(tmp_path) == [15, 10, 5]


# kills


class Killed(BaseException):
    """As sudden as kill -9: no handler of ours runs after it."""


@pytest.mark.parametrize("operation", ["rename", "mkdir", "open"])
def test_a_kill_at_any_point_leaves_the_older_checkpoint_and_no_half_one(operation, tmp_path, monkeypatch):
    filled(tmp_path, 5)
    whole = getattr(Path, operation)

    def kill(path: Path, *arguments, **options):
        if path.name in {"sha256", f".step-00000010.{os.getpid()}"}:
            raise Killed
        return whole(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, operation, kill)
        with pytest.raises(Killed):
            save(tmp_path, 10, state(10))
    assert steps(tmp_path) == [5]
    assert find_newest(tmp_path) == (tmp_path / "step-00000005", [])
    save(tmp_path, 10, state(10))  # clears up what the killed writer left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_a_failed_rename_is_said_and_leaves_the_older_one(tmp_path, monkeypatch):
    filled(tmp_path, 5)

    def fail(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="step 10 could not be written") as caught:
        save(tmp_path, 10, state(10))
    assert "no space is left" in caught.value.why and "raylab resume" in caught.value.do
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.fault(18)
def test_a_flipped_bit_falls_back_to_the_predecessor_and_is_named(tmp_path):
    filled(tmp_path, 5, 10)
    damage(tmp_path / "step-00000010")
    assert find_newest(tmp_path) == (tmp_path / "step-00000005", [tmp_path / "step-00000010"])


@pytest.mark.parametrize("name", ["state.pt", "sha256"])
@pytest.mark.fault(18)
def test_a_missing_or_cut_file_is_damage_too(name, tmp_path):
    filled(tmp_path, 5, 10, 15)
    (tmp_path / "step-00000015" / name).unlink()
    file = tmp_path / "step-00000010" / name
    file.write_bytes(file.read_bytes()[:10])
    found, damaged = find_newest(tmp_path)
    assert found == tmp_path / "step-00000005" and len(damaged) == 2


def test_when_all_are_damaged_it_says_so(tmp_path):
    filled(tmp_path, 5, 10)
    for path in list_checkpoints(tmp_path):
        damage(path)
    with pytest.raises(CheckpointError, match="every checkpoint") as caught:
        find_newest(tmp_path)
    assert "step-00000005" in caught.value.why and "step-00000010" in caught.value.why


def test_the_same_step_again_keeps_a_good_one_and_replaces_a_damaged_one(tmp_path):
    filled(tmp_path, 5, 10)
    before = (tmp_path / "step-00000010" / "state.pt").stat().st_ino
    filled(tmp_path, 10)
    assert (tmp_path / "step-00000010" / "state.pt").stat().st_ino == before
    damage(tmp_path / "step-00000010")
    filled(tmp_path, 10)
    assert is_valid(tmp_path / "step-00000010") and steps(tmp_path) == [10, 5]


def test_damaged_newer_ones_never_push_out_the_good_ones(tmp_path):
    """A run that went back behind them writes the next checkpoint at another step than theirs."""
    filled(tmp_path, 10, 20, 30)
    damage(tmp_path / "step-00000020")
    damage(tmp_path / "step-00000030")
    save(tmp_path, 15, state(15), keep=2)
    assert find_newest(tmp_path) == (tmp_path / "step-00000015", [])
    assert steps(tmp_path) == [15, 10]


def test_no_pickle_is_executed(tmp_path):
    """A checkpoint whose checksum holds but whose content would run code when unpickled."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    path = filled(tmp_path, 5) / "step-00000005"
    for content in (state(5) | {"payload": Payload()}, None):
        if content is None:
            (path / "state.pt").write_bytes(pickle.dumps(Payload()))
        else:
            torch.save(content, path / "state.pt")
        (path / "sha256").write_text(checkpoint.sha256(path / "state.pt"))
        assert is_valid(path)
        with pytest.raises(CheckpointError, match="could not be read"):
            load(path)
        assert not (tmp_path / "executed").exists()


def test_another_trials_checkpoint_is_adopted(tmp_path):
    donor = filled(tmp_path / "donor", 5) / "step-00000005"
    own = filled(tmp_path / "own", 5, 10)
    adopt(own, donor)
    assert steps(own) == [5] and is_valid(own / "step-00000005") and is_valid(donor)


@pytest.mark.fault(17)
def test_a_full_disk_is_said_and_spares_the_checkpoint_that_is_there(small_disk):
    save(small_disk, 5, state(5, size=100_000))
    with pytest.raises(CheckpointError, match="step 10 could not be written") as caught:
        save(small_disk, 10, state(10, size=400_000))
    assert caught.value.exit_code == 1 and "free space" in caught.value.do
    assert find_newest(small_disk) == (small_disk / "step-00000005", [])
    assert [p.name for p in small_disk.iterdir()] == ["step-00000005"]
    save(small_disk, 11, state(11, size=100_000))  # when there is space again
    assert find_newest(small_disk)[0] == small_disk / "step-00000011"


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    filled(tmp_path, 1, 2)
    (tmp_path / "step-99999999").write_text("stray")
    (tmp_path / "step-notes").mkdir()
    assert find_newest(tmp_path) == (tmp_path / "step-00000002", [])
    filled(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [3]
    assert (tmp_path / "step-99999999").read_text() == "stray" and (tmp_path / "step-notes").is_dir()


def test_a_file_in_the_place_of_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "step-00000001").write_text("stray")
    assert is_valid(save(tmp_path, 1, state(1)))
