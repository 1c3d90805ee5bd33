"""The image of a site: its hash, and whether it was built for the code that runs in it."""

import hashlib
import subprocess
from pathlib import Path

from cluster.directory import versions
from cluster.sites import Site
from raylab.errors import UsageError

LOCK = Path("/opt/raylab/requirements.lock")  # in an image: what it was built from (container/Dockerfile)
READ_SECONDS = 60.0


def hash_image(image: str | Path) -> str:
    """`sha256:...` of the image's file. It takes minutes for a large file, so `up` computes it once."""
    with Path(image).open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def node_versions(site: Site) -> dict[str, str]:
    """The versions of this process that the site's nodes must have, too. An image brings its own Python."""
    return {name: text for name, text in versions().items() if site.image is None or name != "python"}


def read_lock(image: str) -> bytes | None:
    """The lock in the image, None if it has none or Apptainer cannot run here: the nodes check it again."""
    words = ["apptainer", "exec", "--cleanenv", "--containall", image, "cat", str(LOCK)]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=READ_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def own_lock() -> bytes | None:
    """The lock of the image in which this process runs, None if it has none."""
    return LOCK.read_bytes() if LOCK.is_file() else None


def check_lock(image: str, lock: bytes | None, code: Path) -> None:
    """Raise UsageError if `lock`, which the image was built from, is not that of the code, if both have one."""
    wanted = code / "requirements.lock"
    if lock is None or not wanted.is_file() or lock == wanted.read_bytes():
        return
    built, needed = (hashlib.sha256(content).hexdigest()[:12] for content in (lock, wanted.read_bytes()))
    raise UsageError(
        f"the image {image} was built from another requirements.lock ({built}) than that of {code} ({needed})",
        "its packages are not those that this code was tested with",
        "build it again (make image), or use the revision of raylab that it was built from",
    )
