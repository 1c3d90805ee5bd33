"""The one writer: sends outboxes to MLflow until they are empty.

    training -> Outbox.append -> outbox.jsonl -> forward() -> MLflow

`forward` may be interrupted anywhere and run again: it finds the run that it has created by its idempotency key, it
sends from the last saved offset, and MLflow drops what it already has (points by their primary key; params, tags,
inputs and artifacts are equal).
The `Forwarder` thread calls it while a run trains; `sync` calls it for everything under a directory.
"""

import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylab.documents import Document, read_document
from raylab.errors import DataError, RaylabError, TrackingError
from raylab.files import locked, write_json
from raylab.storage import explain_storage_error
from tracking import runs
from tracking.access import login
from tracking.outbox import Outbox, Record, read, target

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# MLflow's limits on one request, and on one value.
METRICS, PARAMS, TAGS, BYTES = 1000, 100, 100, 900_000
PARAM_LENGTH, TAG_LENGTH, DIGEST_LENGTH = 6000, 8000, 36
TRUNCATED = " [truncated]"
ATTEMPTS = 3
BATCHED = ("metrics", "params", "tags")
# Database errors of the server (an exhausted connection pool, a locked database) arrive as HTTP 400.
DATABASE_TROUBLE = re.compile(r"QueuePool|sqlalche|database is locked|psycopg|OperationalError", re.IGNORECASE)


class Sent(Document):
    """sent.json"""

    offset: int


class Unavailable(TrackingError):
    """The server does not accept records at present; try again later."""


class LoginRefused(Unavailable):
    """It does not accept them from this user."""


def forward(directory: Path, client: "MlflowClient | None" = None) -> int:
    """Send the unsent records of one outbox; returns the number of records sent or rejected.

    Returns 0 if the outbox is not bound yet or another forwarder is sending it. Raises TrackingError if the server is
    down or does not know the run; the records stay.
    """
    if target(directory) is None:
        return 0
    with locked(directory / "sending.lock", wait=False) as mine:
        if not mine or unsent(directory) == 0:
            return 0
        uri, run_id = _ensure_run(directory)
        sender = _Sender(directory, client or runs.client(uri), uri, run_id)
        count = 0
        for end, records in _requests(directory, _offset(directory)):
            sender.send(records)
            write_json(directory / "sent.json", {"offset": end})
            count += len(records)
        return count


def ensure_run(directory: Path) -> str:
    """The id of the MLflow run of an outbox that is bound. The run is created if MLflow does not have it yet, once,
    however often this is interrupted.

    Raises TrackingError if it cannot be created: Unavailable if that may change by itself.
    """
    with locked(directory / "sending.lock"):
        return _ensure_run(directory)[1]


def _ensure_run(directory: Path) -> tuple[str, str]:
    """(address, run id) of an outbox whose lock this process holds; see `ensure_run`."""
    bound = target(directory)
    if bound is None:
        raise TrackingError(f"{directory} is not bound to a run yet")
    uri, new = runs.resolve(bound.uri, bound.run_id, directory), bound.request
    if bound.run_id is not None:
        return uri, bound.run_id
    if new is None:
        what = f"{directory / 'target.json'} names no MLflow run, and none to create"
        raise DataError(what, do=f"raylab resume {directory.parent.name}: it writes the file again")
    parent = None if new.nested_in is None else ensure_run(Path(new.nested_in))
    try:
        run_id = runs.start_run(uri, new.experiment, new.name, parent, new.tags, new.time)
    except TrackingError as error:
        cause = error.__cause__
        if not isinstance(cause, Exception) or _refused(cause):
            raise
        raise _down(uri, cause) from error
    except Exception as error:
        raise _down(uri, error) from error
    Outbox(directory).bind(bound.uri, run_id)
    return uri, run_id


