"""`ray job submit` against a cluster that asks for a token."""

import json
import subprocess
from pathlib import Path

from tests.ray.conftest import BIN, ROOT, Lab


def submit(lab: Lab, *words: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [f"{BIN}/ray", "job", "submit", "--address", f"http://127.0.0.1:{lab.cluster.dashboard_port}"]
    command += ["--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": {"RAYLAB_HOME": str(lab.home)}})]
    command += ["--", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env={**lab.environment, **environment}, capture_output=True, text=True, timeout=280
    )


def test_a_job_trains_on_the_cluster(lab: Lab, ards_data: Path) -> None:
    options = ("--smoke", "--workers", 2, "--name", "submitted")
    done = submit(lab, "python", "-m", "jobs.train", "ards", "--data", ards_data, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished submitted" in done.stdout
    assert [run.info.status for run in lab.mlflow_runs() if run.info.run_name == "submitted"] == ["FINISHED"]


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
