"""A Ray that stays running between one user's commands on one machine: what `raylab warm` starts.

HOME/warm-ray-HOST.json says who keeps it (keep_ray.py), how to reach it, and what its worker processes run. A command
uses it only with the same code, packages and environment: edited code never runs in an old process. The file has Ray's
token, so only its owner can read it, and one that others could have written is refused.
"""

import hashlib
import logging
import os
import re
import socket
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from jobs.common.home import home
from raylab.documents import read_document
from raylab.errors import UsageError
from raylab.files import hash_files
from raylab.loopback import is_own_listener
from raylab.processes import StartedProcess, find_own

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
PACKAGES = ("raylab", "jobs", "tracking", "cluster")
# What differs between two shells of one user and changes nothing that a worker does; last, what raylab sets for Ray,
# and polars for its allocator in every process that imports it
OF_SHELLS = re.compile(
    r"_|(OLD)?PWD|SHLVL|TERM.*|COLORTERM|COLUMNS|LINES|PS\d|HIST.*|LS_COLORS|LESS.*|SSH_.*|TMUX.*|STY|WINDOW.*|DISPLAY"
    r"|XAUTHORITY|XDG_SESSION_.*|DBUS_.*|VSCODE_.*|MAKE.*|MFLAGS|RAYLAB_HOME"
    r"|RAY_.*|TUNE_.*|AUTOSCALER_METRIC_PORT|DASHBOARD_METRIC_PORT|TORCHINDUCTOR_CACHE_DIR|_RJEM_MALLOC_CONF"
)


class WarmRay(StartedProcess):
    """The Ray at `address`, which declares `cpus`: this process keeps it; its files are in `directory`.

    `identity`: hashes of what its processes run, by name.
    """

    address: str
    token: str
    cpus: int
    directory: str
    identity: dict[str, str]


def record_file() -> Path:
    return home() / f"warm-ray-{socket.gethostname()}.json"


def find_running() -> WarmRay | None:
    """The Ray that is kept running for this home on this machine. Raises UsageError where others can write its file."""
    path = record_file()
    if not path.exists():
        return None
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        why = f"its mode is {status.st_mode & 0o777:04o} and its owner {status.st_uid}"
        raise UsageError(f"{path} may be another user's", why, f"rm {path}")
    warm = read_document(path, WarmRay, f"rm {path}")
    return warm if find_own(warm) else None


def find_usable() -> WarmRay | None:
    """The Ray that a command may use: it runs, is this user's, and its processes run what this command would."""
    warm = find_running()
    if warm is None or not is_own_listener(int(warm.address.rpartition(":")[2])):
        return None
    if different := differences(warm.identity, identify()):
        what = ", ".join(different)
        log.warning(f"the Ray that raylab warm keeps running is not used: {what} changed since its start")
        return None
    return warm


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def identify() -> dict[str, str]:
    """Hashes of what worker processes run, by name: the code, the installed packages, each environment variable."""
    code = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    site = Path(sysconfig.get_path("purelib"))  # its time changes whenever a package is installed or removed
    lock = ROOT / "requirements.lock"
    packages = f"{sys.version} {sys.prefix} {site.stat().st_mtime_ns}".encode()
    packages += lock.read_bytes() if lock.exists() else b""
    variables = {name: text for name, text in os.environ.items() if not OF_SHELLS.fullmatch(name)}
    return {
        "code": hash_files(code, ROOT),
        "packages": hashlib.sha256(packages).hexdigest(),
        # Hashes, because some are secrets
        **{name: hashlib.sha256(os.fsencode(text)).hexdigest() for name, text in variables.items()},
    }