def unsent(directory: Path) -> int:
    """The number of records in an outbox that MLflow does not have yet."""
    path = directory / "outbox.jsonl"
    if not path.exists() or path.stat().st_size <= _offset(directory):
        return 0
    return sum(record is not None for _, record in read(directory, _offset(directory)))


def rejected(directory: Path) -> int:
    """The number of records, or single values of records, that MLflow rejected permanently."""
    path = directory / "rejected.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def sync(root: Path, is_open: Callable[[Path], bool] = Path.is_dir) -> dict[str, Any]:
    """Forward every outbox under `root` whose directory `is_open`; safe to repeat.

    Returns {"outboxes", "sent", "rejected", "unsent": counts, "errors": {outbox: text}}. A server that is down is
    contacted once, not once for each of its runs. An outbox with a damaged file is one of the errors.
    """
    directories = sorted(filter(is_open, (path.parent for path in Path(root).rglob("outbox/outbox.jsonl"))))
    total: dict[str, Any] = {"outboxes": len(directories), "sent": 0, "errors": {}}
    down: dict[str, TrackingError] = {}
    for directory in directories:
        try:
            bound = target(directory)
            if bound is None:
                total["errors"][str(directory)] = "not bound to a run yet"
                continue
            if bound.uri in down:
                raise down[bound.uri]
            total["sent"] += forward(directory)
        except OSError as error:
            total["errors"][str(directory)] = str(explain_storage_error(error) or error)
        except RaylabError as error:
            if isinstance(error, Unavailable) and bound is not None:
                down[bound.uri] = error
            if unsent(directory) or isinstance(error, DataError):
                total["errors"][str(directory)] = str(error)
    return total | {"rejected": sum(map(rejected, directories)), "unsent": sum(map(unsent, directories))}


class Forwarder:
    """A daemon thread that keeps outboxes empty during training.

    It never blocks its caller and never raises an error into it. A server that is down is retried after 1, 2, 4 ...
    30 s. Records that are unsent at `close` stay on disk for `sync`.
    """

    def __init__(self, poll: float = 1.0) -> None:
        """`poll`: seconds between two passes over the outboxes."""
        self._poll = poll
        self._directories: list[Path] = []
        self._pauses: dict[str, tuple[float, float]] = {}  # address or outbox -> (not before, pause), s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-forwarder", daemon=True)
        self._thread.start()

    def add(self, directory: Path) -> None:
        """Forward this outbox as well; it need not exist or be bound yet."""
        if directory not in self._directories:
            self._directories.append(directory)

    def close(self, timeout: float = 10.0) -> int:
        """Flush for at most `timeout` seconds; returns the number of records left unsent."""
        self._deadline = time.monotonic() + timeout
        self._closing.set()
        self._thread.join(timeout)
        left = sum(map(unsent, self._directories))
        if left:
            log.warning("%d records are not in MLflow yet; they are kept on disk, send them with: raylab sync", left)
        return left

    def _run(self) -> None:
        while not self._closing.wait(self._poll):
            self._pass()
        self._pauses.clear()
        while time.monotonic() < self._deadline and any(map(_is_waiting, self._directories)):
            self._pass()
            time.sleep(0.1)

    def _pass(self) -> None:
        for directory in list(self._directories):
            uri = ""
            try:
                bound = target(directory)
                uri = "" if bound is None else bound.uri
                if any(time.monotonic() < self._pauses.get(key, (0.0, 0.0))[0] for key in (uri, str(directory))):
                    continue
                forward(directory)
                self._pauses.pop(uri, None)
                self._pauses.pop(str(directory), None)
            except Exception as error:  # whatever it is: training continues, and the records are on disk
                # Only a server that is down delays its other runs.
                key = uri if isinstance(error, Unavailable) else str(directory)
                pause = min(2 * self._pauses.get(key, (0.0, 0.5))[1], 30.0)
                self._pauses[key] = (time.monotonic() + pause, pause)
                is_bug = not isinstance(error, RaylabError | OSError)
                log.warning("tracking retries in %.0f s: %s", pause, error, exc_info=is_bug)


