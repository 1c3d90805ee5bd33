"""What a team shares, as docs/security.md says: an MLflow with accounts, and a home that a Unix group may read."""

import grp
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import requests

from jobs.common import home, run_tracking
from raylab.errors import TrackingError, UsageError
from raylab.training.run_record import RunRecord
from tests.team import Team
from tracking import compare, report, runs
from tracking.forwarder import forward, unsent
from tracking.outbox import Outbox

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
ANNA, BEN, CARL = 64101, 64102, 64103  # Unix users: the owner, one of the group, one of nothing
ROUTES = (
    "/", "/api/2.0/mlflow/experiments/search?max_results=1", "/ajax-api/2.0/mlflow/experiments/search?max_results=1",
    "/get-artifact?run_id={run}&path=plots/a.txt", "/api/2.0/mlflow/runs/get?run_id={run}", "/metrics", "/graphql",
)  # fmt: skip


@pytest.fixture(scope="module")
def tracked(team: Team, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outbox, str]:
    """(outbox, run id) of anna's run in her experiment, which ben may read; carl has an account and no grant."""
    for name in ("anna", "ben", "carl"):
        team.add(name)
    directory = tmp_path_factory.mktemp("anna")
    (directory / "a.txt").write_text("hello")
    with team.acting("anna"):
        run_id = runs.start_run(team.uri, "ards", "first", tags={"raylab.task": "ards", "raylab.kind": "train"})
        outbox = Outbox(directory / "outbox")
        outbox.bind(team.uri, run_id)
        outbox.append({"kind": "metrics", "step": 1, "values": {"val/auroc": 0.7}})
        outbox.append({"kind": "artifact", "path": directory / "a.txt", "to": "plots"})
        forward(outbox.directory)
        experiment = runs.client(team.uri).get_experiment_by_name("ards").experiment_id
        team.client().grant_user_permission("ben", "experiment", experiment, "READ")
    return outbox, run_id


