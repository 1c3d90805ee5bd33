"""`ray job submit` against a cluster that asks for a token."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.others import as_other_user
from tests.ray.conftest import BIN, ROOT, Lab


def submit(lab: Lab, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [f"{BIN}/ray", "job", "submit", "--address", f"http://127.0.0.1:{lab.cluster.dashboard_port}"]
    command += ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": {"RAYLAB_HOME": str(lab.home)}})]
    command += ["--", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**lab.environment, **environment}, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def submitted(lab: Lab, ards_data: Path) -> str:
    """What a training that was submitted as a job has printed."""
    options = ("--smoke", "--workers", 2, "--name", "submitted")
    done = submit(lab, "python", "-m", "jobs.train", "ards", "--data", ards_data, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_trains_on_the_cluster(lab: Lab, submitted: str) -> None:
    assert "finished submitted" in submitted
    assert [run.info.status for run in lab.mlflow_runs() if run.info.run_name == "submitted"] == ["FINISHED"]


def test_another_user_cannot_put_his_code_into_a_job(lab: Lab, submitted: str) -> None:
    """Ray unpacks a job's files once and runs the next job of the same files from there, in a directory that it makes
    writable for everybody: whoever reaches it exchanges them, and his code runs as the job's owner."""
    (code,) = lab.cluster.temp.glob("ray/session_2*/runtime_resources/working_dir_files/*/jobs/train.py")
    package = code.parents[1]
    for attempt in (
        f"ls {package.parent}",
        f"mv {package} {package.parent}/taken && mkdir -p {package}/jobs && echo evil > {code}",
        f"mkdir {package.parent}/_ray_pkg_of_the_next_job",
    ):
        outcome = as_other_user(attempt)
        assert outcome.denied, f"{attempt}: {outcome}"
    assert code.read_text() == (ROOT / "jobs" / "train.py").read_text()


def test_without_the_token_it_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    refused = submit(lab, "true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    """About 1 MB: no data, environment, caches, nor documentation. Packed by Ray's own code."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv"])
    assert package.stat().st_size < 1_500_000
