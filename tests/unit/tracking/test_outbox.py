"""The outbox on disk: nothing lost, nothing torn, nothing doubled."""

import errno
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from raylab.errors import TrackingError
from raylab.files import locked
from tracking.outbox import Outbox, Target, read, target


def records(outbox: Outbox) -> list[dict]:
    return [record for _, record in read(outbox.directory) if record]


def point(step: int, **values: float) -> dict:
    return {"kind": "metrics", "step": step, "values": values or {"train/loss": 0.5}}


def test_a_record_keeps_its_time_and_the_file_is_private(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.append(point(1))
    outbox.append(point(2) | {"time": 1234})
    first, second = records(outbox)
    assert first["time"] > 1_700_000_000_000 and second["time"] == 1234
    assert stat.S_IMODE(outbox.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(outbox.directory.stat().st_mode) == 0o700


def test_nan_and_infinity_come_back_and_the_lines_are_plain_json(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append(point(1, a=float("nan"), b=float("inf"), c=float("-inf")))
    assert "NaN" not in outbox.path.read_text()
    values = records(outbox)[0]["values"]
    assert [str(float(values[name])) for name in "abc"] == ["nan", "inf", "-inf"]


@pytest.mark.parametrize("torn", [b'{"kind": "metr', b"\x00\xff\x00"])
def test_a_torn_last_line_is_ignored_then_ended(tmp_path: Path, torn: bytes) -> None:
    outbox = Outbox(tmp_path)
    outbox.append(point(1))
    with outbox.path.open("ab") as file:
        file.write(torn)
    assert [r["step"] for r in records(outbox)] == [1]
    outbox.append(point(2))
    assert [r["step"] for r in records(outbox)] == [1, 2]


def test_a_full_disk_leaves_no_trace_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = Outbox(tmp_path)
    outbox.append(point(1))
    before = outbox.path.read_bytes()
    whole = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: whole(fd, data[:7]))
        with pytest.raises(OSError) as caught:
            outbox.append(point(2))
    assert caught.value.errno == errno.ENOSPC
    assert outbox.path.read_bytes() == before


@pytest.mark.parametrize(
    "record", [{}, {"kind": "metric"}, {"kind": "metrics", "values": {}}, point(1, a="x"), {"kind": "status"}]
)
def test_a_record_of_no_known_form_is_refused(tmp_path: Path, record: dict) -> None:
    with pytest.raises(ValueError):
        Outbox(tmp_path).append(record)
    assert not (tmp_path / "outbox.jsonl").exists()


def _append_many(directory: Path, writer: int, count: int) -> None:
    outbox = Outbox(directory)
    for step in range(count):
        outbox.append(point(step, **{f"w{writer}": step}))


def test_four_processes_append_and_nothing_is_lost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_append_many, args=(tmp_path, w, 200)) for w in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = (tmp_path / "outbox.jsonl").read_text().splitlines()
    seen = [(name, record["step"]) for record in map(json.loads, lines) for name in record["values"]]
    assert sorted(seen) == sorted((f"w{w}", step) for w in range(4) for step in range(200))


def test_an_outbox_belongs_to_one_run(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert target(tmp_path) is None
    outbox.bind("http://127.0.0.1:1", "a")
    outbox.bind("http://127.0.0.1:2", "a")
    assert target(tmp_path) == Target(uri="http://127.0.0.1:2", run_id="a")
    assert stat.S_IMODE((tmp_path / "target.json").stat().st_mode) == 0o600
    with pytest.raises(TrackingError, match="belongs to run a"):
        outbox.bind("http://127.0.0.1:2", "b")


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as mine, locked(tmp_path / "lock", wait=False) as second:
        assert mine and not second
    with locked(tmp_path / "lock", wait=False) as again:
        assert again