class _Sender:
    def __init__(self, directory: Path, client: "MlflowClient", uri: str, run_id: str) -> None:
        self.directory, self.client, self.uri, self.run_id = directory, client, uri, run_id

    def send(self, records: list[Record]) -> None:
        """Deliver the records. A permanently rejected list is halved until the faulty record is alone."""
        pieces = records if len(records) > 1 else _pieces(records[0])
        refusal = self._try(records, attempts=ATTEMPTS if len(pieces) == 1 else 1)
        if refusal is None:
            return
        if len(pieces) == 1:
            self._reject(pieces[0], refusal)
        else:
            half = len(pieces) // 2
            self.send(pieces[:half])
            self.send(pieces[half:])

    def _try(self, records: list[Record], attempts: int) -> Exception | None:
        """None if delivered, else the error with which a healthy server rejects the records."""
        refusal: Exception | None = None
        for attempt in range(attempts):
            if attempt:
                time.sleep(0.2 * 2**attempt)
            try:
                if records[0]["kind"] == "artifact" and runs.is_embedded(self.uri):
                    runs.refuse_outside(self.uri, self.client.get_run(self.run_id).info.artifact_uri)
                _deliver(self.client, self.run_id, records)
                return None
            except Exception as error:
                if not _refused(error):
                    raise _down(self.uri, error) from error
                refusal = error
                self._ask_for_run()
        return refusal

    def _ask_for_run(self) -> None:
        """Check that the server knows the run, because a proxy or a faulty server may answer 400 to everything."""
        try:
            run = self.client.get_run(self.run_id)
        except Exception as error:
            raise _down(self.uri, error) from error
        if run.info.lifecycle_stage != "active":
            raise TrackingError(
                f"run {self.run_id} at {self.uri} was deleted",
                f"{unsent(self.directory)} of its records are waiting in {self.directory}",
                "restore the run in the MLflow UI, or remove that directory",
            )

    def _reject(self, record: Record, refusal: Exception) -> None:
        why = str(refusal)[:500]
        log.warning("MLflow permanently rejected a record (%s) of run %s: %s", record["kind"], self.run_id, why)
        path = self.directory / "rejected.jsonl"
        with path.open("a") as file:
            path.chmod(0o600)
            file.write(json.dumps({"record": record, "why": why}) + "\n")


def _deliver(client: "MlflowClient", run_id: str, records: list[Record]) -> None:
    from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
    from mlflow.entities.dataset import Dataset

    first = records[0]
    if first["kind"] in BATCHED:
        values = {kind: [r for r in records if r["kind"] == kind] for kind in BATCHED}
        metrics = [
            Metric(name, float(value), r["time"], r["step"])
            for r in values["metrics"]
            for name, value in r["values"].items()
        ]
        params = {name: _cut(value, PARAM_LENGTH) for r in values["params"] for name, value in r["values"].items()}
        tags = {name: _cut(value, TAG_LENGTH) for r in values["tags"] for name, value in r["values"].items()}
        client.log_batch(
            run_id, metrics, [Param(*item) for item in params.items()], [RunTag(*item) for item in tags.items()]
        )
    elif first["kind"] == "artifact":
        # A missing file is an error of the record, not of the server.
        path = Path(first["path"])
        send = client.log_artifacts if path.is_dir() else client.log_artifact
        send(run_id, str(path), first["to"] or None)
    elif first["kind"] == "input":
        dataset = Dataset(
            name=first["name"],
            digest=str(first["digest"])[:DIGEST_LENGTH],
            source_type="raylab",
            source=json.dumps({"source": first["source"]}),
        )
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", first["context"])])])
    elif first["status"] in ("FINISHED", "FAILED", "KILLED"):
        started = client.get_run(run_id).info.start_time  # the clock may have been set back since
        client.set_terminated(run_id, first["status"], max(first["time"], started))
    else:
        client.update_run(run_id, first["status"])


