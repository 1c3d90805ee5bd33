"""The image on a testbed: what a job script makes of it, and a cluster that runs in it. `make test-image` names one."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import image, jobscript
from cluster.job_tag import JobTag
from cluster.sites import NodeType, Site
from raylab.errors import UsageError
from tests.slurm.conftest import ROOT, Bed
from tests.slurm.lab import RECIPE, Lab
from tests.verbs import Verbs
from tests.wait import wait_for

IMAGE = os.environ.get("RAYLAB_IMAGE", "")
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not IMAGE, reason="RAYLAB_IMAGE names no image: make image, then make test-image"),
]

# Runs in the image. It writes what it finds, and then the signals that it gets, until TERM.
PROBE = """
import json, os, signal, subprocess, sys
from pathlib import Path
from cluster.slurm import Slurm
from tests.wait import wait_for

def refusal(path):
    try:
        Path(path).touch()
    except OSError as error:
        return error.strerror

signals = []
def note(number, frame):
    signals.append(signal.Signals(number).name)
    write()
def write():
    beside = Path(sys.argv[1]).with_suffix(".new")
    beside.write_text(json.dumps({**facts, "signals": signals}))
    beside.replace(sys.argv[1])

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
# an orphan that ends: its zombie would stay in /proc if nothing reaped it
orphan = subprocess.run(["sh", "-c", "sleep 0.2 >/dev/null & echo $!"], capture_output=True, text=True).stdout.strip()
parent = Path(f"/proc/{orphan}/stat").read_text().rsplit(")", 1)[1].split()[1]
wait_for(lambda: not Path(f"/proc/{orphan}").exists(), 20, "the end of an orphan")
facts = {
    "first": Path("/proc/1/cmdline").read_text().split("\\0")[0],
    "orphans_parent": parent,
    "refusals": {path: refusal(path) for path in ("/new", "/opt/raylab/new", "/usr/new", "/etc/new")},
    "tmp": os.listdir("/tmp"),
    "python": sys.executable,
    "environment": dict(os.environ),
    "jobs": [job.id for job in Slurm().jobs()],
}
refusal("/tmp/of-the-image")
write()
while "SIGTERM" not in signals:
    signal.pause()
