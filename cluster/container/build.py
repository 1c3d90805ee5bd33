"""Builds the image of the Dockerfile as one file, without a daemon: buildah, then mksquashfs.

    python -m cluster.container.build [--base IMAGE] FILE

Apptainer runs the file as it runs its own (SIF), whose contents are the same kind of file system. Without --base, the
base is a minimal Debian that mmdebstrap makes from the apt sources of this machine. pip's configuration of this machine
is used while packages are installed. Neither is left in the image.
"""

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.container import recipe
from raylab.errors import RaylabError, UsageError
from raylab.files import atomic_write

ROOT = Path(__file__).parents[2]
PROGRAMS = {"buildah": "buildah", "mksquashfs": "squashfs-tools"}  # and their Debian packages
BASE_PACKAGES = "python3,python3-venv,tini"
UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
# gzip, Apptainer's own choice, takes several times as long to read, and every import reads
COMPRESSION = ("-comp", "zstd", "-Xcompression-level", "6")
SQUASH = """\
set -eu
container=$(buildah from --pull-never "$1")
trap 'buildah rm "$container" >/dev/null' EXIT
shift
mksquashfs "$(buildah mount "$container")" "$@"
"""


def build(file: Path, base: str = "") -> str:
    """Write the image `file`; returns its SHA-256. `base`: an image with Python 3, else one is made.

    Raises UsageError if a program is missing, and RaylabError with the last lines of the step that failed.
    """
    programs = PROGRAMS | ({} if base else {"mmdebstrap": "mmdebstrap"})
    if absent := [package for program, package in programs.items() if shutil.which(program) is None]:
        raise UsageError("programs that build an image are missing", do=f"apt-get install {' '.join(absent)}")
    with tempfile.TemporaryDirectory(prefix="raylab-image-") as name:
        work, made = Path(name), []
        try:
            if not base:
                print("making a minimal Debian", flush=True)
                made.append(base := _make_base(work))
            made.insert(0, image := f"localhost/{work.name}")
            print("installing the packages of requirements.lock: this takes minutes", flush=True)
            _run("buildah", *_build_words(image, base, work))
            print("squashing", flush=True)
            with atomic_write(file) as beside:
                _squash(image, beside, work)
                with beside.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256").hexdigest()
        finally:
            if made:
                subprocess.run(["buildah", "rmi", *made], capture_output=True)
    return digest


def _make_base(work: Path) -> str:
    """The name of a new image: a minimal Debian of this machine's release, with Python and tini."""
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        raise UsageError(f"{release['ID']} is not Debian, so no base can be made", do="name one: make image BASE=IMAGE")
    sources = [*Path("/etc/apt").glob("sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.[ls][io]*"))]
    archive = work / "base.tar"
    options = ["--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}"]
    options += [f"--dpkgopt=path-exclude={path}" for path in UNUSED]
    options += ['--customize-hook=rm -f "$1"/etc/apt/sources.list "$1"/etc/apt/sources.list.d/*']
    _run("mmdebstrap", *options, release["VERSION_CODENAME"], str(archive), *map(str, sources))
    image = f"localhost/{work.name}-base"
    (work / "Dockerfile").write_text(f"FROM scratch\nADD {archive.name} /\n")
    _run("buildah", "bud", "--tag", image, str(work))
    archive.unlink()
    return image


def _build_words(image: str, base: str, work: Path) -> list[str]:
    """The words of buildah, with pip's configuration as a secret and the local directories that it names."""
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", config, re.MULTILINE))
    secret = work / "pip.conf"
    secret.touch(mode=0o600)
    secret.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""]))
    words = {word for value in settings.values() for word in value.split()}
    # an index refers to files beside its own directory
    places = {str(Path(word.removeprefix("file://")).parent) if word.startswith("file://") else word for word in words}
    return [
        "bud", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={base}", f"--secret=id=pip,src={secret}",
        *[f"--volume={path}:{path}:ro" for path in sorted(places) if path.startswith("/") and Path(path).exists()],
        f"--ignorefile={recipe.DOCKERFILE}.dockerignore", f"--file={recipe.DOCKERFILE}", f"--tag={image}", str(ROOT),
    ]  # fmt: skip


def _squash(image: str, file: Path, work: Path) -> None:
    """Write the file system of `image` to `file`, with the scripts that `apptainer run` needs."""
    lines = ["/.singularity.d d 755 0 0", "/.singularity.d/env d 755 0 0"]
    for path, text in recipe.runtime_files(recipe.parse(recipe.DOCKERFILE.read_text())).items():
        source = work / Path(path).name
        source.write_text(text)
        lines.append(f"{path} f 755 0 0 cat {shlex.quote(str(source))}")
    additions = work / "additions"
    additions.write_text("\n".join([*lines, ""]))
    words = ["sh", "-c", SQUASH, "raylab", image, str(file), *COMPRESSION]
    words += ["-noappend", "-no-progress", "-pf", str(additions)]
    _run(*(words if os.getuid() == 0 else ["buildah", "unshare", *words]))


def _run(*words: str) -> None:
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        raise RaylabError(f"{words[0]} failed", "\n".join(done.stdout.splitlines()[-15:]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.container.build", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--base", default="", help="an image with Python 3.11 to 3.13 (default: made with mmdebstrap)")
    args = parser.parse_args()
    try:
        digest = build(args.file, args.base)
    except RaylabError as error:
        print(f"raylab: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB, sha256:{digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