def _requests(directory: Path, end: int) -> Iterator[tuple[int, list[Record]]]:
    """Lists of the records after offset `end` that each fit into one request, with the new offset after each.

    A record that is split between two requests counts as sent with the second one.
    """
    group: list[Record] = []
    params: set[str] = set()
    counts, size = dict.fromkeys(BATCHED, 0), 0
    limits = dict(zip(BATCHED, (METRICS, PARAMS, TAGS), strict=True))
    for line_end, record in read(directory, end):
        if record is None:
            continue
        for part in _parts(record, limits):
            kind, values, length = part["kind"], part.get("values", {}), len(json.dumps(part)) * 2
            fits = (
                kind in BATCHED
                and all(r["kind"] in BATCHED for r in group[:1])
                and counts[kind] + len(values) <= limits[kind]
                and size + length <= BYTES
                and not (kind == "params" and params & values.keys())  # MLflow refuses a name twice
            )
            if group and not fits:
                yield end, group
                group, params, counts, size = [], set(), dict.fromkeys(BATCHED, 0), 0
            group.append(part)
            size += length
            if kind in BATCHED:
                counts[kind] += len(values)
                params |= values.keys() if kind == "params" else set()
        end = line_end
    if group:
        yield end, group


def _parts(record: Record, limits: dict[str, int]) -> list[Record]:
    """A record, split if it has more values than one request may contain."""
    if record["kind"] not in BATCHED:
        return [record]
    names = list(record["values"])
    limit = min(limits[record["kind"]], 100)  # 100 values are far below the limit in bytes, too
    chunks = [names[start : start + limit] for start in range(0, len(names), limit)]
    return [record | {"values": {name: record["values"][name] for name in chunk}} for chunk in chunks or [[]]]


def _pieces(record: Record) -> list[Record]:
    """A record, split into records of one value each."""
    if record["kind"] not in BATCHED or len(record["values"]) < 2:
        return [record]
    return [record | {"values": {name: value}} for name, value in record["values"].items()]


def _refused(error: Exception) -> bool:
    """Whether the record may be at fault, rather than the server or the connection."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, requests.RequestException):
        return False
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status in (400, 409, 413, 422) and not DATABASE_TROUBLE.search(str(error))
    return isinstance(error, OSError | KeyError | TypeError | ValueError | TrackingError)


def _down(uri: str, error: Exception) -> TrackingError:
    if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
        return TrackingError(
            f"{uri} does not know this run",
            str(error).splitlines()[0],
            "check that the address is the one with which the run started; its records are kept",
        )
    if (known := login.refusal(uri, error)) is not None:
        return LoginRefused(known.what, f"{known.why}; the records are kept on disk", f"{known.do}; then raylab sync")
    storage = explain_storage_error(error)
    why = storage.why if storage else (str(error).splitlines() or [type(error).__name__])[0][:300]
    do = "the records are kept; run raylab sync later"
    return Unavailable(f"MLflow at {uri} does not accept records now", why, do)


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - len(TRUNCATED)] + TRUNCATED


def _is_waiting(directory: Path) -> bool:
    """Whether an outbox has records that can be sent."""
    try:
        return target(directory) is not None and unsent(directory) > 0
    except DataError:  # its thread has said so
        return False


def _offset(directory: Path) -> int:
    """Bytes of the outbox that MLflow has. After damage everything is sent again, which changes nothing there."""
    path, records = directory / "sent.json", directory / "outbox.jsonl"
    if not path.exists():
        return 0
    try:
        offset = read_document(path, Sent).offset
    except DataError as error:
        log.warning("all records are sent again: %s", error)
        return 0
    if 0 <= offset <= (records.stat().st_size if records.exists() else 0):
        return offset
    log.warning("all records are sent again: %s does not have the %d bytes that %s names", records, offset, path.name)
    return 0
