"""The one writer against a small fake MLflow: limits, refusals, outages."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException, RestException

from raylab.errors import TrackingError
from tests.wait import wait_for
from tracking import forwarder as forward_module
from tracking import runs
from tracking.forwarder import Forwarder, forward, rejected, sync, unsent
from tracking.outbox import Outbox


class FakeClient:
    """As much of MlflowClient as the writer uses; `fails` decides what a call raises."""

    def __init__(self) -> None:
        self.batches: list[tuple[list, list, list]] = []
        self.points: list[tuple[str, int, float]] = []
        self.params: dict[str, str] = {}
        self.ended: list[str] = []
        self.ended_at: list[int] = []
        self.started = 0
        self.fails: Any = lambda name, payload: None

    def _call(self, name: str, payload: Any = None) -> None:
        if error := self.fails(name, payload):
            raise error

    def get_run(self, run_id: str) -> Any:
        self._call("get_run")
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage="active", start_time=self.started))

    def log_batch(self, run_id: str, metrics: list, params: list, tags: list) -> None:
        self._call("log_batch", [m.key for m in metrics] + [p.key for p in params])
        self.batches.append((metrics, params, tags))
        self.points += [(m.key, m.step, m.value) for m in metrics]
        self.params |= {p.key: p.value for p in params}

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._call("set_terminated")
        self.ended.append(status)
        self.ended_at.append(end_time)


DAMAGES = [b"", b"{", b"[1]", b'{"x": 1}', b"\xff\xfe\x00", b'{"uri": 5, "run_id": [], "offset": "x"}']
BAD = RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"})
POOL = RestException({"error_code": "BAD_REQUEST", "message": "QueuePool limit of size 5 overflow 10 reached"})
DEAD = MlflowException("connection refused")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(runs, "client", lambda uri: fake)
    monkeypatch.setattr(forward_module.time, "sleep", lambda seconds: None)
    return fake


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    outbox = Outbox(tmp_path / "outbox")
    outbox.bind("http://fake", "run")
    return outbox


def points(outbox: Outbox, *steps: int, name: str = "train/loss") -> None:
    for step in steps:
        outbox.append({"kind": "metrics", "step": step, "values": {name: float(step)}})


def test_requests_stay_within_the_limits(outbox: Outbox, fake: FakeClient) -> None:
    points(outbox, *range(1010))
    outbox.append({"kind": "metrics", "step": 1, "values": {f"m{i}": i for i in range(1300)}})
    outbox.append({"kind": "params", "values": {f"p{i}": "x" * 7000 for i in range(250)}})
    assert forward(outbox.directory) > 1010
    assert all(len(m) <= 1000 and len(p) <= 100 and len(t) <= 100 for m, p, t in fake.batches)
    assert all(sum(len(p.value) for p in params) < 1_000_000 for _, params, _ in fake.batches)
    assert len(fake.points) == 2310 and len(fake.params) == 250
    assert set(map(len, fake.params.values())) == {6000}
    assert fake.params["p0"].endswith("[truncated]")
    assert unsent(outbox.directory) == 0 and forward(outbox.directory) == 0


def test_the_order_is_kept_around_a_status(outbox: Outbox, fake: FakeClient) -> None:
    points(outbox, 1)
    outbox.append({"kind": "status", "status": "FINISHED"})
    points(outbox, 2)
    forward(outbox.directory)
    assert [len(m) for m, _, _ in fake.batches] == [1, 1] and fake.ended == ["FINISHED"]


def test_a_run_does_not_end_before_it_started(outbox: Outbox, fake: FakeClient) -> None:
    fake.started = time.time_ns() // 1_000_000 + 3_600_000  # the clock was then set back by an hour
    outbox.append({"kind": "status", "status": "FINISHED"})
    forward(outbox.directory)
    assert fake.ended_at == [fake.started]


@pytest.mark.parametrize("error", [DEAD, POOL, RestException({"error_code": "INTERNAL_ERROR", "message": "500"})])
@pytest.mark.fault(21)
def test_an_outage_keeps_every_record(outbox: Outbox, fake: FakeClient, error: Exception) -> None:
    points(outbox, *range(5))
    fake.fails = lambda name, payload: error
    with pytest.raises(TrackingError, match="does not accept records now"):
        forward(outbox.directory)
    assert unsent(outbox.directory) == 5 and rejected(outbox.directory) == 0
    fake.fails = lambda name, payload: None
    forward(outbox.directory)
    assert len(fake.points) == 5


@pytest.mark.fault(22)
def test_a_storm_of_400_rejects_nothing(outbox: Outbox, fake: FakeClient) -> None:
    """A proxy that says 400 to everything is not a verdict about a record."""
    points(outbox, 1, 2)
    fake.fails = lambda name, payload: BAD
    with pytest.raises(TrackingError):
        forward(outbox.directory)
    assert rejected(outbox.directory) == 0 and unsent(outbox.directory) == 2


def test_a_refused_value_is_set_aside_alone(outbox: Outbox, fake: FakeClient) -> None:
    points(outbox, *range(50))
    outbox.append({"kind": "params", "values": {"good": "1", "bad": "2"}})
    points(outbox, 50, name="bad")
    points(outbox, 51)
    fake.fails = lambda name, payload: BAD if payload and "bad" in payload else None
    forward(outbox.directory)
    assert {step for _, step, _ in fake.points} == {*range(50), 51} and fake.params == {"good": "1"}
    aside = [json.loads(line) for line in (outbox.directory / "rejected.jsonl").read_text().splitlines()]
    assert [list(entry["record"]["values"]) for entry in aside] == [["bad"], ["bad"]]
    assert unsent(outbox.directory) == 0


def test_an_empty_record_and_a_torn_line_do_not_stay_unsent(outbox: Outbox, fake: FakeClient) -> None:
    outbox.append({"kind": "tags", "values": {}})
    with outbox.path.open("ab") as file:
        file.write(b'{"torn\n')
    forward(outbox.directory)
    assert unsent(outbox.directory) == 0


def test_sync_asks_a_dead_server_once_and_still_serves_the_others(tmp_path: Path, fake: FakeClient) -> None:
    asked: list[str] = []
    for index in range(4):
        outbox = Outbox(tmp_path / f"runs/{index}/outbox")
        outbox.bind("http://dead", f"run{index}")
        points(outbox, 1)
    fake.fails = lambda name, payload: asked.append(name) or DEAD
    result = sync(tmp_path)
    assert asked == ["log_batch"]
    assert (result["sent"], result["unsent"], len(result["errors"])) == (0, 4, 4)
    fake.fails = lambda name, payload: None
    assert sync(tmp_path) == {"outboxes": 4, "sent": 4, "errors": {}, "rejected": 0, "unsent": 0}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault(19)
def test_a_damaged_target_is_named_and_the_other_outboxes_are_sent(
    damage: bytes, tmp_path: Path, fake: FakeClient
) -> None:
    for name in ("a", "b", "c"):
        outbox = Outbox(tmp_path / name / "outbox")
        outbox.bind("http://fake", name)
        points(outbox, 1)
    target = tmp_path / "b" / "outbox" / "target.json"
    target.write_bytes(damage)
    result = sync(tmp_path)
    assert (result["sent"], result["unsent"]) == (2, 1)
    (said,) = result["errors"].values()
    assert str(target) in said and "raylab resume b" in said
    Outbox(tmp_path / "b" / "outbox").bind("http://fake", "b")  # as `raylab resume` does
    assert sync(tmp_path)["sent"] == 1


@pytest.mark.parametrize("damage", [*DAMAGES, b'{"offset": 999999}', b'{"offset": -1}'])
def test_after_damage_to_the_offset_everything_is_sent_again(damage: bytes, outbox: Outbox, fake: FakeClient) -> None:
    points(outbox, 1, 2)
    forward(outbox.directory)
    (outbox.directory / "sent.json").write_bytes(damage)
    points(outbox, 3)
    assert unsent(outbox.directory) == 3 and forward(outbox.directory) == 3
    assert {step for _, step, _ in fake.points} == {1, 2, 3} and unsent(outbox.directory) == 0


@pytest.mark.parametrize("damage", [*DAMAGES, b'{"kind": "metrics", "step": 1, "values": 3}', b'{"kind": "status"}'])
def test_a_foreign_line_is_skipped_and_said(
    damage: bytes, outbox: Outbox, fake: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    points(outbox, 1)
    with outbox.path.open("ab") as file:
        file.write(damage + b"\n")
    points(outbox, 2)
    assert forward(outbox.directory) == 2 and unsent(outbox.directory) == 0
    assert [step for _, step, _ in fake.points] == [1, 2] and str(outbox.path) in caplog.text


def test_the_thread_tells_of_damage_without_a_traceback(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runs, "client", lambda uri: FakeClient())
    points(outbox, 1)
    (outbox.directory / "target.json").write_text("{")
    forwarder = Forwarder(poll=0.01)
    forwarder.add(outbox.directory)
    wait_for(lambda: "target.json" in caplog.text, 30, "the warning")
    assert forwarder.close(5) == 1 and "Traceback" not in caplog.text


def test_the_thread_survives_everything_and_close_counts(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeClient()
    monkeypatch.setattr(runs, "client", lambda uri: fake)
    fake.fails = lambda name, payload: RuntimeError("a bug")
    forwarder = Forwarder(poll=0.01)
    forwarder.add(outbox.directory)
    points(outbox, 1, 2)
    time.sleep(0.1)
    began = time.monotonic()
    assert forwarder.close(0.3) == 2
    assert time.monotonic() - began < 2


def test_close_flushes(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeClient()
    monkeypatch.setattr(runs, "client", lambda uri: fake)
    forwarder = Forwarder(poll=60)
    forwarder.add(outbox.directory)
    points(outbox, 1, 2)
    assert forwarder.close(5) == 0 and len(fake.points) == 2
