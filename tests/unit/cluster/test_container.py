"""The container files as text: none is built here."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
WHERE = ROOT / "cluster" / "container"
DOCKER, APPTAINER = (WHERE / "Dockerfile").read_text(), (WHERE / "raylab.def").read_text()
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
    "packages"
]
BOTH = pytest.mark.parametrize("text", [DOCKER, APPTAINER], ids=["Dockerfile", "raylab.def"])


def commands(text: str) -> str:
    """Without comments, and with broken lines joined."""
    return re.sub(r"\\\n\s*", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))


def section(name: str) -> str:
    return re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)[1]


def test_both_start_from_one_python_that_the_project_allows():
    bases = re.findall(r"^(?:FROM|From:)\s+(\S+)$", DOCKER + APPTAINER, re.MULTILINE)
    assert len(bases) == 2 and len(set(bases)) == 1
    low, high = re.findall(
        r"3\.(\d+)", tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    )
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim-\w+", bases[0])[1])
    assert int(low) <= minor < int(high)


@BOTH
def test_every_package_is_of_the_lock_with_its_hash(text):
    installs = re.findall(r"pip install (.*)", commands(text))
    assert len(installs) == 2
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert "--no-deps" in installs[1] and "--no-index" in installs[1], "our own package brings nothing with it"
    assert commands(text).index("requirements.lock") < commands(text).index("pip install")


@BOTH
def test_all_of_ours_is_in_it_and_nothing_else_of_the_checkout(text):
    copied = re.findall(r"^COPY (\S+) ", DOCKER, re.MULTILINE) if text is DOCKER else section("files").split()[::2]
    assert sorted(copied) == sorted([*PACKAGES, "pyproject.toml", "requirements.lock"])
    assert all((ROOT / path).exists() for path in copied)


def test_what_docker_is_sent_is_what_it_copies():
    lines = (WHERE / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(
        re.findall(r"^COPY (\S+) ", DOCKER, re.MULTILINE)
    )


def test_the_init_that_reaps_is_the_entrypoint_of_both():
    assert re.search(r'^ENTRYPOINT \["/usr/bin/tini", "-s", "--"\]$', DOCKER, re.MULTILINE)
    assert section("runscript").split("\n")[0].strip() == 'exec /usr/bin/tini -s -- "$@"'
    for text in (DOCKER, APPTAINER):
        assert re.search(r"apt-get install .*--no-install-recommends tini", commands(text))


def test_steps_run_the_entrypoint():
    """`apptainer exec` would go past it."""
    from cluster import jobscript

    assert "apptainer run " in jobscript.CONTAINER and "apptainer exec" not in jobscript.CONTAINER


@BOTH
def test_no_address_no_secret_and_no_user_packages(text):
    assert not re.search(r"https?://|index-url|trusted-host", text)
    assert not re.search(r"(?i)token|password|secret", text)
    assert "PYTHONNOUSERSITE=1" in text


def test_docker_does_not_run_as_root():
    assert re.findall(r"^USER (\S+)$", DOCKER, re.MULTILINE)[-1] not in ("root", "0")
