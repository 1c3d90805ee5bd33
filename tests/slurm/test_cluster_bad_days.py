"""Clusters side by side, strangers, and what cannot be: on real Slurm."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from tests.slurm.conftest import ROOT, Bed
from tests.slurm.lab import Lab
from tests.verbs import Verbs
from tests.wait import wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]

FOREIGN = (
    "setsid -f {python} -m ray.scripts.scripts start --head --port=6379 --num-cpus=1 --object-store-memory=80000000"
    " --include-dashboard=false --disable-usage-stats --temp-dir=/tmp/foreign --block >/tmp/foreign.log 2>&1 </dev/null"
)
# All of its processes name its directory; this shell does not. Some end by themselves when another is gone
END_OF_FOREIGN = "cd /proc; for p in $(grep -l '/tmp/foreig[n]' [0-9]*/cmdline); do kill -9 ${p%/cmdline}; done; true"


@pytest.fixture(scope="module")
def lab(testbed: Bed, ards_data: Path, verbs: Verbs) -> Iterator[Lab]:
    lab = Lab(testbed, ards_data, verbs, "strangers")
    yield lab
    for name in ("one", "two"):
        lab.call("cluster", "down", "--name", name)


@pytest.fixture
def foreign(lab: Lab) -> Iterator[None]:
    """Somebody's Ray on n1, on Ray's default ports."""
    lab.bed.run(FOREIGN.format(python=sys.executable), on="n1")
    yield
    lab.bed.run(END_OF_FOREIGN, on="n1")
    wait_for(lambda: "/tmp/foreign" not in lab.bed.processes("n1"), 30, "the end of the foreign Ray")


def up(lab: Lab, name: str, *more: object) -> dict[str, object]:
    return lab.run("cluster", "up", "--site", "testbed", "--name", name, "--max", 2, "--wait", *more)


@pytest.mark.fault(23)
def test_two_clusters_and_a_stranger_on_one_node(lab: Lab, foreign: None) -> None:
    """The heads of both and a foreign Ray share n1; each keeps to itself, and so does the end of one."""
    head = "\n[testbed.head]\nsbatch = ['--nodelist=n1']\ncpus = 1\nmemory_mb = 3800\n"
    sites = lab.home / "sites.toml"
    sites.write_text(sites.read_text() + head)
    up(lab, "one")
    refused = lab.call("cluster", "up", "--site", "testbed", "--name", "one")
    assert refused.returncode == 2 and "already exists" in refused.stderr
    up(lab, "two")
    assert lab.status("one")["head"]["node"] == lab.status("two")["head"]["node"] == "n1"
    for name in ("one", "two"):
        lab.run("cluster", "submit", "--name", name, "--", "python", "-c", f"open('{lab.home}/{name}', 'w')")
        assert (lab.home / name).exists()
    began = time.monotonic()
    lab.run("cluster", "down", "--name", "one")
    assert time.monotonic() - began < 30
    assert lab.status("two")["state"] == "ready"
    left = lab.bed.processes("n1")
    assert "foreign" in left and "clusters/one" not in left
    assert lab.call("cluster", "down", "--name", "one").returncode == 2, "it is gone already"


@pytest.mark.fault(24)
def test_files_are_private_and_a_client_without_the_token_is_refused(lab: Lab, tmp_path: Path) -> None:
    directory = lab.home / "clusters" / "two"
    assert directory.stat().st_mode & 0o077 == 0
    for path in [p for p in directory.rglob("*") if p.is_file()]:
        assert path.stat().st_mode & 0o077 == 0, path
    ports = lab.run("cluster", "tunnel", "--name", "two")["ports"]
    (tmp_path / "token").write_text("0" * 64)
    environment = {**lab.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    address = f"http://127.0.0.1:{ports['dashboard']}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "list", "--address", address]
    began = time.monotonic()
    refused = subprocess.run(ray, env=environment, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0 and "token" in (refused.stdout + refused.stderr).lower()
    assert time.monotonic() - began < 10
    # and the one line of `env` is all that Ray's own command needs
    lines = lab.call("cluster", "env", "--name", "two").stdout
    done = subprocess.run(
        ["bash", "-c", f"{lines}\n{sys.executable} -m ray.scripts.scripts job list"],
        env=lab.environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_heads_mlflow_is_its_owners_through_the_relay_too(lab: Lab) -> None:
    told = lab.run("cluster", "tunnel", "--name", "two")
    uri = f"http://127.0.0.1:{told['ports']['mlflow']}"

    def status() -> int | None:
        try:
            return requests.get(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", timeout=10).status_code
        except requests.RequestException:
            return None

    wait_for(lambda: status() == 401, 240, "MLflow's refusal")  # it takes longer than Ray to come up
    link = urlsplit(told["mlflow"])
    entrance = f"{uri}/?{link.query}"
    browser = requests.get(entrance, headers={"Host": link.netloc}, timeout=60, allow_redirects=False)
    assert browser.status_code == 303 and "SameSite=Strict" in browser.headers["Set-Cookie"]
    # MLflow's own command, and ours, with the one line of `env`; runs remember the home
    lines = lab.call("cluster", "env", "--name", "two").stdout
    assert (lab.home / "mlflow" / "token").read_text() not in lines
    code = "from tracking import runs; from pathlib import Path; import os; h = Path(os.environ['RAYLAB_HOME'])"
    ways = f"{code}; print(runs.address(h), runs.reach(runs.address(h)))"
    words = f'{sys.executable} -m mlflow experiments search && {sys.executable} -c "{ways}"'
    shell = ["bash", "-c", f"{lines}\n{words}"]
    done = subprocess.run(shell, cwd=ROOT, env=lab.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Default" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == f"sqlite:///{lab.home}/mlflow/mlflow.db {uri}"
    # when the relay has ended, another listener on its port gets nothing
    lab.run("cluster", "tunnel", "--name", "two", "--stop")
    with socket.create_server(("127.0.0.1", told["ports"]["mlflow"])) as other:
        other.settimeout(60)
        asked = subprocess.Popen(shell, cwd=ROOT, env=lab.environment, stderr=subprocess.PIPE, text=True)
        with other.accept()[0] as connection:
            heard = connection.recv(65536)
        _, errors = asked.communicate(timeout=120)
    assert asked.returncode != 0 and "nothing answers" in errors, errors  # this listener hangs up
    assert heard.startswith(b"HEAD / ") and b"Authorization" not in heard


def test_a_node_with_another_python_is_said(lab: Lab) -> None:
    path = lab.home / "clusters" / "two" / "cluster.json"
    asked = json.loads(path.read_text())
    path.write_text(json.dumps({**asked, "versions": {**asked["versions"], "torch": "0.1"}}))
    words = ("train", "ards", "--data", lab.data, "--smoke", "--workers", 1, "--name", "nowhere")
    lab.run("cluster", "submit", "--name", "two", "--detach", "--", "python", "-m", "jobs.cli", *words)
    problems = wait_for(lambda: lab.status("two")["problems"], 120, "a problem")
    assert "instead of 0.1" in problems[0]["text"]
    lab.run("cluster", "down", "--name", "two")
    wait_for(lambda: "clusters/two" not in lab.bed.processes("n1"), 30, "the end of its processes")


@pytest.mark.parametrize(
    ("words", "sites", "said"),
    [
        (("--site", "testbad"), "", "testbed"),
        (("--site", "testbed", "--node-type", "big"), "", "use one of"),
        (("--site", "testbed", "--time", "00:01:00"), "", "too short"),
        (("--site", "testbed"), "partition = 'fast'", "invalid partition"),
        (("--site", "testbed"), "scratch = '/tmp/" + "x" * 60 + "'", "too long"),
        (("--site", "testbed"), "partitoin = 'batch'", "partition"),
        (("--site", "testbed"), "[testbed.head]\ncpus = 1\nmemory_mb = 900000", "smaller node type"),
    ],
    ids=["site", "node type", "time", "partition", "scratch", "key", "limits"],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(lab: Lab, words: tuple[str, ...], sites: str, said: str) -> None:
    (lab.home / "sites.toml").write_text(f"[testbed]\n{sites}\n")
    refused = lab.call("cluster", "up", *words, "--name", "never")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert said in refused.stderr
    assert not (lab.home / "clusters" / "never").exists()
    assert "raylab-never" not in lab.bed.run("squeue --noheader --format=%j")


def test_one_allocation_that_stays(lab: Lab) -> None:
    """--static: no autoscaler, the nodes of one job."""
    # the first node holds the head as well
    (lab.home / "sites.toml").write_text("[testbed.nodes.whole]\ncpus = 2\nmemory_mb = 7000\n")
    lab.run("cluster", "up", "--site", "testbed", "--name", "one", "--static", 2, "--node-type", "whole", "--wait")
    words = ("train", "ards", "--data", lab.data, "--smoke", "--workers", 2, "--name", "static")
    lab.run("cluster", "submit", "--name", "one", "--", "python", "-m", "jobs.cli", *words)
    assert lab.groups("static")[-1]["workers"] == 2
    assert len(lab.status("one")["jobs"]) == 1
    lab.run("cluster", "down", "--name", "one")
    assert not lab.bed.run("squeue --noheader")
    assert os.listdir(lab.home / "clusters" / "one")  # its logs stay