def test_a_colleague_with_read_compares_and_changes_nothing(
    team: Team, tracked: tuple[Outbox, str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    outbox, run_id = tracked
    refused = (MlflowException, requests.HTTPError)
    with team.acting("ben"):
        runs.check(team.uri)
        frame = compare.collect(team.uri, "ards")
        assert frame["run_id"].to_list() == [run_id] and frame["val/auroc"].to_list() == [0.7]
        assert compare.artifacts(team.uri, run_id, "plots", ".txt") == {"plots/a.txt": b"hello"}
        assert "first" in report.report(team.uri, "ards", tmp_path / "r.html", frame).read_text()
        with pytest.raises(TrackingError, match="does not permit this") as caught:
            runs.start_run(team.uri, "ards", "mine")
        assert "'ben'" in caught.value.why and "MLFLOW_EXPERIMENT_NAME" in caught.value.do
        monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
        facts = {"kind": "fit", "task": "fit", "data": "out", "synthetic": True, "tags": {runs.KEY: "of ben"}}
        new = run_tracking.NewRun(RunRecord(name="mine", uri=team.uri, experiment="ards", **facts), {})
        directory = home.new_run("mine", "fit")
        with (
            pytest.raises(TrackingError, match="does not permit this") as caught,
            run_tracking.open_run(directory, new),
        ):
            pytest.fail("it must not begin")
        assert "kept" not in caught.value.why and not directory.exists()
        for change in (
            lambda client: client.log_metric(run_id, "val/auroc", 0.9),
            lambda client: client.delete_run(run_id),
            lambda client: client.log_artifact(run_id, str(tmp_path / "r.html"), "plots"),
        ):
            with pytest.raises(refused, match="403"):
                change(runs.client(team.uri))
        outbox.append({"kind": "metrics", "step": 2, "values": {"val/auroc": 0.9}})
        outbox.append({"kind": "artifact", "path": outbox.directory.parent / "a.txt", "to": "again"})
        for _ in range(2):
            with pytest.raises(TrackingError, match="does not permit this"):
                forward(outbox.directory)
        assert unsent(outbox.directory) == 2, "kept for whoever may send it"
    with team.acting("anna"):
        assert forward(outbox.directory) == 2
        assert runs.client(team.uri).get_run(run_id).data.metrics["val/auroc"] == 0.9


def test_an_account_without_a_grant_and_nobody_get_nowhere(team: Team, tracked: tuple[Outbox, str]) -> None:
    _, run_id = tracked
    with team.acting("carl"):
        for what in (
            lambda: compare.collect(team.uri, "ards"),
            lambda: runs.start_run(team.uri, "ards", "mine"),
        ):
            with pytest.raises(TrackingError, match="HTTP 403"):
                what()
        assert runs.client(team.uri).search_experiments() == [], "not even its name"
        runs.start_run(team.uri, "carl's own", "mine")
    for who, password in ((None, None), ("anna", "wrong")):
        with team.acting(who, password):
            for what in (lambda: runs.check(team.uri), lambda: compare.collect(team.uri, "ards")):
                with pytest.raises(TrackingError, match="HTTP 401"):
                    what()
    for route in ROUTES:
        url = team.uri + route.format(run=run_id)
        assert requests.get(url, timeout=10).status_code in (401, 404), route
    carl = ("carl", team.passwords["carl"])
    for route in (ROUTES[3], ROUTES[4]):
        assert requests.get(team.uri + route.format(run=run_id), auth=carl, timeout=10).status_code == 403, route


# A home that a Unix group may read, by real users


# Python, its packages and this checkout may lie in root's home: in a mount namespace of its own, a process of another
# user sees them there, and nothing else of that home
KEPT = shlex.join([sys.base_prefix, sys.prefix, str(ROOT)])
VIEW = f"""
stage=$1; shift
for kept in {KEPT}; do
  mkdir -p "$stage$kept"; mount --bind "$kept" "$stage$kept"
done
mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(Path.home()))}
for kept in {KEPT}; do
  mkdir -p "$kept"; mount --bind "$stage$kept" "$kept"
done
exec "$@"
"""


@dataclass
class Place:
    """A directory that every user can reach, and the group that anna and ben are in."""

    path: Path
    group: str
    gid: int

    def run(self, user: int, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`words` as a process of `user`, in his own home directory."""
        own = self.path / str(user)
        if not own.exists():
            own.mkdir(mode=0o755)
            os.chown(own, user, user)
        groups = f"--groups={self.gid}" if user in (ANNA, BEN) else "--clear-groups"
        known = {name: os.environ[name] for name in ("PATH", "PYTHONWARNINGS") if name in os.environ}
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", groups, "--", *map(str, words)]
        return subprocess.run(
            ["unshare", "--mount", "sh", "-ec", VIEW, "sh", str(self.path / "view"), *become],
            env=known | {"HOME": str(own), "RAYLAB_HOME": str(own / "raylab"), "PYTHONPATH": str(ROOT)} | environment,
            cwd=own, umask=0o022, capture_output=True, text=True,
        )  # fmt: skip

    def raylab(self, user: int, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return self.run(user, sys.executable, "-m", "jobs.cli", *words, **environment)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if os.getuid():
        pytest.skip("needs root, to act as three Unix users")
    before = os.umask(0o022)  # a verb that another test ran in this process has set its own
    path = Path(tempfile.mkdtemp(prefix="raylab-team-", dir="/tmp"))
    path.chmod(0o755)
    group = grp.getgrgid(100)  # Debian's `users`
    made = Place(path, group.gr_name, group.gr_gid)
    try:
        tried = made.run(ANNA, sys.executable, "-c", "import jobs.cli")
        if tried.returncode:
            pytest.skip(f"another Unix user cannot run this checkout: {tried.stderr[-300:]}")
        yield made
    finally:
        shutil.rmtree(path)
        os.umask(before)


@pytest.fixture(scope="module")
def shared(place: Place, team: Team, tracked: object, ards_data: Path) -> Path:
    """The directory of anna's run, trained by her process, with the group's name and her login in a file."""
    home = place.path / str(ANNA)
    place.run(ANNA, "mkdir", "-p", home / ".config" / "raylab")
    login = home / ".config" / "raylab" / "mlflow-login.json"
    login.write_text(json.dumps({team.uri: {"username": "anna", "password": team.passwords["anna"]}}))
    login.chmod(0o600)
    shutil.copytree(ards_data, home / "data")
    for one in (login, home / "data", *(home / "data").rglob("*")):
        os.chown(one, ANNA, ANNA)
    (home / "data").chmod(0o700)
    done = place.raylab(
        ANNA, "train", "ards", "--data", home / "data", "--smoke", "--name", "first", "--set", "loop.epochs=1",
        MLFLOW_TRACKING_URI=team.uri, MLFLOW_EXPERIMENT_NAME="ards", RAYLAB_HOME_GROUP=place.group,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert team.passwords["anna"] not in done.stdout + done.stderr
    return home / "raylab" / "runs" / "first"


def look(place: Place, user: int, path: Path, how: str = "read") -> bool:
    """Whether `user` can read the file or list the directory `path`, or write to it."""
    test = {"read": "-r", "write": "-w", "enter": "-x"}[how]
    return place.run(user, "test", test, path).returncode == 0


def test_the_group_reads_what_describes_a_run_and_nothing_else(place: Place, shared: Path) -> None:
    read = [path for name in home.OPEN for path in (shared / name, *(shared / name).rglob("*")) if path.exists()]
    assert {"run.json", "model", "model.safetensors", "scores", "val-roc.png"} <= {path.name for path in read}
    for path in read:
        assert look(place, BEN, path) and not look(place, BEN, path, "write") and not look(place, CARL, path), path
    every = {path for path in shared.parents[1].rglob("*")} | set((place.path / str(ANNA) / ".config").rglob("*.json"))
    hidden = every - set(read) - {shared, shared.parent}
    assert {"checkpoints", "outbox", "target.json", "mlflow-login.json", "ledger.jsonl"} <= {p.name for p in hidden}
    for path in sorted(hidden):
        assert not look(place, BEN, path) and not look(place, CARL, path), path
    for folder in (shared.parents[1], shared.parent, shared):
        assert not look(place, BEN, folder, "write") and not look(place, CARL, folder, "enter"), folder


def test_a_member_predicts_with_the_model_and_starts_from_it(
    place: Place, shared: Path, ards_data: Path, team: Team
) -> None:
    own = place.path / str(BEN)
    own.mkdir(mode=0o755, exist_ok=True)
    shutil.copytree(ards_data, own / "data")
    for one in (own, own / "data", *(own / "data").rglob("*")):
        os.chown(one, BEN, BEN)
    words = ("predict", "ards", "--run", shared, "--data", own / "data", "--split", "val", "--out", own / "p.parquet")
    done = place.raylab(BEN, *words)
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet(own / "p.parquet").height > 0
    denied = place.raylab(BEN, "resume", shared)
    assert denied.returncode == 2 and "Traceback" not in denied.stderr and "permission denied" in denied.stderr
    words = ("train", "ards", "--data", own / "data", "--smoke", "--from", shared, "--name", "mine")
    environment = {"MLFLOW_TRACKING_URI": team.uri, "MLFLOW_EXPERIMENT_NAME": "ben", "MLFLOW_TRACKING_USERNAME": "ben"}
    environment["MLFLOW_TRACKING_PASSWORD"] = team.passwords["ben"]
    done = place.raylab(BEN, *words, "--set", "loop.epochs=1", **environment)
    assert done.returncode == 0, done.stderr
    described = json.loads((own / "raylab" / "runs" / "mine" / "run.json").read_text())
    assert described["parent_directory"] == str(shared), "where resume looks again"


def test_a_group_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(home.GROUP, "no-such-group")
    with pytest.raises(UsageError, match="no such group"):
        home.new_run("x", "ards")
    monkeypatch.setenv(home.GROUP, grp.getgrgid(os.getgid()).gr_name)
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o770)
    with pytest.raises(UsageError, match="chmod go-w"):
        home.new_run("x", "ards")
    assert not (tmp_path / "home" / "runs").exists()
