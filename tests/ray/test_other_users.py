"""A training on a local Ray while another user of the machine tries to stop it, read it or run code in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from raylab.files import read_lines
from tests import paced
from tests.others import NOBODY, as_other_user, give_up_override, skip_unless_root
from tests.paced import PACED
from tests.verbs import Verb, Verbs
from tests.wait import wait_for
from tracking.forwarder import sync

LONG = ("--smoke", "--set", "loop.epochs=4000")


class Local:
    """raylab's command line on a local Ray, in an environment that names no cluster and no token."""

    def __init__(self, home: Path, scratch: Path, verbs: Verbs) -> None:
        self.home, self.scratch, self.verbs = home, scratch, verbs
        config = {"XDG_CONFIG_HOME": str(home / "config")}
        self.environment = {**without_ray(), **config, "RAYLAB_HOME": str(home), "TMPDIR": str(scratch)}
        self.started: list[Verb] = []

    def start(self, *words: object) -> Verb:
        verb = self.verbs.start(words, self.environment, self.home / f"said-{len(self.started)}.txt")
        self.started.append(verb)
        return verb

    def has_trained(self, run: str) -> bool:
        return any("step" in line for line in read_lines(self.home / "runs" / run / "ledger.jsonl"))

    def statuses(self) -> dict[str, str]:
        """Name -> status of all runs in MLflow; what a busy machine had no time to send at the end is sent first."""
        from mlflow import MlflowClient

        assert sync(self.home)["unsent"] == 0
        client = MlflowClient(f"sqlite:///{self.home}/mlflow/mlflow.db")
        experiment = client.get_experiment_by_name("raylab")
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id])
        return {run.info.run_name: run.info.status for run in runs}


def without_ray() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}


@pytest.fixture(scope="module")
def verbs() -> Iterator[Verbs]:
    """Of a user like any other: root writes where only others may. Without Ray, which reads a token when it is
    imported."""
    made = Verbs(without_ray(), before=give_up_override)
    yield made
    made.stop()


@pytest.fixture
def local(tmp_path: Path, verbs: Verbs) -> Iterator[Local]:
    """Its TMPDIR is like /tmp: everybody may write there."""
    scratch = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short: below it lie Ray's sockets
    scratch.chmod(0o1777)
    made = Local(tmp_path, scratch, verbs)
    yield made
    for verb in made.started:  # one that a failed test has left: Ray's processes die with it
        verb.kill()
        verb.wait(60)
    shutil.rmtree(scratch)


def terminate(verb: Verb) -> str:
    """SIGTERM; what the command has said. It must end as an interrupted one, and leave no process."""
    assert verb.poll() is None, verb.output.read_text()
    family = psutil.Process(verb.pid).children(recursive=True)
    os.kill(verb.pid, signal.SIGTERM)
    output = verb.communicate(120)
    assert verb.returncode == 130, output
    assert "raylab: interrupted" in output
    assert "Traceback" not in output
    wait_for(lambda: not [child for child in family if child.is_running()], 60, "the end of Ray's processes")
    return output


def listening(verb: Verb) -> dict[tuple[str, int], str]:
    """(address, port) -> process name, of all sockets that the command and Ray listen on."""
    found = {}
    for one in (psutil.Process(verb.pid), *psutil.Process(verb.pid).children(recursive=True)):
        try:
            for connection in one.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr[0].removeprefix("::ffff:"), connection.laddr[1]] = one.cmdline()[0]
        except psutil.NoSuchProcess:
            continue
    return found


# As the other user: writes to and reads from a TCPStore on every port, and calls Ray's workers without a token.
# The imports come before the change of user, who may not be able to read this Python.
STORE_ATTACK = """
import os, sys, grpc
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from torch.distributed import TCPStore

def keys(port):
    try:
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20), wait_for_workers=False)
        store.set("planted", "by a stranger")
        return store.list_keys()
    except Exception:
        return None

def refusal(port):
    call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary("/ray.rpc.CoreWorkerService/PushTask")
    try:
        call(b"", timeout=10)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"

user, *ports = map(int, sys.argv[1:])
os.setgroups([]), os.setgid(user), os.setuid(user)
pool = ThreadPoolExecutor(2 * len(ports))
stores = {port: pool.submit(keys, port) for port in ports}
calls = {port: pool.submit(refusal, port) for port in ports}
wait([*stores.values(), *calls.values()], timeout=60)  # gloo's own sockets never answer
for port in ports:
    store = stores[port].done() and stores[port].result() is not None
    print(port, "STORE" if store else "-", calls[port].result() if calls[port].done() else "-", flush=True)
os._exit(0)
"""


