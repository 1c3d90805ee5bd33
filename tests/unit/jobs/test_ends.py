"""However a verb ends, the record of its run says so, and the run can be resumed."""

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs import cli
from raylab.files import read_lines
from tests.cgroup import memory_cgroup
from tests.conftest import mount_tmpfs
from tests.terminal import Terminal, show
from tests.verbs import MODULES, Verb, Verbs
from tests.wait import wait_for
from tracking import runs, server

pytestmark = pytest.mark.timeout(300)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LONG = ("--smoke", "--workers", 0, "--set", "loop.epochs=100000")
SHORT = ("--smoke", "--workers", 0, "--set", "loop.epochs=3")


class Home:
    """A raylab home, and verbs that use it."""

    def __init__(self, path: Path, verbs: Verbs | None = None) -> None:
        self.path, self.numbers = path, itertools.count()
        path.mkdir(exist_ok=True)
        self.environment = {**os.environ, "RAYLAB_HOME": str(path), "MLFLOW_TRACKING_URI": "", "TERM": "xterm"}
        self.verbs = verbs or Verbs(self.environment, (*MODULES, "jobs.fit", "jobs.ui", "jobs.compare"))

    def start(self, *words: object, output: Path | None = None) -> Verb:
        said = self.path / f"said-{next(self.numbers)}"
        return self.verbs.start(words, self.environment, output or said, said if output else None)

    def record(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.path / "runs" / name / "run.json").read_text())
        return record

    def run(self, name: str) -> Any:
        """The run in MLflow."""
        return MlflowClient(runs.database_uri(self.path / "mlflow" / "mlflow.db")).get_run(self.record(name)["run_id"])

    def steps(self, name: str) -> list[int]:
        return [line["step"] for line in read_lines(self.path / "runs" / name / "ledger.jsonl") if "step" in line]

    def train(self, name: str, data: Path, *words: object, output: Path | None = None) -> Verb:
        """Start a run, and wait until it trains."""
        verb = self.start("train", "ards", "--data", data, "--name", name, *words, output=output)
        wait_for(lambda: len(self.steps(name)) > 5 or verb.poll() is not None, 120, f"steps of {name}")
        assert verb.poll() is None, verb.errors.read_text()
        return verb

    def finish(self, name: str) -> None:
        """Resume an interrupted run to its end, which is near."""
        recipe = self.path / "runs" / name / "recipe.json"
        content = json.loads(recipe.read_text())
        content["loop"]["epochs"] = max(self.steps(name)) // 2 + 2  # 2 steps an epoch
        recipe.write_text(json.dumps(content))
        verb = self.start("resume", name)
        assert verb.wait(120) == 0, verb.errors.read_text()
        assert self.record(name)["status"] == self.run(name).info.status == "FINISHED"
        assert self.record(name).get("error") is None
        assert self.run(name).data.tags.get("raylab.error", "") == ""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("ends"))
    yield made
    made.verbs.stop()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_that_can_be_resumed(home: Home, ards_data: Path, number: signal.Signals) -> None:
    verb = home.train(number.name, ards_data, *LONG)
    os.kill(verb.pid, number)
    output = verb.communicate(60)
    assert verb.returncode == 130 and "interrupted" in output and "Traceback" not in output, output
    assert home.record(number.name)["status"] == home.run(number.name).info.status == "KILLED"
    assert home.record(number.name)["error"] == home.run(number.name).data.tags["raylab.error"] == "interrupted"
    if number == signal.SIGHUP:
        home.finish(number.name)


