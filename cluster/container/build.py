"""Builds the image of the Dockerfile as one file, without a daemon: buildah, then mksquashfs.

    python -m cluster.container.build [--base IMAGE] FILE

Apptainer runs the file as it runs its own (SIF), whose contents are the same kind of file system. Without --base, the
base is a minimal Debian that mmdebstrap makes from the apt sources of this machine. pip's configuration of this machine
is used while packages are installed. Neither is left in the image.
"""

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.container import recipe
from cluster.image import hash_image
from raylab.errors import RaylabError, UsageError
from raylab.files import atomic_write

ROOT = Path(__file__).parents[2]
PROGRAMS = {"buildah": "buildah", "mksquashfs": "squashfs-tools"}  # and their Debian packages
BASE_PACKAGES = "python3,python3-venv,tini"
UNUSED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*")
# What mmdebstrap copies from this machine
OWN = ("etc/apt/sources.list", "etc/apt/sources.list.d/*", "etc/resolv.conf", "etc/hostname")
# zstd: gzip, Apptainer's own choice, takes several times as long to read, and every import reads
SQUASH = """\
set -eu
image=$1 file=$2 additions=$3
shift 3
container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
buildah run --isolation=chroot --user=0 "$container" -- \\
  sh -c 'for path; do rmdir "$path" 2>/dev/null || [ -s "$path" ] || rm -f "$path"; done' sh "$@"
mksquashfs "$(buildah mount "$container")" "$file" \\
  -comp zstd -Xcompression-level 6 -noappend -no-progress -pf "$additions"
"""


def build(file: Path, base: str = "") -> str:
    """Write the image `file`; returns its hash. `base`: an image with Python 3, else one is made.

    Raises UsageError if a program is missing, and RaylabError with the last lines of the step that failed.
    """
    programs = PROGRAMS | ({} if base else {"mmdebstrap": "mmdebstrap"})
    if absent := [package for program, package in programs.items() if shutil.which(program) is None]:
        raise UsageError("programs that build an image are missing", do=f"apt-get install {' '.join(absent)}")
    with tempfile.TemporaryDirectory(prefix="raylab-image-") as name:
        work, settings, made = Path(name), _pip_settings(), []
        try:
            if not base:
                print("making a minimal Debian", flush=True)
                made.append(base := _make_base(work))
            made.insert(0, image := f"localhost/{work.name}")
            print("installing the packages of requirements.lock: this takes minutes", flush=True)
            _run("buildah", *_build_words(image, base, settings, work))
            print("squashing", flush=True)
            with atomic_write(file) as beside:
                _squash(image, beside, [*_pip_places(settings), "/etc/pip.conf"], work)
                digest = hash_image(beside)
        finally:
            if made:
                subprocess.run(["buildah", "rmi", *made], capture_output=True)
    return digest


def _make_base(work: Path) -> str:
    """The name of a new image: a minimal Debian of this machine's release, with Python and tini."""
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        raise UsageError(f"{release['ID']} is not Debian, so no base can be made", do="name one: make image BASE=IMAGE")
    sources = [path for name in ("*.list", "*.sources") for path in sorted(Path("/etc/apt").rglob(name))]
    archive = work / "base.tar"
    options = ["--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}"]
    options += [f"--dpkgopt=path-exclude={path}" for path in UNUSED]
    options += [f'--customize-hook=cd "$1" && rm -f {" ".join(OWN)}']
    _run("mmdebstrap", *options, release["VERSION_CODENAME"], str(archive), *map(str, sources))
    image = f"localhost/{work.name}-base"
    (work / "Dockerfile").write_text(f"FROM scratch\nADD {archive.name} /\n")
    _run("buildah", "bud", "--tag", image, str(work))
    archive.unlink()
    return image


def _pip_settings() -> dict[str, str]:
    """pip's configuration here, of files and variables: {"index-url": ...}."""
    words = [sys.executable, "-m", "pip", "config", "list"]
    config = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", config, re.MULTILINE))


def _pip_places(settings: Mapping[str, str]) -> list[str]:
    """The local files and directories that pip's configuration names; an index refers to files beside its directory."""
    words = {word for value in settings.values() for word in value.split()}
    places = {str(Path(word.removeprefix("file://")).parent) if word.startswith("file://") else word for word in words}
    return sorted(place for place in places if place.startswith("/") and Path(place).exists())


def _build_words(image: str, base: str, settings: Mapping[str, str], work: Path) -> list[str]:
    """The words of buildah, with pip's configuration as a secret and its places mounted while commands run."""
    secret = work / "pip.conf"
    secret.touch(mode=0o600)
    secret.write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in settings.items()), ""]))
    return [
        "bud", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={base}", f"--secret=id=pip,src={secret}",
        *[f"--volume={place}:{place}:ro" for place in _pip_places(settings)],
        f"--ignorefile={recipe.DOCKERFILE}.dockerignore", f"--file={recipe.DOCKERFILE}", f"--tag={image}", str(ROOT),
    ]  # fmt: skip


def _squash(image: str, file: Path, mounted: Sequence[str], work: Path) -> None:
    """Write the file system of `image` to `file`, with the scripts that `apptainer run` needs, and without the empty
    files and directories on which `mounted` was mounted."""
    lines = ["/.singularity.d d 755 0 0", "/.singularity.d/env d 755 0 0"]
    for path, text in recipe.runtime_files(recipe.parse(recipe.DOCKERFILE.read_text())).items():
        source = work / Path(path).name
        source.write_text(text)
        lines.append(f"{path} f 755 0 0 cat {shlex.quote(str(source))}")
    additions = work / "additions"
    additions.write_text("\n".join([*lines, ""]))
    words = ["sh", "-c", SQUASH, "raylab", image, str(file), str(additions), *mounted]
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
    print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB, {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