@pytest.mark.timeout(900)
def test_another_user_gets_nothing_and_stops_nothing(local: Local, ards_data: Path) -> None:
    skip_unless_root()
    # He was first: Ray's usual directory is his, with the address of a cluster of his
    planted = as_other_user(
        f"mkdir {local.scratch}/ray && echo 127.0.0.1:6379 > {local.scratch}/ray/ray_current_cluster"
    )
    assert planted.code == 0, planted.output
    words = ("train", "ards", "--plugin", paced.__file__, "--data", ards_data)
    run = local.start(*words, "--workers", 2, "--name", "victim", *LONG, PACED)
    try:
        wait_for(lambda: local.has_trained("victim") or run.poll() is not None, 450, "the first steps")
        assert run.poll() is None, run.output.read_text()

        # Files: nothing of the session is reached, though Ray has made it writable for everybody
        (session,) = local.scratch.glob("*/r/session_2*")
        attempts = (
            f"ls {session.parent}",
            f"cat {session}/logs/gcs_server.out",
            f"mkdir -p {session}/runtime_resources/working_dir_files/job",
            # what Ray writes there every few seconds would go through the link into the owner's file
            f"ln -sfn {local.home}/private {session}/logs/debug_state.txt",
            f"mv {session.parents[1]} {local.scratch}/mine",
        )
        for attempt in attempts:
            outcome = as_other_user(attempt)
            assert outcome.denied, f"{attempt}: {outcome}"

        # Ports: loopback only, no metrics, no store, and no call without the token
        ports = listening(run)
        unguarded = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the attack does work
        assert {address for address, _ in ports} == {"127.0.0.1"}, ports
        assert "ray::Membership" in {name.split(".")[0] for name in ports.values()}, ports
        attack = subprocess.run(
            [sys.executable, "-c", STORE_ATTACK, *map(str, (NOBODY, unguarded.port, *(port for _, port in ports)))],
            env={"PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert attack.returncode == 0, attack.stdout
        answers = [line.split() for line in attack.stdout.splitlines() if line[:1].isdigit()]
        assert [int(port) for port, store, _ in answers if store == "STORE"] == [unguarded.port]
        assert unguarded.get("planted") == b"by a stranger"
        codes = {int(port): code for port, _, code in answers}
        assert "OK" not in codes.values(), codes
        membership = [port for (_, port), name in ports.items() if name.startswith("ray::Membership")]
        assert {codes[port] for port in membership} == {"UNAUTHENTICATED"}, codes
    finally:
        if run.poll() is None:
            terminate(run)
    assert json.loads((local.home / "runs" / "victim" / "run.json").read_text())["status"] == "KILLED"
    assert local.statuses() == {"victim": "KILLED"}
    assert [path.name for path in local.scratch.iterdir()] == ["ray"], "Ray's directory was not removed"


def sigterm_while_starting(local: Local, ards_data: Path, name: str, begun: Any) -> None:
    run = local.start("train", "ards", "--data", ards_data, "--workers", "1:1", "--name", name, *LONG)
    wait_for(lambda: begun() or run.poll() is not None, 300, "Ray to start")
    terminate(run)
    record = local.home / "runs" / name / "run.json"
    if record.is_file():
        assert json.loads(record.read_text())["status"] == "KILLED"
    assert local.statuses().get(name) == ("KILLED" if record.is_file() else None)
    assert list(local.scratch.iterdir()) == []


@pytest.mark.timeout(900)
def test_sigterm_while_ray_starts(local: Local, ards_data: Path) -> None:
    """At its beginning, when no process runs yet, just before the driver connects, and when the run has been created:
    Ray starts while the input is still checked."""
    record = local.home / "runs" / "created" / "run.json"
    sigterm_while_starting(local, ards_data, "early", lambda: list(local.scratch.glob("*/r")))
    sigterm_while_starting(local, ards_data, "late", lambda: list(local.scratch.glob("*/r/session_2*/sockets/raylet")))
    sigterm_while_starting(local, ards_data, "created", record.is_file)
    assert record.is_file()


@pytest.mark.timeout(900)
def test_sigterm_to_a_search(local: Local, ards_data: Path) -> None:
    search = local.start(
        "tune", "ards", "--data", ards_data, "--trials", 4, "--scheduler", "fifo", "--search", "random",
        "--space", "optim.lr=loguniform(1e-4,1e-2)", "--name", "search", *LONG,
    )  # fmt: skip
    trials = [f"search/trials/{number:03d}" for number in (0, 1)]
    wait_for(lambda: all(map(local.has_trained, trials)) or search.poll() is not None, 450, "two trials")
    terminate(search)
    assert local.statuses() == dict.fromkeys(("search", "search-000", "search-001"), "KILLED")
    for run in ("search", *trials):
        assert json.loads((local.home / "runs" / run / "run.json").read_text())["status"] == "KILLED"
