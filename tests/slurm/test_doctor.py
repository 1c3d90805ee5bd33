"""raylab doctor on real Slurm: all well, and things broken on purpose."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def doctor(testbed, tmp_path):
    """Run the command with what a user's own sites.toml says; (exit code, its findings, what was printed)."""

    def run(sites: str = "", *words: str, home: Path | None = None, **environment: str):
        (tmp_path / "sites.toml").write_text(f"[testbed]\n{sites}")
        out = tmp_path / "doctor.json"
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "doctor", "--site", "testbed", "--json", str(out), *words],
            cwd=ROOT, capture_output=True, text=True, timeout=200,
            env={**testbed.environment, "RAYLAB_HOME": str(home or testbed.shared / "doctor"),
                 "RAYLAB_SITES": str(tmp_path / "sites.toml"), **environment},
        )  # fmt: skip
        assert out.exists(), done.stderr
        return done.returncode, json.loads(out.read_text())["findings"], done.stdout

    yield run
    testbed.wait_until_idle()  # the next test expects its checks on n1 and n2


def bad(findings) -> str:
    return "\n".join(f"{one['what']}: {one['do']}" for one in findings if not one["ok"])


def test_on_the_test_cluster_all_is_well(doctor, testbed):
    code, findings, printed = doctor()
    assert (code, bad(findings)) == (0, "")
    for said in (
        "ok  n1, n2: Python and packages are the same as on the login node",
        "ok  n1, n2: shared storage: files of the login node are visible here",
        "ok  n1, n2: shared storage: file locks of the login node work here",
        "ok  n1, n2: Ray reads its token from a private file",
        "ok  n1: traffic to n2 goes through eth0 at",
        "ok  n1, n2: Slurm allocated 1 CPU(s)",
        "ok  files of n1, n2 are visible on the login node",
        "ok  n1, n2: clock within 5 s",
        "Slurm allocated 1 GPU(s)",
        "checks passed",
    ):
        assert said in printed
    assert list((testbed.shared / "doctor/clusters").iterdir()) == []


def test_a_scratch_path_over_the_socket_limit(doctor):
    code, findings, _ = doctor('scratch = "/tmp/a-place-whose-name-is-too-long"')
    assert code == 1
    assert "is too long" in bad(findings) and "107 bytes" in bad(findings) and "/tmp" in bad(findings)


def test_a_home_that_the_nodes_do_not_share(doctor, tmp_path):
    """Below /tmp, of which every node has its own."""
    code, findings, _ = doctor(home=tmp_path / "home")
    assert code == 1
    assert f"n1, n2: files of the login node in {tmp_path}/home are not visible here" in bad(findings)
    assert "export RAYLAB_HOME=" in bad(findings)


def test_a_wrong_interface_and_a_wrong_partition(doctor):
    code, findings, _ = doctor('interface = "ib0"\nnodes.gpu.partition = "gpus"')
    assert code == 1
    assert "n1, n2: this node has no network interface 'ib0' (it has: lo, eth0): correct `interface`" in bad(findings)
    assert "Slurm does not know the partition 'gpus'" in bad(findings)
    assert "invalid partition specified: gpus" in bad(findings)


def test_a_full_queue_ends_after_the_wait_with_slurms_reason(doctor, testbed):
    blocker = testbed.submit("--nodes=3 --exclusive --time=5", "sleep 300")
    try:
        testbed.wait_for_state(blocker, "RUNNING")
        code, findings, printed = doctor("", "--wait", "3")
    finally:
        testbed.run(f"scancel {blocker}")
    assert code == 1
    assert "no node of type cpu within 3 s:" in bad(findings) and "--wait 30" in bad(findings)
    assert "ok  Slurm accepts jobs of type cpu" in printed


def test_a_controller_that_is_away(doctor, testbed):
    testbed.verb("kill-controller")
    try:
        code, findings, _ = doctor()
    finally:
        testbed.verb("start-controller")
    assert code == 1 and "Slurm does not answer" in bad(findings)


def test_a_tracking_server_that_no_node_reaches(doctor):
    code, findings, _ = doctor("", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 1
    assert "n1, n2: nothing answers at http://127.0.0.1:9" in bad(findings)


def test_a_new_site_of_the_test_cluster(testbed, tmp_path):
    """What Slurm says becomes a section that lacks nothing but the shared directory; it is written once."""
    own = tmp_path / "sites.toml"
    own.write_text("[mine]  # kept\n")

    def create() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", "site", "new", "ours"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
            env={**testbed.environment, "RAYLAB_SITES": str(own)},
        )  # fmt: skip

    done = create()
    assert done.returncode == 0, done.stderr
    assert "fill in `shared` there: a directory" in done.stdout
    text = own.read_text()
    written = tomllib.loads(text)["ours"]
    assert text.startswith("[mine]  # kept\n\n") and written.pop("shared").startswith("<fill in:")
    gpu = {"cpus": 2, "memory_mb": 4000, "gpus": 1, "gpu_type": "fake", "max": 6}
    assert written == {"partition": "batch", "time": "02:00:00", "nodes": {"gpu": gpu}}
    again = create()
    assert again.returncode == 2 and "already has a section [ours]" in again.stderr and own.read_text() == text
