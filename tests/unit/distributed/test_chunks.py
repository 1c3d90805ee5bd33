"""Maps in this process; tests/ray/test_map.py does the same over a cluster."""

from pathlib import Path

import pytest

from raylab.distributed.map import run_chunks
from raylab.errors import DataError, RunError
from raylab.files import atomic_write


def square(number: int, path: Path) -> None:
    with atomic_write(path) as beside:
        beside.write_text(str(number**2))


def chunks(directory: Path, count: int) -> dict[Path, int]:
    return {directory / f"{i:03d}": i for i in range(count)}


def test_every_chunk_is_done_and_told(tmp_path):
    told = []
    run_chunks(square, chunks(tmp_path, 4), tell=lambda *counts: told.append(counts))
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["0", "1", "4", "9"]
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_is_there_is_not_done_again(tmp_path):
    (tmp_path / "002").write_text("kept")
    told = []
    run_chunks(square, chunks(tmp_path, 4), tell=lambda *counts: told.append(counts))
    assert (tmp_path / "002").read_text() == "kept"
    assert told[0] == (1, 4)
    assert told[-1] == (4, 4)


def test_an_exception_names_the_chunk_and_keeps_the_finished(tmp_path):
    def fail_at_two(number, path):
        square(1 // (number - 2), path)

    with pytest.raises(RunError, match=r"chunk 002 failed\n  why:  ZeroDivisionError"):
        run_chunks(fail_at_two, chunks(tmp_path, 4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000", "001"]
    run_chunks(square, chunks(tmp_path, 4))
    assert len(list(tmp_path.iterdir())) == 4


def test_our_own_error_stays_what_it_is(tmp_path):
    def refuse(number, path):
        raise DataError("image 7 is no image", "it is empty", "leave it out")

    with pytest.raises(DataError, match=r"image 7 is no image \(chunk 000\)\n  why:  it is empty\n  next: leave"):
        run_chunks(refuse, chunks(tmp_path, 1))


def test_a_chunk_without_its_file_is_an_error(tmp_path):
    with pytest.raises(RunError, match="chunk 000 wrote no file"):
        run_chunks(lambda number, path: None, chunks(tmp_path, 1))


def test_an_interrupt_goes_through_and_leaves_nothing_half_written(tmp_path):
    def interrupted(number, path):
        with atomic_write(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_chunks(interrupted, chunks(tmp_path, 1))
    assert not list(tmp_path.iterdir())
