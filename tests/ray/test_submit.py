"""`ray job submit` against a cluster that asks for a token. One that has it trains in test_train.py."""

from pathlib import Path

import pytest

from tests.others import as_other_user
from tests.ray.conftest import ROOT, Lab


@pytest.fixture(scope="module")
def submitted(lab: Lab) -> None:
    """A job has run, for which Ray has unpacked the working directory."""
    job = lab.submit("true")
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output


def test_another_user_cannot_put_his_code_into_a_job(lab: Lab, submitted: None) -> None:
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


@pytest.mark.fault(24)
def test_without_the_token_it_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    refused = lab.submit("true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert "token" in output.lower()


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    """About 2 MB: no data, environment, caches, nor documentation. Packed by Ray's own code."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv"])
    assert package.stat().st_size < 3_000_000