@pytest.mark.fault(26)
def test_a_clock_that_is_set_back_changes_no_order(
    home: Home, ards_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is resumed on a node whose clock is a day behind."""
    verb = home.train("clock", ards_data, *LONG)
    os.kill(verb.pid, signal.SIGTERM)
    assert verb.wait(60) == 130
    recipe = home.path / "runs" / "clock" / "recipe.json"
    content = json.loads(recipe.read_text())
    content["loop"]["epochs"] = max(home.steps("clock")) // 2 + 2
    recipe.write_text(json.dumps(content))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 86400)
    monkeypatch.setenv("RAYLAB_HOME", str(home.path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert cli.main(["resume", "clock", "--quiet"]) == 0
    result = json.loads((home.path / "runs" / "clock" / "result.json").read_text())
    assert result["gaps"] == 0 and result["attempts"] == 2
    run = home.run("clock")
    assert run.info.status == "FINISHED" and run.info.end_time >= run.info.start_time
    history = MlflowClient(runs.database_uri(home.path / "mlflow" / "mlflow.db")).get_metric_history(
        run.info.run_id, "train/loss"
    )
    assert sorted(point.step for point in history) == list(range(1, result["steps"] + 1))


def test_signals_during_the_end_do_not_spoil_it(home: Home, ards_data: Path) -> None:
    verb = home.train("again", ards_data, *LONG)
    while verb.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(verb.pid, signal.SIGTERM)
    assert verb.returncode == 130 and "Traceback" not in verb.errors.read_text(), verb.errors.read_text()
    assert home.record("again")["status"] == "KILLED"
    sync = home.start("sync")
    assert sync.wait(60) == 0, sync.errors.read_text()
    assert home.run("again").info.status == "KILLED"


def test_a_person_sees_every_epoch_and_the_one_that_is_kept(home: Home, ards_data: Path) -> None:
    terminal = Terminal()
    verb = home.start("train", "ards", "--data", ards_data, "--name", "seen", *SHORT, output=terminal.path)
    assert verb.wait(120) == 0 and verb.errors.read_text() == "", verb.errors.read_text()
    said = terminal.end()
    lines = show(said)
    assert said.index("train: starting") < said.index("checking the recipe and the data") < said.index("run seen")
    first = lines.index("    epoch  train loss    val loss     val auroc   elapsed")
    epochs = [line.split() for line in lines[first + 1 : first + 4]]
    assert [row[0] for row in epochs] == ["1/3", "2/3", "3/3"]
    result = json.loads((home.path / "runs" / "seen" / "result.json").read_text())
    kept = result["best"]["epoch"]
    assert lines[first + 4] == f"kept: epoch {kept + 1}, val auroc {result['best']['auroc']:.4f}"
    assert epochs[kept][-3:] == ["best", "so", "far"] and all(len(row) == 5 for row in epochs[kept + 1 :])
    rows = [json.loads(line) for line in (home.path / "runs" / "seen" / "outbox" / "outbox.jsonl").open()]
    means = [row["values"]["train/epoch_loss"] for row in rows if "train/epoch_loss" in row.get("values", {})]
    assert [row[1] for row in epochs] == [f"{mean:.4f}" for mean in means]
    assert lines[-1] == "      raylab compare        raylab ui" and not any("kept so far" in line for line in lines)
    assert all(len(line) <= 80 or "raylab " in line for line in lines)


def test_control_c_clears_the_terminal_and_ends_the_run(home: Home, ards_data: Path) -> None:
    terminal = Terminal()
    verb = home.train("control-c", ards_data, *LONG, output=terminal.path)
    wait_for(lambda: "mean loss" in terminal.said, 60, "the bar")
    os.write(terminal.master, b"\x03")
    assert verb.wait(60) == 130 and "Traceback" not in verb.errors.read_text(), verb.errors.read_text()
    lines = show(terminal.end())
    assert "run control-c" in lines[0] and not any("mean loss" in line or "MLflow" in line for line in lines)
    assert home.record("control-c")["status"] == home.run("control-c").info.status == "KILLED"


def test_a_terminal_that_is_closed_ends_a_run_that_can_be_resumed(home: Home, ards_data: Path) -> None:
    terminal = Terminal()
    verb = home.train("closed", ards_data, *LONG, output=terminal.path)
    terminal.hang_up()
    assert verb.wait(60) == 130 and "Traceback" not in verb.errors.read_text(), verb.errors.read_text()
    assert home.record("closed")["status"] == home.run("closed").info.status == "KILLED"
    home.finish("closed")


def test_nobody_needs_to_listen_to_a_run(home: Home, ards_data: Path) -> None:
    """As in `raylab train ... | head -1`."""
    pipe = home.path / "pipe"
    os.mkfifo(pipe)
    verb = home.start("train", "ards", "--data", ards_data, "--name", "unheard", *SHORT, output=pipe)
    with pipe.open() as reader:
        first = reader.readline()
    assert "unheard" in first, (verb.wait(60), verb.errors.read_text())
    assert verb.wait(120) == 0, verb.errors.read_text()
    assert verb.errors.read_text() == ""
    assert home.record("unheard")["status"] == home.run("unheard").info.status == "FINISHED"
    assert "val/auroc" in home.run("unheard").data.metrics


def test_a_full_disk_below_standard_output_does_not_end_a_run(home: Home, ards_data: Path) -> None:
    output = Path("/dev/full")
    verb = home.start("train", "ards", "--data", ards_data, "--name", "full", *SHORT, output=output)
    assert verb.wait(120) == 1
    assert "not all output could be printed" in verb.errors.read_text()
    assert "Traceback" not in verb.errors.read_text()
    assert home.record("full")["status"] == home.run("full").info.status == "FINISHED"


@pytest.mark.parametrize("words", [("recipe", "ards"), ("--help",), ("compare",), ("completion", "bash"), ("recipe",)])
def test_output_that_is_lost_is_said(home: Home, words: tuple[str, ...]) -> None:
    verb = home.start(*words, output=Path("/dev/full"))
    assert verb.wait(60) == (2 if words == ("recipe",) else 1) or words == ("--help",)
    assert "Traceback" not in verb.errors.read_text()


def test_a_fit_that_is_interrupted_is_marked(home: Home) -> None:
    words = ("--source", "synthetic", "--patients", 60, "--out", home.path / "fits", "--name", "fit")
    verb = home.start("fit", *words)
    begun = home.path / "runs" / "fit" / "outbox" / "outbox.jsonl"
    wait_for(lambda: begun.exists() or verb.poll() is not None, 120, "the fit")
    os.kill(verb.pid, signal.SIGHUP)
    output = verb.communicate(60)
    assert verb.returncode == 130 and "Traceback" not in output, output
    assert home.record("fit")["status"] == home.run("fit").info.status == "KILLED"


@pytest.mark.fault(4)
def test_a_run_that_the_kernel_ends_for_memory_says_so(home: Home, ards_data: Path) -> None:
    with memory_cgroup("ends") as cgroup:
        cgroup.limit(400 << 20)
        home.start("--version").wait(120)  # what verbs import is loaded outside of it
        with home.verbs.inside(cgroup):
            words = ("--data", ards_data, "--name", "too-large", *LONG, "model.hidden=2048")
            verb = home.start("train", "ards", *words)
        assert verb.wait(120) == -signal.SIGKILL, verb.errors.read_text()
        wait_for(lambda: home.record("too-large")["status"] != "RUNNING", 60, "its witness")
        wait_for(lambda: home.run("too-large").info.status != "RUNNING", 60, "its witness, in MLflow")
    assert home.record("too-large")["status"] == home.run("too-large").info.status == "FAILED"
    error = home.run("too-large").data.tags["raylab.error"]
    assert f"process {verb.pid} on" in error and "0.42 GB are there" in error
    output = verb.errors.read_text()
    assert error.partition(":")[0] in output and "raylab resume too-large" in output and "Traceback" not in output


@pytest.mark.fault(10)
def test_a_run_that_is_killed_is_marked_and_can_be_resumed(home: Home, ards_data: Path) -> None:
    verb = home.train("killed", ards_data, *LONG)
    verb.kill()
    wait_for(lambda: home.record("killed")["status"] == "KILLED", 60, "its witness")
    assert "ended without a word" in home.record("killed")["error"]
    home.finish("killed")


@pytest.mark.fault(17)
def test_a_disk_that_is_full_in_the_middle_does_not_leave_a_run_running(
    home: Home, ards_data: Path, tmp_path: Path
) -> None:
    """The run and MLflow's database are both there."""
    with mount_tmpfs(tmp_path, "64m"):
        small = Home(tmp_path / "home", home.verbs)
        verb = small.train("filled", ards_data, *LONG, "loop.checkpoint_steps=50")
        ballast = tmp_path / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(1 << 16))
        output = verb.communicate(120)
        assert verb.returncode == 1 and "no space is left" in output and "Traceback" not in output, output
        assert small.record("filled")["status"] == small.run("filled").info.status == "FAILED"
        assert "no space is left" in small.record("filled")["error"] and "raylab resume filled" in output
        ballast.unlink()
        small.finish("filled")


def test_ending_a_second_ui_leaves_the_server_of_the_first(home: Home) -> None:
    first, second = (home.start("ui", "--port", 0) for _ in range(2))
    link = "MLflow: http"
    wait_for(lambda: link in first.output.read_text() and link in second.output.read_text(), 120, "both links")
    own, other = sorted((first, second), key=lambda verb: "already running" in verb.output.read_text())
    assert "already running" in other.output.read_text() and "already running" not in own.output.read_text()
    os.kill(other.pid, signal.SIGTERM)
    assert other.wait(60) == 130
    assert server.running(home.path) is not None and own.poll() is None
    os.kill(own.pid, signal.SIGTERM)
    assert own.wait(60) == 130
    assert server.running(home.path) is None
