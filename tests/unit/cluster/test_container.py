"""The recipe of the image as text, and what is rendered from it: none is built here."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from cluster import client, image, jobscript
from cluster.container import build, recipe
from raylab.errors import RaylabError, UsageError

ROOT = Path(__file__).parents[3]
WHERE = ROOT / "cluster" / "container"
DOCKER, APPTAINER = (WHERE / "Dockerfile").read_text(), (WHERE / "raylab.def").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
SMALL = """\
ARG BASE=a:1
FROM ${BASE}
ENV X="two words" \\
    # a comment
    Y=1
WORKDIR /opt/it
COPY code code
RUN --mount=type=secret,id=pip false && \\
    true
USER me
ENTRYPOINT ["init", "--"]
CMD ["it", "two words"]
"""


def section(name: str, text: str = APPTAINER) -> str:
    return re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", text, re.MULTILINE | re.DOTALL)[1]


def test_apptainers_definition_is_rendered_from_the_dockerfile():
    expected = recipe.definition(recipe.parse(DOCKER))
    assert expected == APPTAINER, "python -m cluster.container.recipe > cluster/container/raylab.def"


def test_what_each_instruction_becomes():
    text = recipe.definition(recipe.parse(SMALL))
    assert "Bootstrap: docker\nFrom: {{ BASE }}\n" in text and section("arguments", text).strip() == "BASE=a:1"
    assert section("files", text).split() == ["code", "/opt/it/code"]
    assert section("environment", text).splitlines()[:2] == ["    export X='two words'", "    export Y=1"]


@pytest.mark.parametrize(("last", "code"), [("false && true", 1), ("true && true", 0)])
def test_a_step_that_fails_ends_the_build(last, code, tmp_path):
    """`set -e` overlooks a command that fails before `&&`."""
    small = recipe.parse(f"FROM a\nENV X='a b'\nWORKDIR {tmp_path}/new\nRUN {last}\nRUN echo $X > end\n")
    done = subprocess.run(["sh", "-c", section("post", recipe.definition(small))])
    assert done.returncode == code
    assert (tmp_path / "new" / "end").exists() == (code == 0)


def test_the_scripts_of_an_image_run_its_entry_point_in_its_environment(tmp_path):
    parsed = recipe.parse('FROM a\nENV X="two words"\nENTRYPOINT ["env", "Y=1"]\nCMD ["printenv", "X"]\n')
    files = recipe.runtime_files(parsed)
    assert list(files) == ["/.singularity.d/env/90-environment.sh", "/.singularity.d/runscript"]
    environment, script = (tmp_path / Path(path).name for path in files)
    for path, text in zip((environment, script), files.values(), strict=True):
        path.write_text(text)

    def output(*words: str) -> str:
        line = f". {environment}; sh {script} {' '.join(words)}"
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True).stdout

    assert output() == "two words\n"
    assert output("printenv", "Y") == "1\n"


def test_an_instruction_without_a_counterpart_is_refused():
    with pytest.raises(UsageError, match=r"'VOLUME /data' cannot be rendered"):
        recipe.parse("FROM a\nVOLUME /data\n")
    with pytest.raises(UsageError, match=r"'COPY a b c/' cannot be rendered"):
        recipe.parse("FROM a\nCOPY a b c/\n")


def test_the_base_is_an_argument_and_has_a_python_that_the_project_allows():
    parsed = recipe.parse(DOCKER)
    assert parsed.base == "${BASE}"
    low, high = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim-\w+", parsed.arguments["BASE"])[1])
    assert int(low) <= minor < int(high)


def test_every_package_is_of_the_lock_with_its_hash():
    steps = recipe.parse(DOCKER).post
    installs = [step for step in steps if "pip install" in step]
    assert len(installs) == 2
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert "--no-deps" in installs[1] and "--no-index" in installs[1], "our own package brings nothing with it"


def test_all_of_ours_is_in_it_and_nothing_else_of_the_checkout():
    files = dict(recipe.parse(DOCKER).files)
    assert sorted(files) == sorted([*PACKAGES, "pyproject.toml", "requirements.lock"])
    assert all((ROOT / path).exists() for path in files)
    assert files["requirements.lock"] == str(image.LOCK), "where nodes look for it"


def test_what_docker_is_sent_is_what_it_copies():
    lines = (WHERE / "Dockerfile.dockerignore").read_text().split()
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(dict(recipe.parse(DOCKER).files))


def test_the_init_that_reaps_is_the_entrypoint_which_steps_run():
    """`apptainer exec` would go past it."""
    assert recipe.parse(DOCKER).entrypoint == ["/usr/bin/tini", "-s", "--"]
    assert section("runscript").rstrip().endswith('exec /usr/bin/tini -s -- "$@"')
    assert "apptainer run " in jobscript.CONTAINER and "apptainer exec" not in jobscript.CONTAINER


@pytest.mark.parametrize("text", [DOCKER, APPTAINER], ids=["Dockerfile", "raylab.def"])
def test_no_address_no_secret_and_no_user_packages(text):
    assert not re.search(r"https?://|index-url|trusted-host", text)
    assert not re.search(r"(?i)token|password", text)
    assert "PYTHONNOUSERSITE=1" in text


def test_docker_does_not_run_as_root():
    assert re.findall(r"^USER (\S+)$", DOCKER, re.MULTILINE)[-1] not in ("root", "0")


# --- building ---


def test_a_build_without_its_programs_names_their_packages_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="apt-get install buildah squashfs-tools mmdebstrap"):
        build.build(tmp_path / "raylab.sqsh")
    with pytest.raises(UsageError, match=r"apt-get install buildah squashfs-tools$"):
        build.build(tmp_path / "raylab.sqsh", base="a:1")
    assert list(tmp_path.iterdir()) == []


def test_a_step_of_a_build_that_fails_shows_its_last_lines_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    for program, text in {"buildah": "echo no such package; exit 1", "mksquashfs": "exit 0"}.items():
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    with pytest.raises(RaylabError, match=r"(?s)buildah failed.*no such package"):
        build.build(tmp_path / "raylab.sqsh", base="a:1")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_pips_configuration_is_a_secret_of_the_build_and_the_directories_it_names_are_mounted(tmp_path, monkeypatch):
    index, wheels = tmp_path / "index", tmp_path / "wheels"
    (index / "simple").mkdir(parents=True)
    wheels.mkdir()
    config = tmp_path / "own.conf"
    config.write_text(
        f"[global]\nextra-index-url = file://{index}/simple\n[install]\nfind-links = {wheels} /not/there\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_TIMEOUT", "77")
    words = build._build_words("image", "base", build._pip_settings(), tmp_path)
    secret = tmp_path / "pip.conf"
    assert f"--secret=id=pip,src={secret}" in words and secret.stat().st_mode & 0o777 == 0o600
    lines = secret.read_text().splitlines()
    assert f"extra-index-url = file://{index}/simple" in lines and "timeout = 77" in lines
    mounts = [word for word in words if word.startswith("--volume")]
    assert f"--volume={index}:{index}:ro" in mounts and f"--volume={wheels}:{wheels}:ro" in mounts
    assert not any("/not/there" in word for word in mounts)


# --- whether an image fits the code ---

FAKE = '#!/bin/sh\ntest "$*" = "exec --cleanenv --containall IMAGE cat /opt/raylab/requirements.lock" && cat LOCK\n'


@pytest.fixture
def imaged(site, make_spec, tmp_path, monkeypatch):
    """(the specification of a cluster with an image, its code's lock, the lock in the image)"""
    (tmp_path / "bin").mkdir()
    file, code = tmp_path / "raylab.sqsh", tmp_path / "code"
    code.mkdir()
    file.write_bytes(b"an image")
    inside = tmp_path / "inside.lock"
    (tmp_path / "bin" / "apptainer").write_text(FAKE.replace("IMAGE", str(file)).replace("LOCK", str(inside)))
    (tmp_path / "bin" / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return make_spec(site=site.model_copy(update={"image": str(file)}), code=code), code / "requirements.lock", inside


def test_an_image_of_another_lock_is_refused_before_anything_is_submitted(imaged, slurm, tmp_path):
    spec, wanted, inside = imaged
    wanted.write_text("a==1\n")
    inside.write_text("a==2\n")
    with pytest.raises(UsageError, match=r"(?s)was built from another requirements.lock \(\w{12}\).*make image"):
        client.up(spec, tmp_path, slurm)
    assert slurm.submitted == [] and not (tmp_path / "clusters" / spec.name).exists()
    inside.write_text("a==1\n")
    client.up(spec, tmp_path, slurm)
    assert len(slurm.submitted) == 1


def test_without_a_lock_on_both_sides_there_is_nothing_to_compare(imaged, slurm, tmp_path):
    spec, wanted, inside = imaged
    inside.write_text("a==2\n")
    client.up(spec, tmp_path, slurm)  # the code has none
    wanted.write_text("a==1\n")
    inside.unlink()
    assert image.read_lock(spec.site.image) is None
    image.check_lock(spec.site.image, None, wanted.parent)


def test_an_image_brings_its_own_python(site):
    assert "python" in image.node_versions(site)
    inside = image.node_versions(site.model_copy(update={"image": "/raylab.sqsh"}))
    assert "python" not in inside and "torch" in inside
