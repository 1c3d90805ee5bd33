"""`ray job submit` against a cluster that asks for a token. One that has it trains in test_train.py."""

from pathlib import Path

from tests.ray.conftest import ROOT, Lab


def test_without_the_token_it_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    refused = lab.submit("true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    output, _ = refused.communicate(timeout=120)
    assert refused.returncode != 0
    assert "token" in output.lower()


def test_what_a_job_uploads_is_small(tmp_path: Path) -> None:
    """About 1 MB: no data, environment, caches, nor documentation. Packed by Ray's own code."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git", ".venv"])
    assert package.stat().st_size < 1_500_000