"""


def submit(bed: Bed, name: str, words: list[str]) -> str:
    """Submit a job script of a site with the image that runs `words` on n1; the job's id."""
    node = NodeType(cpus=1, memory_mb=1000, sbatch=("--nodelist=n1",))
    site = Site(name="testbed", partition="batch", lead_seconds=10, image=IMAGE, nodes={"cpu": node})
    script = bed.shared / f"{name}.sbatch"
    script.write_text(
        jobscript.script(
            site=site,
            node=node,
            tag=JobTag("image", 0, "head"),
            job_name=name,
            time="00:10:00",
            log=bed.shared,
            environment={"RAYLAB_HOME": str(bed.shared), "PYTHONPATH": str(ROOT)},
            command=words,
            requeue=False,
            proxy=ROOT / "cluster" / "slurm_proxy.py",
        )
    )
    sbatch = [f"{bed.root}/bin/sbatch", "--parsable", str(script)]
    sent = subprocess.run(sbatch, env={**bed.environment, "SECRET": "x"}, capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    return sent.stdout.strip()


def test_a_step_in_the_image_is_read_only_private_reaped_signalled_and_reaches_slurm(testbed: Bed) -> None:
    note = testbed.shared / "found.json"
    testbed.run("touch /tmp/of-the-node", "n1")
    before = testbed.run("ls -A /tmp", "n1")
    job = submit(testbed, "probe", ["python", "-c", PROBE, str(note)])

    def said() -> str:
        return "\n".join(path.read_text() for path in testbed.shared.glob("probe-*.out"))

    wait_for(lambda: note.exists() or (testbed.job_state(job) != "RUNNING" and said()), 120, "the image's process")
    assert note.exists(), said()
    found: dict[str, Any] = json.loads(note.read_text())
    assert found["first"] == "/usr/bin/tini" and found["orphans_parent"] == "1"
    assert set(found["refusals"].values()) == {"Read-only file system"}
    assert "of-the-node" not in found["tmp"]
    assert "of-the-image" not in testbed.run("ls -A /tmp", "n1").split()
    assert found["python"] == "/opt/raylab/venv/bin/python"
    assert "SECRET" not in found["environment"] and found["environment"]["SLURM_JOB_ID"] == job
    assert job in found["jobs"]
    for name in ("USR1", "TERM"):
        testbed.run(f"scancel --signal={name} {job}")
        wait_for(lambda: f"SIG{name}" in json.loads(note.read_text())["signals"], 30, name)  # noqa: B023
    testbed.wait_for_state(job, "COMPLETED")
    assert testbed.run("ls -A /tmp", "n1") == before, "nothing of the step stays on the node"


def test_a_cancelled_step_leaves_no_process_and_no_mount(testbed: Bed) -> None:
    started = testbed.shared / "started"
    job = submit(testbed, "stubborn", ["sh", "-c", f"trap '' TERM; touch {started}; sleep 3333 & wait; sleep 3333"])
    wait_for(started.exists, 120, "the image's process")
    assert "3333" in testbed.processes("n1")
    testbed.run(f"scancel {job}")
    wait_for(lambda: "3333" not in testbed.processes("n1"), 60, "the end of its processes")
    testbed.wait_until_idle()
    assert IMAGE not in subprocess.run(["losetup", "--list"], capture_output=True, text=True).stdout


def test_an_image_of_another_lock_is_refused(testbed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", testbed.environment["PATH"])
    lock = image.read_lock(IMAGE)
    assert lock == (ROOT / "requirements.lock").read_bytes()
    image.check_lock(IMAGE, lock, ROOT)
    (tmp_path / "requirements.lock").write_bytes(lock + b"more==1\n")
    with pytest.raises(UsageError, match=r"(?s)was built from another requirements.lock .*make image"):
        image.check_lock(IMAGE, lock, tmp_path)


@pytest.fixture(scope="module")
def lab(testbed: Bed, ards_data: Path, verbs: Verbs) -> Iterator[Lab]:
    """A cluster named ray whose head and workers run in the image."""
    lab = Lab(testbed, ards_data, verbs, "imaged")
    (lab.home / "sites.toml").write_text(f"[testbed]\nimage = {json.dumps(IMAGE)}\nidle_seconds = 40\n")
    lab.run("cluster", "up", "--site", "testbed", "--name", "ray", "--max", 2, "--time", "00:30:00", "--wait")
    yield lab
    lab.call("cluster", "down", "--name", "ray")


def image_tags(lab: Lab, name: str) -> list[str]:
    """The tag `raylab.image_digest` of every MLflow run whose name begins so, "" where it is absent."""
    from mlflow import MlflowClient

    assert set(lab.mlflow(name)) == {"FINISHED"}
    client = MlflowClient(f"sqlite:///{lab.home}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("raylab")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return [run.data.tags.get("raylab.image_digest", "") for run in runs if run.info.run_name.startswith(name)]


@pytest.fixture(scope="module")
def digest() -> str:
    with Path(IMAGE).open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def test_training_in_the_image_gives_the_bits_that_it_gives_outside(lab: Lab, digest: str) -> None:
    """Sent by Ray's own command."""
    words = ("ards", "--data", str(lab.data), *RECIPE, "loop.epochs=50")
    environment = {**lab.environment, **lab.run("cluster", "env", "--name", "ray")}
    ray = str(Path(sys.executable).with_name("ray"))
    line = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.train", *words]
    sent = subprocess.run(
        [*line, "--workers", "2", "--name", "trained"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stdout + sent.stderr
    expected = lab.run("train", *words, "--workers", 0, "--name", "outside")
    assert lab.result("trained")["weights_sha256"] == expected["weights_sha256"]
    assert image_tags(lab, "trained") == [digest]
    assert image_tags(lab, "outside") == [""]


def test_a_search_in_the_image(lab: Lab, digest: str) -> None:
    words = ("--data", lab.data, "--trials", 2, "--name", "search", "--smoke", "--set", "loop.epochs=4")
    lab.run("cluster", "submit", "--name", "ray", "--", "python", "-m", "jobs.cli", "tune", "ards", *words)
    trials = lab.home / "runs" / "search" / "trials"
    assert len(list(trials.glob("*/end.json"))) == 2
    assert image_tags(lab, "search") == [digest] * 3


def test_nothing_of_it_stays_as_a_zombie(lab: Lab) -> None:
    """Ray's head has ended many processes by now."""

    def zombies() -> str:
        look = "grep -ls '^State:.Z' /proc/[0-9]*/status || true"
        return "".join(lab.bed.run(look, node) for node in ("n1", "n2", "n3"))

    wait_for(lambda: not zombies(), 30, "every ended process to be reaped")


def test_the_head_gets_the_warning_of_its_limit_and_requeues_itself(lab: Lab) -> None:
    before = lab.status()["head"]
    lab.bed.run(f"scancel --signal=USR1 {before['job']}")

    def is_replaced() -> bool:
        head = lab.status()["head"]
        return head is not None and head["generation"] > before["generation"]

    wait_for(is_replaced, 240, "the head's next start")
    logs = "".join(path.read_text() for path in (lab.home / "clusters" / "ray" / "logs").glob("raylab-ray-head-*.out"))
    assert "SIGUSR1: " in logs and "requeued" in logs
