"""The real MLflow server, on loopback over SQLite: outages, replay, artifacts and models both ways."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from raylab.errors import TrackingError
from tests.mlflow.conftest import bearer
from tests.wait import wait_for
from tracking import compare, models, report, runs, server
from tracking.forwarder import Forwarder, forward, rejected, sync, unsent
from tracking.outbox import Outbox


def begin(uri: str, directory: Path, name: str = "run", experiment: str = "exp") -> tuple[Outbox, str]:
    run_id = runs.start_run(uri, experiment, name)
    outbox = Outbox(directory / "runs" / name / "outbox")
    outbox.bind(uri, run_id)
    return outbox, run_id


def point(step: int, value: float) -> dict:
    return {"kind": "metrics", "step": step, "values": {"train/loss": value}}


def history(uri: str, run_id: str, metric: str = "train/loss") -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in runs.client(uri).get_metric_history(run_id, metric))


def test_the_server_is_private_reused_and_knows_its_names(home: Path, served: server.Server) -> None:
    assert server.serve(home) == served
    runs.check(served.uri)
    asked = f"{served.uri}/api/2.0/mlflow/experiments/search?max_results=1"

    def get(uri: str, **headers: str) -> int:
        return requests.get(uri, headers=bearer(home) | headers, timeout=30).status_code

    assert get(asked, Host="localhost:7777") == 200  # the end of a tunnel
    assert get(asked, Host="evil.example") == 403
    assert get(f"{served.uri}/ajax-api/3.0/mlflow/assistant/config") == 404  # MLflow's assistant runs shell commands
    for path in (home / "mlflow", *(home / "mlflow").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_everything_arrives_and_a_replay_changes_nothing(tmp_path: Path, served: server.Server, direct: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello")
    for uri, name in ((direct, "replay-direct"), (served.uri, "replay-served")):
        outbox, run_id = begin(uri, tmp_path, name)
        for step in range(1200):
            outbox.append(point(step, step / 7))
        outbox.append({"kind": "metrics", "step": 1, "values": {"nan": float("nan"), "inf": float("inf")}})
        outbox.append({"kind": "params", "values": {"long": "x" * 7000, "optim.lr": 0.1}})
        outbox.append({"kind": "tags", "values": {"raylab.kind": "train"}})
        outbox.append({"kind": "artifact", "path": file, "to": "plots"})
        outbox.append({"kind": "input", "name": "d", "digest": "0" * 64, "source": "s", "context": "train"})
        outbox.append({"kind": "status", "status": "FINISHED"})

        def state(uri: str = uri, run_id: str = run_id) -> tuple:
            run = runs.client(uri).get_run(run_id)
            names = ("train/loss", "inf")
            nan = runs.client(uri).get_metric_history(run_id, "nan")
            return (
                run.data.params,
                run.data.tags,
                run.info.status,
                run.info.end_time,
                [history(uri, run_id, name) for name in names],
                [str(m.value) for m in nan],
                [d.dataset.digest for d in run.inputs.dataset_inputs],
                [a.path for a in runs.client(uri).list_artifacts(run_id, "plots")],
            )

        forward(outbox.directory)
        first = state()
        assert (
            first[2] == "FINISHED" and len(first[4][0]) == 1200 and first[5] == ["nan"] and first[7] == ["plots/a.txt"]
        )
        (outbox.directory / "sent.json").unlink()
        forward(outbox.directory)
        assert state() == first and rejected(outbox.directory) == 0


def test_a_rejected_record_does_not_block_the_rest(tmp_path: Path, served: server.Server) -> None:
    outbox, run_id = begin(served.uri, tmp_path)
    outbox.append({"kind": "params", "values": {"a": "1"}})
    outbox.append(point(1, 0.5))
    outbox.append({"kind": "metrics", "step": 1, "values": {"no*such*name": 1.0, "fine": 2.0}})
    outbox.append({"kind": "params", "values": {"a": "2", "b": "3"}})
    outbox.append({"kind": "artifact", "path": tmp_path / "missing.png", "to": ""})
    outbox.append(point(2, 0.4))
    forward(outbox.directory)
    assert unsent(outbox.directory) == 0 and rejected(outbox.directory) == 3
    assert history(served.uri, run_id) == [(1, 0.5), (2, 0.4)]
    data = runs.client(served.uri).get_run(run_id).data
    assert data.metrics["fine"] == 2.0 and data.params == {"a": "1", "b": "3"}


def test_records_of_an_unknown_or_deleted_run_are_kept(tmp_path: Path, served: server.Server) -> None:
    lost = Outbox(tmp_path / "lost/outbox")
    lost.bind(served.uri, "0" * 32)
    deleted, run_id = begin(served.uri, tmp_path)
    runs.client(served.uri).delete_run(run_id)
    for outbox in (lost, deleted):
        outbox.append(point(1, 0.5))
        with pytest.raises(TrackingError):
            forward(outbox.directory)
        assert unsent(outbox.directory) == 1 and rejected(outbox.directory) == 0
    runs.client(served.uri).restore_run(run_id)
    assert forward(deleted.directory) == 1


def test_artifacts_written_either_way_are_seen_either_way(
    home: Path, tmp_path: Path, served: server.Server, direct: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("hello")
    for uri, experiment in ((direct, "made direct"), (served.uri, "made by the server")):
        outbox, run_id = begin(uri, tmp_path, experiment.replace(" ", "-"), experiment)
        outbox.append({"kind": "artifact", "path": file, "to": "plots"})
        forward(outbox.directory)
        for reader in (direct, served.uri):
            assert compare.artifacts(reader, run_id, "plots", ".txt") == {"plots/a.txt": b"hello"}
        asked = {"run_id": run_id, "path": "plots/a.txt"}
        ui = requests.get(f"{served.uri}/get-artifact", params=asked, headers=bearer(home), timeout=30)
        assert ui.text == "hello"


class Untraceable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) if x.sum().item() > 0 else -self.head(x)


def convolution() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3), torch.nn.Dropout(), torch.nn.Flatten(), torch.nn.Linear(24, 2))


def test_a_model_without_pickle_loads_either_way(served: server.Server, direct: str) -> None:
    import mlflow

    net = convolution()
    example = models.synthetic_example((1, 3, 8))
    for uri in (direct, served.uri):
        run_id = runs.start_run(uri, "models", "net")
        models.log_model(uri, run_id, net, example)
        assert net.training and runs.client(uri).get_run(run_id).info.status == "RUNNING"
        models.register(uri, run_id, "net", 0.8, 0.5)
    batch = models.synthetic_example((7, 3, 8), seed=1)
    expected = net.eval()(torch.from_numpy(batch)).detach().numpy()
    for uri in (direct, served.uri):
        with models._here(uri):
            for name in ("models:/net/1", "models:/net/2", "models:/net@best", f"runs:/{run_id}/model"):
                loaded = mlflow.pyfunc.load_model(name)
                np.testing.assert_allclose(loaded.predict(batch), expected, atol=1e-5)
    assert not list(Path(runs.database(served.home)).parent.rglob("*.pth"))


def models_of(uri: str, experiment_id: str) -> list[tuple[str, str, str]]:
    found = runs.client(uri).search_logged_models([experiment_id])
    return [(one.source_run_id, one.model_id, str(one.status)) for one in found]


def test_a_run_has_one_logged_model_in_its_own_experiment(served: server.Server, direct: str) -> None:
    """However often it is logged, and after an upload that was cut short."""
    example = models.synthetic_example((2, 5))
    for uri, name in ((direct, "one-direct"), (served.uri, "one-served")):
        client, net = runs.client(uri), torch.nn.Linear(5, 1)
        run_id = runs.start_run(uri, name, "net")
        experiment = client.get_run(run_id).info.experiment_id
        torn = client.create_logged_model(experiment, "model", run_id)
        first = models.log_model(uri, run_id, net, example)
        assert models.log_model(uri, run_id, net, example) == first
        assert models_of(uri, experiment) == [(run_id, first.removeprefix("models:/"), "READY")]
        assert torn.model_id not in first and models_of(uri, "0") == []
        outputs = client.get_run(run_id).outputs.model_outputs
        assert [output.model_id for output in outputs] == [first.removeprefix("models:/")]
        another = models.log_model(uri, run_id, torch.nn.Linear(5, 1), example)  # other weights take its place
        assert models_of(uri, experiment) == [(run_id, another.removeprefix("models:/"), "READY")]


def test_best_is_the_best_version_and_not_the_newest(served: server.Server) -> None:
    example, versions = models.synthetic_example((2, 5)), []
    for score, loss in ((None, 0.1), (0.7, 0.6), (0.8, 0.6), (0.6, 0.1), (0.8, 0.6), (0.8, 0.5), (0.8, 0.9)):
        run_id = runs.start_run(served.uri, "registered", "net")
        models.log_model(served.uri, run_id, torch.nn.Linear(5, 1), example)
        versions.append(models.register(served.uri, run_id, "ranked", score, loss))
    # By score, then by loss, then by age; a version without a score comes last
    assert [(v.version, v.best) for v in versions] == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6)]
    assert models.register(served.uri, run_id, "ranked", 0.8, 0.9) == models.Registered(7, 6)
    client = runs.client(served.uri)
    assert int(client.get_model_version_by_alias("ranked", "best").version) == 6
    assert len(client.search_model_versions("name = 'ranked'")) == 7


def test_a_model_that_cannot_be_traced_leaves_its_weights(served: server.Server) -> None:
    from safetensors.torch import load

    run_id = runs.start_run(served.uri, "models", "untraceable")
    net = Untraceable()
    assert models.log_model(served.uri, run_id, net, models.synthetic_example((2, 5))) == f"runs:/{run_id}/model"
    found = compare.artifacts(served.uri, run_id, "model")
    assert torch.equal(load(found["model/model.safetensors"])["head.weight"], net.head.weight)
    assert b"torch.export could not trace" in found["model/README.txt"]
    with pytest.raises(TrackingError, match="no model to register"):
        models.register(served.uri, run_id, "untraceable", 0.5, 0.5)


def test_runs_are_found_resumed_and_nested(served: server.Server) -> None:
    parent = runs.start_run(served.uri, "found", "search", tags={"raylab.kind": "tune"})
    child = runs.start_run(served.uri, "found", "trial", parent, {"raylab.kind": "trial"})
    assert runs.find_run(served.uri, "trial") == child and runs.find_run(served.uri, parent) == parent
    with pytest.raises(TrackingError, match="no run is named"):
        runs.find_run(served.uri, "nobody's")
    runs.client(served.uri).set_terminated(child, "FAILED")
    runs.resume_run(served.uri, child)
    frame = compare.collect(served.uri, "found")
    by_name = {row["name"]: row for row in frame.iter_rows(named=True)}
    assert by_name["trial"]["parent_run_id"] == parent and by_name["trial"]["status"] == "RUNNING"
    with pytest.raises(TrackingError, match=r"known: .*found"):
        compare.collect(served.uri, "nothing")


def test_drivers_that_start_together_share_one_experiment(served: server.Server) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda: made.append(runs.start_run(served.uri, "race", "r"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16 == compare.collect(served.uri, "race").height


def test_the_report_of_real_runs(tmp_path: Path, served: server.Server) -> None:
    outbox, _ = begin(served.uri, tmp_path, "reported", "report")
    plot = tmp_path / "roc.png"
    Image.new("RGB", (4, 4)).save(plot)
    attrition = tmp_path / "attrition.json"
    attrition.write_text('[{"step": "adults", "patients": 12}]')
    for step in range(5):
        outbox.append(point(step, 1 / (step + 1)))
    outbox.append(
        {"kind": "metrics", "step": 5, "values": {"test/auroc": 0.8, "test/auroc_low": 0.7, "test/auroc_high": 0.9}}
    )
    outbox.append({"kind": "tags", "values": {"raylab.synthetic": "true", "raylab.task": "ards"}})
    outbox.append({"kind": "artifact", "path": plot, "to": "plots"})
    outbox.append({"kind": "artifact", "path": attrition, "to": ""})
    sync(tmp_path)
    page = report.report(served.uri, "report", tmp_path / "report.html").read_text()
    assert "0.800 [0.700, 0.900]" in page and "adults" in page and 'alt="roc"' in page and "Synthetic data." in page


@pytest.mark.slow
@pytest.mark.timeout(900)  # four starts of a server
@pytest.mark.fault(21)
def test_a_killed_server_loses_no_point_and_doubles_none(tmp_path: Path) -> None:
    """kill -9 in the middle of the traffic, twice; training never waits."""
    home = tmp_path / "home"  # beside the run: a run within goes to the database itself while the server is away
    running = server.serve(home, port=0)
    port = int(running.uri.rsplit(":", 1)[1])
    outbox, run_id = begin(running.uri, tmp_path)
    forwarder = Forwarder(poll=0.02)
    forwarder.add(outbox.directory)
    done, count = threading.Event(), [0]

    def train() -> None:
        while not done.is_set():
            outbox.append(point(count[0], count[0] * 0.5))
            count[0] += 1
            time.sleep(0.005)

    def points(more: int) -> None:
        """Wait until training has added so many points: it goes on whether there is a server or not."""
        last = count[0] + more
        wait_for(lambda: count[0] >= last, 60, f"{more} more points")

    training = threading.Thread(target=train)
    training.start()
    try:
        for _ in range(2):
            points(200)
            os.killpg(running.pid, signal.SIGKILL)
            points(200)
            running = server.serve(home, port)
            assert running.uri.endswith(f":{port}")
        os.killpg(running.pid, signal.SIGKILL)
        points(50)
    finally:
        done.set()
        training.join()
    assert forwarder.close(3) > 0
    running = server.serve(home, port)
    try:
        result = sync(tmp_path)
        assert result["unsent"] == result["rejected"] == 0 and not result["errors"]
        assert history(running.uri, run_id) == [(step, step * 0.5) for step in range(count[0])]
    finally:
        running.stop()
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
